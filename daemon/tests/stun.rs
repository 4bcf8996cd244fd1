//! Guests that write faster than the ports carry, and are slowed until they can be moved.

mod common;

use common::{LONG, Order, Stage, assert_runs, wait_for_exit, words};
use memlane_lab::{HostId, LabOptions, Rate, Vmm, wait_for};

/// Writes its working set in a small part of the time that the ports take for it.
const GUEST: &str = "--ram 96MiB --working-set 48MiB --flat-out --fill zero=10,random=80,compressible=10";
const STUN: [&str; 6] = ["--converge", "stun", "--max-stun", "99", "--downtime-limit", "2s"];

fn ports() -> LabOptions {
    let port_rate = Some(Rate::from_bits_per_second(200_000_000));
    LabOptions { ports: 2, port_rate, ..LabOptions::default() }
}

/// A guest on host A, and a VMM on host B that waits for it.
fn pair(stage: &mut Stage, guest: &str) -> (Vmm, Vmm) {
    let here = stage.rig.start_vmm(HostId::A, "web1", &words(guest)).unwrap();
    let there = stage.rig.start_vmm(HostId::B, "web1", &words(&format!("{guest} --incoming"))).unwrap();
    (here, there)
}

/// Orders a guest to move that is slowed for it, over ports so slow that it stays so.
fn begin_to_stun(stage: &Stage) -> Order {
    let order = stage.begin("web1", &STUN);
    stage.wait_until(HostId::A, "web1", "the guest to be slowed", |migration| {
        migration.stun.as_ref().is_some_and(|stun| stun.released_pages_per_second > 0.0)
    });
    order
}

#[test]
fn every_tracker_gives_way_to_stun() {
    let Some(mut stage) = Stage::new("every_tracker_gives_way_to_stun", ports()) else { return };
    for kind in
        ["--tracker log --vcpus 2", "--tracker ring", "--tracker pagemap", "--guest process --vcpus 2"]
    {
        eprintln!("{kind}");
        let (mut here, mut there) = pair(&mut stage, &format!("{GUEST} {kind}"));
        let answer = stage.migrate("web1", &STUN);
        assert_eq!(answer.code, 0, "{kind}: {}", answer.text);
        let moved = answer.last().unwrap();
        assert!(moved["stun"]["seconds"].as_f64() > Some(0.0), "{kind}: {moved}");
        assert!(moved["stun"]["released_pages_per_second"].as_f64() > Some(0.0), "{kind}: {moved}");
        assert!(moved["downtime_seconds"].as_f64() < Some(2.0), "{kind}: {moved}");
        assert_runs(&mut there);
        wait_for_exit(here.process());
    }
}

#[test]
fn what_stun_may_not_take_is_left_to_postcopy() {
    let Some(mut stage) = Stage::new("what_stun_may_not_take_is_left_to_postcopy", ports()) else { return };
    let (mut here, mut there) = pair(&mut stage, GUEST);
    let order = ["--converge", "stun", "--max-stun", "1", "--downtime-limit", "500ms"];
    let answer = stage.migrate("web1", &order);
    assert_eq!(answer.code, 4, "{}", answer.text);
    assert!(answer.text.contains("--max-stun") && answer.text.contains("--converge auto"), "{}", answer.text);
    stage.assert_runs_on("web1", &mut here);
    stage.wait_for_standing(HostId::B, "web1", "incoming");

    let order = ["--converge", "auto", "--max-stun", "1", "--downtime-limit", "500ms"];
    let answer = stage.migrate("web1", &order);
    assert_eq!(answer.code, 0, "{}", answer.text);
    assert_eq!(answer.last().unwrap()["postcopy"]["remaining_pages"], 0, "{}", answer.text);
    assert_runs(&mut there);
    wait_for_exit(here.process());
}

#[test]
fn a_stun_ends_with_its_migration() {
    let Some(mut stage) = Stage::new("a_stun_ends_with_its_migration", ports()) else { return };
    for kind in ["--tracker log", "--tracker pagemap"] {
        let (mut here, mut there) = pair(&mut stage, &format!("{GUEST} {kind}"));
        for port in 0..2 {
            stage.rig.lab().set_port_rate(port, Some(Rate::from_bits_per_second(30_000_000))).unwrap();
        }
        let order = begin_to_stun(&stage);
        let answer = stage.rig.ctl(HostId::A, &["cancel", "web1"]).unwrap();
        assert_eq!(answer.code, 0, "{}", answer.text);
        order.expect(5, &[]);
        stage.assert_runs_on("web1", &mut here);

        // Nobody lets its writes go one by one when the daemon is dead: the kernel lets them all go.
        stage.wait_for_standing(HostId::B, "web1", "incoming");
        let order = begin_to_stun(&stage);
        stage.rig.stop_daemon(HostId::A).unwrap();
        order.expect(6, &["memlaned"]);
        assert_runs(&mut here);

        stage.rig.start_daemon(HostId::A).unwrap();
        for port in 0..2 {
            stage.rig.lab().set_port_rate(port, None).unwrap();
        }
        stage.assert_moves("web1", &mut there);
        wait_for("the VMM to end", LONG, || (!here.process().is_running()).then_some(())).unwrap();
    }
}
