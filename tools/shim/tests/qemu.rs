//! Stock QEMU with the shim in it.

mod common;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use common::{Daemon, LONG, Memory, RamFile, Running, device, preload};
use memlane_lab::qmp::Monitor;
use memlane_lab::{BackgroundProcess, Requirement, qemu, skip, wait_for};
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
    let Some(device) = device(test) else { return };
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

/// As Proxmox starts it: the process that is left is a child's child of the one that was started, and becomes another
/// user.
#[test]
fn qemu_goes_to_the_background() {
    let test = "qemu_goes_to_the_background";
    if skip(test, &[Requirement::Qemu, Requirement::Root]) {
        return;
    }
    let Some(device) = device(test) else { return };
    let directory = tempfile::tempdir().unwrap();
    let (socket, monitor) = (directory.path().join("attach.sock"), directory.path().join("qmp.sock"));
    let pid_file = directory.path().join("pid");
    let daemon = Daemon::new(&socket);
    // For the user that QEMU becomes.
    for path in [directory.path(), &socket] {
        std::fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
    }
    let ram = RamFile::new(PAGES);
    let mut command = Command::new(qemu::program());
    command.args(["-S", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "64M", "-daemonize"]);
    command.args(["-machine", "pc,memory-backend=ram", "-object"]);
    command.arg(format!("memory-backend-file,id=ram,size=64M,share=on,mem-path={}", ram.path().display()));
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
    command.arg("-pidfile").arg(&pid_file).args(qemu::run_as("nobody").unwrap());
    assert!(preload(&mut command, &socket).status().unwrap().success());
    let background = BackgroundProcess::of_pid_file(&pid_file).unwrap();
    // The one in the foreground was there before.
    let connection = daemon.welcome_among_others(background.pid());
    let mut monitor = Monitor::connect(&monitor).unwrap();
    let memory = Memory::find(connection.open_userfault(Some(&device)).unwrap(), &ram);
    let _protection = memory.protect();
    assert!(memory.written().is_empty());
    monitor.execute("cont", json!({})).unwrap();
    wait_for("a write of the firmware", LONG, || (!memory.written().is_empty()).then_some(())).unwrap();
    // A daemon that starts anew is found from there.
    drop(connection);
    drop(daemon.welcome(background.pid()));
    monitor.execute("quit", json!({})).unwrap();
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
