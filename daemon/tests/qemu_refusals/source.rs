//! What the host of a guest has against its move.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use memlane_lab::{HostId, say_skipped};

use crate::common::Stage;
use crate::common::activate;
use crate::daemon::{MEMLANED, start_by};
use crate::impostor;
use crate::qemu::{AS_NOBODY, NOBODY, Qemu, assert_moves, guest_file, open_to_nobody, ram, ram_file, stage};

/// VFIO devices and the disk drivers that map a guest's memory are refused by the same words, but need hardware: unit
/// tests of `guest::qemu::blockers` are all that they have.
#[test]
fn memory_that_others_write_or_nobody_watches() {
    let Some(stage) = stage("memory_that_others_write_or_nobody_watches", false, "") else { return };
    let host = stage.rig.lab().host(HostId::A);
    let bare = Qemu::start_bare(host, "bare", &ram(host, "bare", 64));
    take(&stage, &bare, "bare");
    // The daemon waits some seconds for a shim: see the others meanwhile.
    let order = stage.begin("bare", &[]);

    let back_end = host.directory().join("back-end");
    impostor::vhost_user(&back_end);
    let channel = |id: &str| format!("-chardev socket,id={id},path={}", back_end.display());
    let devices = format!(
        "{} -device vhost-user-rng-pci,id=rng0,chardev=c0 {} -netdev vhost-user,id=n0,chardev=c1 \
         -device virtio-net-pci,netdev=n0,romfile=",
        channel("c0"),
        channel("c1"),
    );
    let devices = Qemu::start(host, "devices", &devices);
    take(&stage, &devices, "devices");
    stage.assert_refused(
        "devices",
        &[],
        &[
            "rng0",
            "-device vhost-user-rng-pci",
            "device_del rng0",
            "-netdev tap,vhost=on",
            "-netdev vhost-user",
            "QEMU cannot migrate: ",
        ],
    );
    devices.assert_runs();

    let shared = format!(
        "-object memory-backend-file,id=shared,share=on,size=1M,mem-path={} -device ivshmem-plain,id=s0,memdev=shared",
        ram_file(host, "shared-by-others")
    );
    let shared = Qemu::start(host, "shared", &shared);
    take(&stage, &shared, "shared");
    stage.assert_refused("shared", &[], &["device s0 (ivshmem-plain)", "does not move", "device_del s0"]);
    shared.assert_runs();

    let movable = Qemu::start(host, "web1", "");
    take(&stage, &movable, "web1");
    let there = Qemu::start(stage.rig.lab().host(HostId::B), "web1", "-incoming defer");
    let answer = there.attach(&stage, HostId::B, "web1", &["--incoming"]);
    assert_eq!(answer.code, 0, "{}", answer.text);
    assert_moves(&stage);
    there.assert_runs();

    order.expect(3, &["no shim in process", "LD_PRELOAD=", "MEMLANE_ATTACH_SOCKET"]);
    stage.wait_for_standing(HostId::A, "bare", "running");
    bare.assert_runs();
}

/// The daemon sees the release that `setarch` has the kernel tell.
#[test]
fn a_kernel_that_is_too_old() {
    let Some(mut stage) = stage("a_kernel_that_is_too_old", true, "") else { return };
    let file = guest_file(stage.rig.lab().host(HostId::A), "web1", "", "");
    stage.launch(HostId::A, &file);
    let by = ["setarch", std::env::consts::ARCH, "--uname-2.6"];
    let daemon = start_by(&mut stage, HostId::A, &by, Path::new(MEMLANED));
    stage.wait_for_standing(HostId::A, "web1", "running");
    stage.assert_refused("web1", &[], &["kernel", "Linux 2.6.", "run Linux 6.7 or newer"]);
    drop(daemon);
    stage.rig.start_daemon(HostId::A).unwrap();
    stage.wait_for_standing(HostId::A, "web1", "running");
    assert_moves(&stage);
}

/// Neither the daemon nor QEMU may make a userfaultfd; then a daemon comes that may, and lends QEMU its right.
#[test]
fn a_userfaultfd_that_is_not_permitted() {
    let test = "a_userfaultfd_that_is_not_permitted";
    if let Some(reason) = anybody_may() {
        return say_skipped(test, &reason);
    }
    let keys = format!("attach_users = [0, {NOBODY}]\n");
    let Some(mut stage) = stage(test, true, &keys) else { return };
    let host = stage.rig.lab().host(HostId::A);
    open_to_nobody(host);
    let journal = host.directory().join("journal");
    fs::remove_dir_all(&journal).unwrap();
    let file = guest_file(host, "web1", "", "");
    let directory = host.directory().to_owned();
    stage.rig.stop_daemon(HostId::A).unwrap();
    // Nobody cannot tell sockets that others have left behind from those of a live daemon.
    for socket in ["api.sock", "attach.sock"] {
        fs::remove_file(directory.join(socket)).unwrap();
    }
    fs::set_permissions(stage.rig.config_file(HostId::A), Permissions::from_mode(0o644)).unwrap();
    activate(&stage, HostId::A, "2100000000-2100065535");

    let daemon = start_by(&mut stage, HostId::A, AS_NOBODY, Path::new(MEMLANED));
    stage.launch(HostId::A, &file);
    let pid = stage.qemu(HostId::A, "web1");
    stage.assert_refused(
        "web1",
        &[],
        &["not permitted", "/dev/userfaultfd", "vm.unprivileged_userfaultfd to 1"],
    );
    drop(daemon);
    stage.rig.start_daemon(HostId::A).unwrap();
    stage.wait_for_standing(HostId::A, "web1", "running");
    assert_eq!(stage.qemu(HostId::A, "web1"), pid);
    assert_moves(&stage);
}

/// Why everybody on this machine may make a userfaultfd, if that is so.
fn anybody_may() -> Option<String> {
    let setting = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    if setting.trim() != "0" {
        return Some(format!("vm.unprivileged_userfaultfd is {}, not 0", setting.trim()));
    }
    let device = fs::metadata("/dev/userfaultfd").ok()?;
    (device.mode() & 0o006 != 0).then(|| "everybody may open /dev/userfaultfd".to_owned())
}

#[track_caller]
fn take(stage: &Stage, qemu: &Qemu, name: &str) {
    let answer = qemu.attach(stage, HostId::A, name, &[]);
    assert_eq!(answer.code, 0, "{}", answer.text);
}
