//! Guests that write faster than the ports carry, and are slowed until they can be moved.

mod common;

use common::{LONG, Stage, Tap, assert_runs, wait_for_exit, words};
use memlane_lab::{HostId, HugePages, LabOptions, Rate, Requirement, Vmm, say_skipped, skip, wait_for};
use memlaned::api::types::Migration;
use serde_json::Value;

/// Writes its working set in a small part of the time that the ports take for it.
const GUEST: &str = "--ram 256MiB --working-set 128MiB --flat-out --vcpus 2";
const STUN: [&str; 6] = ["--converge", "stun", "--max-stun", "99", "--downtime-limit", "300ms"];

fn ports(count: usize, rate: u64) -> LabOptions {
    let rate = Rate::from_bits_per_second(rate);
    LabOptions { ports: count, port_rate: Some(rate), bridge: false, ..LabOptions::default() }
}

/// Moves a guest, which has to be slowed for it.
fn assert_moves(stage: &mut Stage, guest: &str) -> Value {
    let mut source = stage.rig.start_vmm(HostId::A, "web1", &words(guest)).unwrap();
    let mut there = stage.rig.start_vmm(HostId::B, "web1", &words(&format!("{guest} --incoming"))).unwrap();
    let answer = stage.migrate("web1", &STUN);
    assert_eq!(answer.code, 0, "{guest}: {}", answer.text);
    let moved = answer.last().unwrap().clone();
    eprintln!("{guest}: {moved:#} {}", stage.log(HostId::A));
    let stun = &moved["stun"];
    assert!(stun["seconds"].as_f64().unwrap() > 0.0, "{moved}");
    assert!(stun["released_pages_per_second"].as_f64().unwrap() > 0.0, "{moved}");
    assert_runs(&mut there);
    wait_for_exit(source.process());
    there.quit().unwrap();
    moved
}

#[test]
fn every_tracker_gives_way_to_stun() {
    let Some(mut stage) = Stage::new(
        "every_tracker_gives_way_to_stun",
        ports(2, std::env::var("PORT_RATE").map_or(1_000_000_000, |r| r.parse().unwrap())),
    ) else {
        return;
    };
    for tracker in ["log"] {
        assert_moves(
            &mut stage,
            &format!("{} --tracker {tracker}", std::env::var("GUEST").unwrap_or(GUEST.into())),
        );
    }
}
