//! QEMUs that others have started, in the ways in which people start them, are taken in and move.

mod common;

use std::any::Any;
use std::fs;
use std::path::{Path, PathBuf};

use common::Stage;
use common::qemu::{
    Background, NOBODY, Qemu, assert_moves, assert_says_no, attach, open_to_nobody, shim, stage,
};
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
    wrapped("a_guest_of_proxmox", "proxmox");
}

#[test]
fn a_guest_of_incus() {
    wrapped("a_guest_of_incus", "incus");
}

#[test]
fn a_guest_of_nova() {
    wrapped("a_guest_of_nova", "nova");
}

/// The manager's command line starts memlane-qemu in the place of QEMU, and the guest moves.
fn wrapped(test: &str, line: &str) {
    let Some(stage) = stage(test, false, "") else { return };
    let disk = stage.rig.lab().host(HostId::A).directory().join("disk.img");
    fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let [a, b] = stage.rig.lab().hosts();
    let here = start_wrapped(a, line, &disk, &[]);
    let there = start_wrapped(b, line, &disk, &["-incoming", "defer"]);
    take_both(&stage, &here.qmp, &there.qmp);
    if fs::read_to_string(lines(&format!("{line}.txt"))).unwrap().lines().any(|argument| argument == "-S") {
        // The manager lets it run when it is there.
        let mut monitor = Monitor::connect(&a.directory().join("web1.qmp")).unwrap();
        monitor.execute("cont", serde_json::json!({})).unwrap();
    }
    assert_moves(&stage);
}

/// A QEMU that memlane-qemu has become, and the monitor that it was given for the daemon.
struct Wrapped {
    _process: Box<dyn Any>,
    qmp: PathBuf,
}

fn start_wrapped(host: &LabHost, line: &str, disk: &Path, more: &[&str]) -> Wrapped {
    let directory = host.directory().to_owned();
    let fill = |text: &str| {
        text.replace("{DISK}", disk.to_str().unwrap())
            .replace("{DIR}", directory.to_str().unwrap())
            .replace("{NAME}", "web1")
            .replace("{KVM}", "tcg")
    };
    if let Ok(config) = fs::read_to_string(lines(&format!("{line}.conf"))) {
        fs::write(directory.join(format!("{line}.conf")), fill(&config)).unwrap();
    }
    let text = fs::read_to_string(lines(&format!("{line}.txt"))).unwrap();
    let arguments: Vec<String> =
        text.lines().filter(|argument| !argument.starts_with('#')).map(fill).collect();
    let mut command = host.command(shim().with_file_name("memlane-qemu"));
    command.env("MEMLANE_EMULATOR", host.qemu()).env("MEMLANE_SHIM", shim());
    command.env("MEMLANE_ATTACH_SOCKET", directory.join("attach.sock"));
    command.env("MEMLANE_RAM", host.memory_directory()).env("MEMLANE_MONITORS", &directory);
    command.args(&arguments).args(more);
    let monitor = directory.join("web1.sock");
    if !arguments.iter().any(|argument| argument == "-daemonize") {
        let mut process = host.spawn("web1", command).unwrap();
        Monitor::connect_while(&directory.join("web1.qmp"), || process.is_running()).unwrap();
        return Wrapped { _process: Box::new(process), qmp: monitor };
    }
    let ended = command.output().unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let background = Background::of_pid_file(&directory.join("web1.pid"), monitor.clone());
    Wrapped { _process: Box::new(background), qmp: monitor }
}

fn lines(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/qemu/tests/lines").join(file)
}

/// Has both daemons take the QEMUs whose monitors are there.
fn take_both(stage: &Stage, here: &Path, there: &Path) {
    for (id, qmp, more) in [(HostId::A, here, &[][..]), (HostId::B, there, &["--incoming"])] {
        let answer = attach(stage, id, "web1", qmp, more);
        assert_eq!(answer.code, 0, "{}", answer.text);
    }
}
