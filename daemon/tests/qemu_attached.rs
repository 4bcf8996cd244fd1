//! QEMUs that others have started, in the ways in which people start them, are taken in and move.

mod common;

use std::fs;
use std::path::Path;

use common::qemu::{NOBODY, Qemu, assert_moves, assert_says_no, attach, open_to_nobody, stage};
use common::{Stage, wrapped};
use memlane_lab::qmp::Monitor;
use memlane_lab::{HostId, LabHost};

/// Proxmox and many scripts start QEMU so: the process that is left is another one than was started, and becomes another
/// user afterwards.
#[test]
fn a_qemu_in_the_background() {
    let keys = format!("attach_users = [0, {NOBODY}]\n");
    let Some(stage) = stage("a_qemu_in_the_background", false, &keys) else { return };
    let [a, b] = stage.rig.lab().hosts();
    for host in [a, b] {
        open_to_nobody(host);
    }
    let here = Qemu::start_in_background(a, "web1", "");
    let there = Qemu::start_in_background(b, "web1", "-incoming defer");
    for (id, qemu, more) in [(HostId::A, &here, &[][..]), (HostId::B, &there, &["--incoming"])] {
        let answer = attach(&stage, id, "web1", &qemu.qmp, more);
        assert_eq!(answer.code, 0, "{}", answer.text);
    }
    assert_moves(&stage);
}

/// Each back end of a guest with two NUMA nodes is a file that QEMU has unlinked. They are alike but for their names.
#[test]
fn memory_that_has_no_name() {
    let Some(mut stage) = stage("memory_that_has_no_name", false, "") else { return };
    let backend = |id: &str, host: &LabHost| {
        let directory = host.memory_directory().display().to_string();
        format!("-object memory-backend-file,id={id},size=64M,share=on,mem-path={directory}")
    };
    let ram = |host: &LabHost| {
        format!(
            "-m 128M -smp 2 {} {} -numa node,memdev=ram-node0,cpus=0 -numa node,memdev=ram-node1,cpus=1",
            backend("ram-node0", host),
            backend("ram-node1", host)
        )
    };
    let [a, b] = stage.rig.lab().hosts();
    let here = Qemu::start_with_ram(a, "web1", &ram(a));
    let there = Qemu::start_with_ram(b, "web1", &format!("{} -incoming defer", ram(b)));
    take_both(&stage, &here.qmp, &there.qmp);
    // A daemon that starts anew finds it again.
    stage.rig.stop_daemon(HostId::A).unwrap();
    stage.rig.start_daemon(HostId::A).unwrap();
    assert_moves(&stage);
}

/// QEMU 8.1 and newer would send a memfd by themselves: there one restart by memlane-qemu is asked for.
#[test]
fn memory_that_is_a_memfd() {
    let Some(stage) = stage("memory_that_is_a_memfd", false, "") else { return };
    const RAM: &str =
        "-m 64M -object memory-backend-memfd,id=mem,size=64M,share=on -machine memory-backend=mem";
    let [a, b] = stage.rig.lab().hosts();
    let here = Qemu::start_with_ram(a, "web1", RAM);
    if here.run("query-version")["qemu"]["major"].as_u64().unwrap() > 7 {
        let answer = here.attach(&stage, HostId::A, "web1", &[]);
        return assert_says_no(&answer, &["mem (memory-backend-memfd)", "memlane-qemu"]);
    }
    let there = Qemu::start_with_ram(b, "web1", &format!("{RAM} -incoming defer"));
    take_both(&stage, &here.qmp, &there.qmp);
    assert_moves(&stage);
}

/// What Proxmox VE starts, and how: see tools/qemu/tests/lines.
#[test]
fn a_guest_of_proxmox() {
    moves_wrapped("a_guest_of_proxmox", "proxmox");
}

#[test]
fn a_guest_of_incus() {
    moves_wrapped("a_guest_of_incus", "incus");
}

#[test]
fn a_guest_of_nova() {
    moves_wrapped("a_guest_of_nova", "nova");
}

/// The manager's command line starts memlane-qemu in the place of QEMU, and the guest moves.
fn moves_wrapped(test: &str, line: &str) {
    let Some(stage) = stage(test, false, "") else { return };
    let disk = stage.rig.lab().host(HostId::A).directory().join("disk.img");
    fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let [a, b] = stage.rig.lab().hosts();
    let here = wrapped::start(a, "web1", line, &disk, &[]);
    let there = wrapped::start(b, "web1", line, &disk, &["-incoming", "defer"]);
    take_both(&stage, &here.qmp, &there.qmp);
    if wrapped::arguments(line).iter().any(|argument| argument == "-S") {
        // The manager lets it run when it is there.
        let mut monitor = Monitor::connect(&a.directory().join("web1.qmp")).unwrap();
        monitor.execute("cont", serde_json::json!({})).unwrap();
    }
    assert_moves(&stage);
}

/// Has both daemons take the QEMUs whose monitors are there.
fn take_both(stage: &Stage, here: &Path, there: &Path) {
    for (id, qmp, more) in [(HostId::A, here, &[][..]), (HostId::B, there, &["--incoming"])] {
        let answer = attach(stage, id, "web1", qmp, more);
        assert_eq!(answer.code, 0, "{}", answer.text);
    }
}
