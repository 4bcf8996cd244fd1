//! Guests of 4 TiB that hold next to nothing of it: what they touch first while they are moved arrives with them,
//! and what they never touched costs nobody anything.

mod common;

use common::{Stage, assert_runs, wait_for_exit, words};
use memlane_lab::{HostId, LabOptions, LabProcess, Rate, Requirement, RigOptions};
use serde_json::Value;

/// Holds 64 MiB in places all over it, and touches 64 MiB more that are holes at first.
const SPARSE: &str = "--guest process --ram 4TiB --resident 192MiB --working-set 64MiB";
/// What no process may come to hold on account of the guest, in KiB.
const MOST_KB: u64 = 1 << 20;

fn stage(test: &str, rate: Option<u64>) -> Option<Stage> {
    let port_rate = rate.map(Rate::from_bits_per_second);
    let lab = LabOptions { ports: 2, port_rate, ..LabOptions::default() };
    Stage::with(
        test,
        Requirement::LAB,
        RigOptions { lab, tables: common::LIMITS.into(), ..Default::default() },
    )
}

/// Moves such a guest, and returns how the migration ended.
fn migrate(stage: &mut Stage, guest: &str, order: &[&str]) -> Value {
    let guest = format!("{SPARSE} {guest}");
    let mut here = stage.rig.start_vmm(HostId::A, "web1", &words(&guest)).unwrap();
    let mut there = stage.rig.start_vmm(HostId::B, "web1", &words(&format!("{guest} --incoming"))).unwrap();
    let answer = stage.migrate("web1", order);
    assert_eq!(answer.code, 0, "{guest} {order:?}: {}", answer.text);
    assert_runs(&mut there);
    assert_small(there.process());
    wait_for_exit(here.process());
    for id in [HostId::A, HostId::B] {
        assert_small(stage.rig.daemon(id));
    }
    answer.last().unwrap().clone()
}

/// The process holds, and has held, little memory, and has few page tables.
fn assert_small(process: &LabProcess) {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    for what in ["VmHWM:", "VmPTE:"] {
        let line = status.lines().find_map(|line| line.strip_prefix(what)).unwrap();
        let kb: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(kb < MOST_KB, "{}: {what} {kb} KiB", process.name());
    }
}

#[test]
fn what_is_touched_first_in_any_round_arrives() {
    // The guest goes on to touch ever new pages, for as long as round one takes and longer.
    let Some(mut stage) = stage("what_is_touched_first_in_any_round_arrives", Some(200_000_000)) else {
        return;
    };
    for guest in [
        "--rate 3000 --fill zero=70,random=20,compressible=10",
        "--rate 20000 --vcpus 2 --pattern sequential --fill zero=70,random=20,compressible=10 --gap",
        "--rate 500 --fill zero=100,random=0,compressible=0",
    ] {
        let ended = migrate(&mut stage, guest, &["--verify"]);
        assert_eq!(ended["digest_verified"], true, "{ended}");
        assert!(ended["hole_pages"].as_u64() > Some((3 << 40) / 4096), "{ended}");
    }
}

#[test]
fn postcopy_fetches_what_is_held_and_no_holes() {
    let Some(mut stage) = stage("postcopy_fetches_what_is_held_and_no_holes", Some(400_000_000)) else {
        return;
    };
    for (guest, when) in [
        ("--rate 3000 --fill zero=70,random=20,compressible=10", "hybrid"),
        ("--rate 3000 --fill zero=70,random=20,compressible=10", "now"),
        ("--flat-out --vcpus 2 --fill zero=50,random=40,compressible=10 --gap", "now"),
        ("--rate 1000 --fill zero=100,random=0,compressible=0", "now"),
    ] {
        let ended = migrate(&mut stage, guest, &["--postcopy", when]);
        assert_eq!(ended["postcopy"]["remaining_pages"], 0, "{ended}");
    }
}

#[test]
fn a_guest_comes_back_to_where_its_memory_was() {
    let Some(mut stage) = stage("a_guest_comes_back_to_where_its_memory_was", None) else { return };
    let guest = format!("{SPARSE} --rate 5000 --fill zero=70,random=20,compressible=10");
    let incoming = words(&format!("{guest} --incoming"));
    let mut here = stage.rig.start_vmm(HostId::A, "web1", &words(&guest)).unwrap();
    for (leg, order) in
        ["--verify", "--postcopy=now", "--verify", "--postcopy=hybrid"].into_iter().enumerate()
    {
        let (from, to, host) =
            if leg % 2 == 0 { (HostId::A, HostId::B, "host-b") } else { (HostId::B, HostId::A, "host-a") };
        let mut there = stage.rig.start_vmm(to, "web1", &incoming).unwrap();
        let answer =
            stage.rig.ctl(from, &["migrate", "web1", host, "--downtime-limit", "60s", order]).unwrap();
        assert_eq!(answer.code, 0, "{order}: {}", answer.text);
        assert_runs(&mut there);
        wait_for_exit(here.process());
        here = there;
    }
    assert_small(here.process());
}
