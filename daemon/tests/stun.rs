//! Guests that write faster than the ports carry, and are slowed until they can be moved.

mod common;

use common::{LONG, Stage, assert_runs, wait_for_exit, words};
use memlane_api::types::Stun;
use memlane_lab::{HostId, HugePages, LabOptions, Rate, say_skipped, wait_for};
use serde_json::Value;

/// Two of these carry 6,000 pages a second. A guest dirties 36,000 or more, and outruns them on a busy machine too.
const PORT: u64 = 100_000_000;
/// More of it is dirty than the ports carry in a limit of 1 or 2 seconds.
const GUEST: &str = "--ram 128MiB --working-set 96MiB --flat-out --vcpus 2";
/// The same for a limit of 300 milliseconds, which a pause with nothing left to send keeps on a busy machine too.
const SMALL_GUEST: &str = "--ram 64MiB --working-set 48MiB --flat-out --vcpus 2";
const STUN: [&str; 6] = ["--converge", "stun", "--max-stun", "99", "--downtime-limit", "1s"];

fn ports(count: usize, bits_per_second: u64) -> LabOptions {
    let rate = Rate::from_bits_per_second(bits_per_second);
    LabOptions { ports: count, port_rate: Some(rate), ..LabOptions::default() }
}

/// Moves a guest, which has to be slowed for it.
fn assert_moves_stunned(stage: &mut Stage, guest: &str, limit: &str) {
    let mut source = stage.rig.start_vmm(HostId::A, "web1", &words(guest)).unwrap();
    let mut there = stage.rig.start_vmm(HostId::B, "web1", &words(&format!("{guest} --incoming"))).unwrap();
    let mut order = STUN;
    order[5] = limit;
    let answer = stage.migrate("web1", &order);
    assert_eq!(answer.code, 0, "{guest}: {}", answer.text);
    assert_stunned(answer.last().unwrap());
    assert_runs(&mut there);
    wait_for_exit(source.process());
    there.quit().unwrap();
}

fn assert_stunned(migration: &Value) {
    for key in ["seconds", "released_pages_per_second", "target_pages_per_second", "switch_seconds"] {
        assert!(migration["stun"][key].as_f64().unwrap() > 0.0, "{migration}");
    }
    let pages = |key: &str| migration["stun"][key].as_f64().unwrap();
    // What goes at once before anybody is held is the more, the shorter a stun is.
    let seconds = pages("seconds");
    let most = 1.1 * pages("target_pages_per_second") + 5000.0 / seconds;
    assert!(pages("released_pages_per_second") <= most, "{migration}");
}

/// Orders the guest to move, and returns when its writes have been held up for a while.
fn begin_stunned(stage: &Stage, name: &str) -> common::Order {
    let mut more = STUN;
    more[5] = "300ms";
    let order = stage.begin(name, &more);
    // How long it took to begin is known when it has begun.
    let is_held = |stun: &Stun| stun.seconds > 0.2 && stun.switch_seconds > 0.0;
    stage.wait_until(HostId::A, name, "a stun", |migration| {
        migration.outcome.is_none() && migration.stun.as_ref().is_some_and(is_held)
    });
    order
}

/// Some memory of a process has a userfaultfd.
fn is_registered(pid: u32) -> bool {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    flags.any(|flags| flags.split_whitespace().any(|flag| ["uw", "um"].contains(&flag)))
}

#[track_caller]
fn assert_let_go(pid: u32) {
    wait_for("the end of all protection", LONG, || (!is_registered(pid)).then_some(())).unwrap();
}

#[test]
fn every_tracker_gives_way_to_stun() {
    let Some(mut stage) = Stage::new("every_tracker_gives_way_to_stun", ports(2, PORT)) else {
        return;
    };
    for tracker in ["log", "ring", "pagemap"] {
        assert_moves_stunned(&mut stage, &format!("{GUEST} --tracker {tracker}"), "1s");
    }
    assert_moves_stunned(&mut stage, &format!("{GUEST} --guest process"), "1s");
}

#[test]
fn huge_pages_are_stunned_whole() {
    let test = "huge_pages_are_stunned_whole";
    let Some(mut stage) = Stage::new(test, ports(2, PORT)) else { return };
    let _pages = match HugePages::reserve(128) {
        Ok(pages) => pages,
        Err(error) => return say_skipped(test, &format!("{error:#}")),
    };
    assert_moves_stunned(&mut stage, &format!("{GUEST} --backing huge --tracker log"), "2s");
}

#[test]
fn a_cancelled_stun_lets_the_guest_go() {
    let Some(mut stage) = Stage::new("a_cancelled_stun_lets_the_guest_go", ports(2, PORT)) else {
        return;
    };
    for tracker in ["log", "ring", "pagemap"] {
        let guest = format!("{SMALL_GUEST} --tracker {tracker}");
        let mut source = stage.rig.start_vmm(HostId::A, tracker, &words(&guest)).unwrap();
        let _there = stage.rig.start_vmm(HostId::B, tracker, &words(&format!("{guest} --incoming"))).unwrap();
        let order = begin_stunned(&stage, tracker);
        assert_eq!(is_registered(source.process().pid()), tracker != "ring", "dirty rings tell who writes");
        assert_eq!(stage.rig.ctl(HostId::A, &["cancel", tracker]).unwrap().code, 0);
        assert_stunned(order.expect(5, &["cancelled by the operator"]).last().unwrap());
        assert_let_go(source.process().pid());
        stage.assert_runs_on(tracker, &mut source);
        // It can be tracked, and slowed, again.
        let order = begin_stunned(&stage, tracker);
        assert_eq!(stage.rig.ctl(HostId::A, &["cancel", tracker]).unwrap().code, 0);
        order.expect(5, &[]);
        stage.wait_for_end(tracker);
        stage.assert_runs_on(tracker, &mut source);
        source.quit().unwrap();
    }
}

/// Whoever waits goes on at once: the kernel sees to that.
#[test]
fn a_daemon_that_dies_lets_the_guest_go() {
    let test = "a_daemon_that_dies_lets_the_guest_go";
    let Some(mut stage) = Stage::new(test, ports(2, PORT)) else { return };
    for tracker in ["log", "ring", "pagemap"] {
        let guest = format!("{SMALL_GUEST} --tracker {tracker}");
        let mut source = stage.rig.start_vmm(HostId::A, tracker, &words(&guest)).unwrap();
        let _there = stage.rig.start_vmm(HostId::B, tracker, &words(&format!("{guest} --incoming"))).unwrap();
        let order = begin_stunned(&stage, tracker);
        stage.rig.stop_daemon(HostId::A).unwrap();
        order.expect(6, &[]);
        assert_let_go(source.process().pid());
        assert_runs(&mut source);
        stage.rig.start_daemon(HostId::A).unwrap();
        stage.wait_for_standing(HostId::A, tracker, "running");
        assert_runs(&mut source);
        source.quit().unwrap();
    }
}

#[test]
fn linux_is_stunned() {
    let test = "linux_is_stunned";
    let Some(stage) = Stage::for_linux(test, ports(1, PORT)) else { return };
    let mut linux = stage.linux(|guest| {
        (guest.vcpus, guest.working_set, guest.rate) = (2, "64MiB".parse().unwrap(), 20_000);
    });
    let mut order = vec!["migrate", &linux.guest.name, "host-b", "--min-bandwidth", "1mbit"];
    // Its working set takes 5 s, and QEMU's own part of the pause more than a second on a busy host.
    let mut stun = STUN;
    stun[5] = "3s";
    order.extend(stun);
    let answer = stage.rig.ctl(HostId::A, &order).unwrap();
    assert_eq!(answer.code, 0, "{}", answer.text);
    assert_stunned(answer.last().unwrap());
    linux.assert_runs();
    linux.assert_whole(&stage);
}
