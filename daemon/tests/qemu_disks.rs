//! A guest whose disk is read past the page cache: what it reads lands in its memory after that was noticed as
//! written.

mod common;

use std::time::Duration;

use common::{LIMITS, Linux, Stage};
use memlane_lab::qmp::Monitor;
use memlane_lab::{GuestCounters, HostId, LabOptions, LateDisk, Requirement, RigOptions, skip};
use serde_json::{Value, json};

/// A read of the disk takes longer than a look at what was written.
const DELAY: Duration = Duration::from_millis(60);
/// It takes longer than it takes to send a page that was reported.
const LONG_DELAY: Duration = Duration::from_secs(1);
/// The guest is moved so often, unless the environment says otherwise (`MEMLANE_DIRECT_MOVES`).
const MOVES: usize = 4;
/// Without waiting for its disk the guest goes wrong within so many moves.
const A_FEW: usize = 12;
/// How QEMU opens a disk, and the guest's device for it. On FUSE a thread that submits to the kernel waits there until the read
/// has ended, so QEMU's main loop is not to be that thread: it would hold up all of QEMU. Where threads of QEMU submit, it is not.
/// QEMU 10.0 loses the interrupt of a disk every now and then when it stops the guest, also without Memlane if two disks share an
/// I/O thread; seen once where one with `aio=threads` had its own. So each has its own, and that one has none.
const DRIVES: [(&str, &str); 4] = [
    // It is the file system that bypasses the page cache here.
    ("cache=writeback,aio=threads", "num-queues=1"),
    ("cache=none,aio=native", "iothread=io0"),
    ("cache=none,aio=io_uring", "iothread=io1"),
    ("cache=directsync,aio=threads", "num-queues=1"),
];

/// The guest checks everything that it reads, at once and much later.
#[test]
fn what_a_guest_reads_directly_moves_with_it() {
    let moves = std::env::var("MEMLANE_DIRECT_MOVES").map_or(MOVES, |moves| moves.parse().expect("a number"));
    let Some((mut stage, late)) = stage("what_a_guest_reads_directly_moves_with_it", DELAY) else { return };
    let mut linux = linux(&stage, &late, &DRIVES);
    let (mut from, mut longest) = (HostId::A, 0f64);
    for number in 0..moves {
        let how = if number % 2 == 0 { &["--verify"][..] } else { &["--postcopy", "hybrid"] };
        let moved = linux.assert_moves_with(&stage, from, how);
        let checked = GuestCounters::ask(stage.rig.lab().lan(), linux.guest.address, "check");
        let checked = checked.unwrap_or_else(|error| {
            let (answered, doing) = (late.answered(), doing(&mut stage, from.other(), &linux));
            panic!("move {number}, {how:?}: {error:#}; the disk has {answered}; {doing}")
        });
        assert_eq!(checked.failures, 0, "move {number}, {how:?}: {checked:?}");
        longest = longest.max(moved["longest_io_stall_seconds"].as_f64().expect("the disk was waited for"));
        from = from.other();
    }
    println!("{moves} moves, none wrong; I/O stood still for {:.1} ms at most", longest * 1e3);
}

/// The same guest, moved by daemons that take its disk for another, whose reads the page cache copies: they do not wait
/// for it. Would it go right, nothing would be tested above.
#[test]
fn what_a_guest_reads_directly_is_lost_unless_it_is_waited_for() {
    let test = "what_a_guest_reads_directly_is_lost_unless_it_is_waited_for";
    let Some((mut stage, late)) = stage(test, LONG_DELAY) else { return };
    let linux = linux(&stage, &late, &DRIVES[..1]);
    let directory = late.file().parent().unwrap().display().to_string();
    let deceive = format!("mount -t tmpfs none {directory} && touch {}", late.file().display());
    let mut from = HostId::A;
    for number in 1..=A_FEW {
        stage.rig.start_daemon_after(from, &deceive).unwrap();
        stage.wait_for_standing(from, &linux.guest.name, "running");
        let answer = stage.migrate_from(from, &linux.guest.name, &[]);
        assert_eq!(answer.code, 0, "{}", answer.text);
        assert!(answer.last().unwrap()["longest_io_stall_seconds"].is_null(), "{}", answer.text);
        stage.wait_for_end(&linux.guest.name);
        let checked = GuestCounters::ask(stage.rig.lab().lan(), linux.guest.address, "check").unwrap();
        if checked.failures > 0 {
            return println!("wrong after {number} moves: {checked:?}");
        }
        // The next guest that it receives has its disk.
        stage.rig.start_daemon(from).unwrap();
        from = from.other();
    }
    panic!("{A_FEW} moves without waiting for the disk, and nothing went wrong");
}

/// Says what the QEMU of a guest does whose disk does not answer: what its threads wait for in the kernel, and how its queues
/// stand. For that its daemon has to go.
fn doing(stage: &mut Stage, id: HostId, linux: &Linux) -> String {
    let name = linux.guest.name.clone();
    let pid = stage.qemu(id, &name);
    let mut said = String::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let read = |file: &str| std::fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        said += &format!("\n{} waits in {} ({})", read("comm").trim(), read("wchan"), read("syscall").trim());
    }
    stage.rig.stop_daemon(id).unwrap();
    let socket = stage.rig.lab().host(id).directory().join("guests").join(&name).join("qmp.sock");
    let mut monitor = Monitor::connect(&socket).unwrap();
    let mut ask = |command: &str, arguments: Value| {
        let answer = monitor.execute(command, arguments.clone());
        said += &format!("\n{command} {arguments}: {answer:?}");
        answer.unwrap_or_default()
    };
    ask("query-status", json!({}));
    for device in ask("x-query-virtio", json!({})).as_array().into_iter().flatten() {
        ask("x-query-virtio-queue-status", json!({ "path": device["path"], "queue": 0 }));
    }
    ask("human-monitor-command", json!({ "command-line": "info lapic" }));
    said
}

fn stage(test: &str, delay: Duration) -> Option<(Stage, LateDisk)> {
    let lab = LabOptions { switch: true, ..LabOptions::default() };
    if skip(test, Requirement::LAB_WITH_LATE_DISK) {
        return None;
    }
    // Before the daemons, so that they and their QEMUs see it.
    let late = LateDisk::make("64MiB".parse().unwrap(), delay).unwrap();
    let options = RigOptions { lab, tables: LIMITS.into(), may_start_guests: true, ..RigOptions::default() };
    Some((Stage::with(test, Requirement::LAB_WITH_LINUX, options)?, late))
}

/// A guest with the disk as several of its own, opened in different ways.
fn linux(stage: &Stage, late: &LateDisk, drives: &[(&str, &str)]) -> Linux {
    let file = late.file().display();
    let drive = |(number, (drive, device)): (usize, &(&str, &str))| {
        [
            "-drive".to_owned(),
            format!("file={file},if=none,id=d{number},format=raw,readonly=on,{drive}"),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive=d{number},{device}"),
        ]
    };
    stage.linux(|guest| {
        // What it reads is work enough for it.
        guest.rate = 500;
        guest.disks = ["vda", "vdb", "vdc", "vdd"][..drives.len()].iter().map(|&name| name.into()).collect();
        guest.arguments =
            ["io0", "io1"].iter().flat_map(|id| ["-object".into(), format!("iothread,id={id}")]).collect();
        guest.arguments.extend(drives.iter().enumerate().flat_map(drive));
    })
}
