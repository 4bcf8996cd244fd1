//! Stock QEMU with the shim in it.

mod common;

use std::path::Path;
use std::process::Command;

use common::{Daemon, LONG, Memory, RamFile, Running, preload};
use memlane_lab::qmp::Monitor;
use memlane_lab::{Requirement, qemu, say_skipped, skip, wait_for};
use serde_json::json;

/// What libvirt forbids its QEMUs.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
const PAGES: u64 = (64 << 20) / 4096;

/// Connects to the monitor of a QEMU that has just been started.
fn monitor_of(qemu: &mut Running, socket: &Path) -> Monitor {
    Monitor::connect_while(socket, || matches!(qemu.0.try_wait(), Ok(None))).unwrap()
}

/// The firmware, which runs as soon as QEMU does, writes pages; before, none are written.
#[test]
fn the_writes_of_a_guest_are_seen() {
    let test = "the_writes_of_a_guest_are_seen";
    if skip(test, &[Requirement::Qemu]) {
        return;
    }
    let device = match std::fs::File::options().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => device,
        Err(error) => return say_skipped(test, &format!("/dev/userfaultfd cannot be opened: {error}")),
    };
    let directory = tempfile::tempdir().unwrap();
    let (socket, monitor) = (directory.path().join("attach.sock"), directory.path().join("qmp.sock"));
    let daemon = Daemon::new(&socket);
    let ram = RamFile::new(PAGES);
    let mut command = Command::new(qemu::program());
    command.args(["-S", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "64M"]);
    command.args(["-machine", "pc,memory-backend=ram", "-sandbox", SANDBOX, "-object"]);
    command.arg(format!("memory-backend-file,id=ram,size=64M,share=on,mem-path={}", ram.path().display()));
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
    let mut qemu = Running(preload(&mut command, &socket).spawn().unwrap());
    let connection = daemon.welcome(qemu.pid());
    // The guest's memory is mapped by now.
    let mut monitor = monitor_of(&mut qemu, &monitor);

    let memory = Memory::find(connection.open_userfault(Some(&device)).unwrap(), &ram);
    let _protection = memory.protect();
    assert!(memory.written().is_empty());
    monitor.execute("cont", json!({})).unwrap();
    wait_for("a write of the firmware", LONG, || (!memory.written().is_empty()).then_some(())).unwrap();
    monitor.execute("quit", json!({})).unwrap();
    assert!(qemu.0.wait().unwrap().success());
}

/// To become another user, the C library of a program interrupts all of its threads.
#[test]
fn qemu_becomes_another_user() {
    let test = "qemu_becomes_another_user";
    if skip(test, &[Requirement::Qemu, Requirement::Root]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (socket, monitor) = (directory.path().join("attach.sock"), directory.path().join("qmp.sock"));
    let daemon = Daemon::new(&socket);
    let mut command = Command::new(qemu::program());
    command
        .args(["-machine", "none", "-display", "none", "-nodefaults"])
        .args(qemu::run_as("nobody").unwrap());
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
    let mut qemu = Running(preload(&mut command, &socket).spawn().unwrap());
    let _connection = daemon.welcome(qemu.pid());
    monitor_of(&mut qemu, &monitor).execute("quit", json!({})).unwrap();
    assert!(qemu.0.wait().unwrap().success());
}
