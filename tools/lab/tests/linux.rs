//! A Linux guest boots under QEMU, alone and without a daemon, and talks to a client through a switch.

use std::path::Path;
use std::time::Duration;

use memlane_lab::linux::{Accelerator, Initramfs, Kernel, LinuxGuest};
use memlane_lab::{
    ClientSession, GuestCounters, HostId, Lab, LabOptions, Lan, Programs, Requirement, Rig, RigOptions, Size,
    skip, tell_guest, wait_for,
};

/// Long enough for a busy machine: it only bounds a failure.
const PATIENCE: Duration = Duration::from_secs(180);

#[test]
fn a_linux_guest_checks_its_memory_and_talks() {
    if skip("a_linux_guest_checks_its_memory_and_talks", Requirement::LAB_WITH_LINUX) {
        return;
    }
    let lab = Lab::new(LabOptions { switch: true, ..LabOptions::default() }).expect("a lab");
    let (host, lan) = (lab.host(HostId::A), lab.lan());
    host.add_tap("tap-web1").expect("a tap");

    let kernel = Kernel::obtain().expect("a kernel");
    let file = host.directory().join("initramfs");
    let initramfs = Initramfs::build(&file, &kernel).expect("an initramfs");
    let console = host.directory().join("console");
    let guest = LinuxGuest {
        vcpus: 2,
        working_set: Size::from_mib(16),
        ..LinuxGuest::new(kernel, initramfs, Accelerator::Tcg, console.clone())
    };
    let mut command = host.command(host.qemu());
    command.args(guest.qemu_arguments()).args(["-m", "256M"]);
    command.args(["-netdev", "tap,id=lan,ifname=tap-web1,script=no,downscript=no"]);
    command.args(["-device", &format!("virtio-net-pci,netdev=lan,mac={}", guest.mac_text())]);
    let capture = lan.capture_from(HostId::A).expect("a capture");
    let qemu = host.spawn("qemu", command).expect("QEMU");

    let said = || std::fs::read_to_string(&console).unwrap_or_default() + &qemu.log_tail();
    let session = ClientSession::open(lan, Lan::GUEST, PATIENCE)
        .unwrap_or_else(|error| panic!("{error:#}: {}", said()));
    let first = session.hear(PATIENCE).expect("an answer");
    assert!(said().contains("memlane-init: ready at 10.78.0.2"), "{}", said());
    assert_eq!(lan.learned_port(guest.mac).expect("a switch").as_deref(), Some("to-a"));
    let frame = capture.next_from(guest.mac, PATIENCE).expect("a capture").expect("a frame of the guest");
    assert!(!frame.is_rarp(), "nobody announces a guest that boots");

    let all = GuestCounters::ask(lan, Lan::GUEST, "check").expect("an answer");
    assert!(all.passes >= first.passes + 4096, "{first:?}, then {all:?}");
    assert_eq!((all.failures, &all.boot_id), (0, &first.boot_id), "{}", said());

    tell_guest(lan, Lan::GUEST, "reboot").expect("a command");
    // The new boot knows nothing of the connection, and resets it.
    wait_for("the end of the session", PATIENCE, || session.hear(PATIENCE).is_err().then_some(()))
        .expect("an end");
    let again = ClientSession::open(lan, Lan::GUEST, PATIENCE).expect("the guest again");
    assert_ne!(again.hear(PATIENCE).expect("an answer").boot_id, first.boot_id);
}

#[test]
fn what_a_daemon_has_launched_goes_with_the_rig() {
    if skip("what_a_daemon_has_launched_goes_with_the_rig", Requirement::LAB_WITH_LINUX) {
        return;
    }
    let programs = Programs::build(false).expect("programs");
    let lab = LabOptions { switch: true, ..LabOptions::default() };
    let mut rig = Rig::new(&programs, RigOptions { lab, ..RigOptions::default() }).expect("a rig");
    let (directory, memory) = {
        let host = rig.lab().host(HostId::A);
        (host.directory().to_owned(), host.memory_directory().to_owned())
    };
    let kernel = Kernel::obtain().expect("a kernel");
    let initramfs = Initramfs::build(&directory.join("initramfs"), &kernel).expect("an initramfs");
    let guest = LinuxGuest {
        ram: Size::from_mib(256),
        working_set: Size::from_mib(16),
        ..LinuxGuest::new(kernel, initramfs, Accelerator::Tcg, directory.join("console"))
    };
    let file = rig.prepare_linux(&guest).expect("taps and a file");
    let answer = rig.ctl(HostId::A, &["launch", file.to_str().expect("a path")]).expect("memlanectl");
    assert_eq!(answer.code, 0, "{}", answer.text);
    let known = rig.guest(HostId::A, "web1").expect("an answer").expect("the guest");
    let process = Path::new("/proc").join(known["pid"].to_string());
    assert!(process.exists() && memory.read_dir().expect("a directory").next().is_some(), "{known}");

    rig.stop_daemon(HostId::A).expect("a kill");
    assert!(process.exists(), "guests outlive their daemon");
    drop(rig);
    wait_for("the end of QEMU", PATIENCE, || (!process.exists()).then_some(())).expect("an end");
    assert!(!memory.exists() && !directory.exists());
}
