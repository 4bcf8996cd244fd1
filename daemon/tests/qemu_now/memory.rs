//! Memory is plugged in and out while the guest is copied.

use std::time::Duration;

use memlane_api::types::Phase;
use memlane_lab::{ClientSession, HostId, LabOptions, Requirement, RigOptions, wait_for};
use serde_json::json;

use crate::common::qemu::{Qemu, attach_both, ram_file};
use crate::common::{LIMITS, LONG, Stage};
use crate::scene::{Scene, slow};

/// The guest boots on an emulated processor.
const BOOT: Duration = Duration::from_secs(180);
const MIB: u64 = 1 << 20;

/// The waiting QEMU has no such device.
#[test]
fn a_dimm_that_is_plugged_in_while_the_guest_is_copied_ends_the_move() {
    let test = "a_dimm_that_is_plugged_in_while_the_guest_is_copied_ends_the_move";
    let Some(scene) = Scene::new(test, "-m 64M,slots=2,maxmem=1G", slow()) else { return };
    scene.fill();
    let order = scene.stage.begin("web1", &["--compression", "off"]);
    scene.stage.wait_until(HostId::A, "web1", "copying", |moved| moved.phase == Phase::Copying);
    let size = 128 * MIB;
    scene
        .here
        .run_with("object-add", json!({ "qom-type": "memory-backend-ram", "id": "mem1", "size": size }));
    scene.here.run_with("device_add", json!({ "driver": "pc-dimm", "id": "dimm1", "memdev": "mem1" }));
    order.expect(4, &["was changed while the guest was copied"]);
    scene.here.assert_runs();
    assert_eq!(scene.there.run("query-status")["status"], "inmigrate");
}

/// How much a guest uses of its virtio-mem is part of the device's state, and what it gives back holds nothing afterwards.
#[test]
fn virtio_mem_is_plugged_in_and_out_while_the_guest_is_copied() {
    let test = "virtio_mem_is_plugged_in_and_out_while_the_guest_is_copied";
    let lab = LabOptions { switch: true, ports: 1, port_rate: slow(), ..LabOptions::default() };
    let options = RigOptions { lab, tables: LIMITS.into(), ..RigOptions::default() };
    let Some(stage) = Stage::with(test, Requirement::LAB_WITH_LINUX, options) else { return };
    let [a, b] = stage.rig.lab().hosts();
    let guest = stage.linux_guest(|guest| guest.working_set = "16MiB".parse().unwrap());
    stage.rig.prepare_linux(&guest).unwrap();
    let start = |host, more: &str| {
        let file = ram_file(host, "web1");
        let memory =
            |id: &str| format!("-object memory-backend-file,id={id},share=on,size=256M,mem-path={file}.{id}");
        let arguments = format!(
            "-m 256M,maxmem=1G {} -machine memory-backend=ram {} -device virtio-mem-pci,id=vm0,memdev=mem1 {more}",
            memory("ram"),
            memory("mem1"),
        );
        Qemu::start_linux(host, &guest, &arguments)
    };
    let (here, there) = (start(a, ""), start(b, "-incoming defer"));
    attach_both(&stage, &here, &there);
    let session = ClientSession::open(stage.rig.lab().lan(), guest.address, BOOT).unwrap();
    let place = |property: &str| json!({ "path": "/machine/peripheral/vm0", "property": property });
    let use_of = |mib: u64| {
        let mut size = place("requested-size");
        size["value"] = json!(mib * MIB);
        here.run_with("qom-set", size);
        let has = || (here.run_with("qom-get", place("size")) == mib * MIB).then_some(());
        wait_for("the guest to use so much memory", LONG, has).unwrap();
    };
    use_of(128);
    let order = stage.begin("web1", &["--verify", "--compression", "off"]);
    stage.wait_until(HostId::A, "web1", "copying", |moved| moved.phase == Phase::Copying);
    use_of(224);
    use_of(64);
    stage.wait_until(HostId::A, "web1", "copying still", |moved| moved.phase == Phase::Copying);
    order.expect(0, &[]);
    assert_eq!(there.run_with("qom-get", place("size")), 64 * MIB);
    there.assert_runs();
    assert_eq!(session.hear(LONG).unwrap().failures, 0);
}
