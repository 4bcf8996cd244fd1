//! Post-copy: the guest runs at the destination while part of its memory is still at the source, and
//! arrives whole whatever happens to the connections and to the source's daemon meanwhile.

mod common;

use std::time::Duration;

use common::{LIMITS, LONG, Stage, assert_runs, wait_for_exit, words};
use memlane_api::types::{Migration, Phase};
use memlane_lab::{
    HostId, HugePages, LabOptions, LabVmm, Rate, Requirement, RigOptions, say_skipped, wait_for,
};

/// Writes as fast as it can, all over its memory.
const BUSY: &str = "--ram 64MiB --working-set 48MiB --flat-out --fill zero=10,random=80,compressible=10";
/// Takes some seconds for the memory of such a guest.
const SLOW: u64 = 50_000_000;

/// A guest on host A, and a VMM on host B that waits for it.
fn pair(stage: &mut Stage, guest: &str) -> (LabVmm, LabVmm) {
    let here = stage.rig.start_vmm(HostId::A, "web1", &words(guest)).unwrap();
    let there = stage.rig.start_vmm(HostId::B, "web1", &words(&format!("{guest} --incoming"))).unwrap();
    (here, there)
}

fn slow_ports(ports: usize) -> LabOptions {
    LabOptions { ports, port_rate: Some(Rate::from_bits_per_second(SLOW)), ..LabOptions::default() }
}

/// Waits until the guest runs at the destination and fetches.
fn wait_for_fetching(stage: &Stage) -> Migration {
    stage.wait_until(HostId::A, "web1", "post-copy", |migration| {
        let fetched = migration.postcopy.as_ref().map_or(0, |postcopy| postcopy.pages_streamed);
        migration.phase == Phase::Fetching && fetched > 100
    })
}

/// Lets the ports be as fast as they can: the rest need not take as long.
fn hurry(stage: &Stage, ports: usize) {
    for port in 0..ports {
        stage.rig.lab().set_port_rate(port, None).unwrap();
    }
}

/// The guest has arrived with all of its memory, and goes on.
fn assert_whole(ended: &serde_json::Value, here: &mut LabVmm, there: &mut LabVmm) {
    let postcopy = &ended["postcopy"];
    assert_eq!(postcopy["remaining_pages"], 0, "{ended}");
    // Where a guest touches much at once, all of it may come because it waits.
    let came = ["pages_streamed", "pages_fetched"].map(|by| postcopy[by].as_u64().unwrap());
    assert!(came.iter().sum::<u64>() > 0, "{ended}");
    assert_runs(there);
    wait_for_exit(here.process());
}

#[test]
fn a_guest_runs_before_its_memory_is_there() {
    let test = "a_guest_runs_before_its_memory_is_there";
    let Some(mut stage) = Stage::new(test, LabOptions { ports: 2, ..LabOptions::default() }) else { return };
    for (kind, when) in [
        ("--tracker log", "now"),
        ("--tracker ring --vcpus 2", "hybrid"),
        ("--tracker pagemap --gap", "hybrid"),
        ("--tracker pagemap", "now"),
        ("--guest process --vcpus 2", "hybrid"),
        ("--guest process", "now"),
        ("--tracker log --prepare", "hybrid"),
    ] {
        eprintln!("{kind} {when}");
        let (mut here, mut there) = pair(&mut stage, &format!("{BUSY} {kind}"));
        let answer = stage.migrate("web1", &["--postcopy", when]);
        assert_eq!(answer.code, 0, "{kind} {when}: {}", answer.text);
        assert_whole(answer.last().unwrap(), &mut here, &mut there);
    }
}

/// The destination's daemon is late with mapping memory that its VMM has taken: what it maps must not come into
/// being again, as zeros, after it was dropped as missing.
#[test]
fn memory_that_is_still_being_mapped_is_dropped_for_good() {
    let test = "memory_that_is_still_being_mapped_is_dropped_for_good";
    let port_rate = Some(Rate::from_bits_per_second(1_000_000_000));
    let lab = LabOptions { ports: 1, port_rate, ..LabOptions::default() };
    let environment = vec![("MEMLANE_DEBUG_MAP_AHEAD_MS".to_owned(), "10".to_owned())];
    let options = RigOptions { lab, tables: LIMITS.into(), environment, ..RigOptions::default() };
    let Some(mut stage) = Stage::with(test, Requirement::LAB_WITH_KVM, options) else { return };
    let guest = "--ram 2GiB --working-set 512MiB --flat-out --fill zero=60,random=40 --prepare";
    let (mut here, mut there) = pair(&mut stage, guest);
    let answer = stage.migrate("web1", &["--postcopy", "now"]);
    assert_eq!(answer.code, 0, "{}", answer.text);
    assert_whole(answer.last().unwrap(), &mut here, &mut there);
}

#[test]
fn huge_pages_are_fetched_whole() {
    let test = "huge_pages_are_fetched_whole";
    let Some(mut stage) = Stage::new(test, LabOptions { ports: 2, ..LabOptions::default() }) else { return };
    let _pages = match HugePages::reserve(64) {
        Ok(pages) => pages,
        Err(error) => return say_skipped(test, &format!("{error:#}")),
    };
    for (tracker, when) in [("log", "now"), ("log", "hybrid"), ("pagemap", "hybrid")] {
        let guest = format!("{BUSY} --backing huge --tracker {tracker}");
        let (mut here, mut there) = pair(&mut stage, &guest);
        let answer = stage.migrate("web1", &["--postcopy", when]);
        assert_eq!(answer.code, 0, "{tracker} {when}: {}", answer.text);
        assert_whole(answer.last().unwrap(), &mut here, &mut there);
    }
}

#[test]
fn a_guest_that_outruns_the_ports_is_finished_by_postcopy() {
    let test = "a_guest_that_outruns_the_ports_is_finished_by_postcopy";
    let Some(mut stage) = Stage::new(test, slow_ports(2)) else { return };
    let (mut here, mut there) = pair(&mut stage, BUSY);
    let order = stage.begin("web1", &["--converge", "postcopy", "--downtime-limit", "2s"]);
    let seen = wait_for_fetching(&stage);
    assert!(seen.decision.is_some_and(|decision| decision.contains("MB/s")), "{:?}", seen.reason);
    let answer = order.expect(0, &[]);
    assert_whole(answer.last().unwrap(), &mut here, &mut there);
}

#[test]
fn every_port_is_lost_for_a_while() {
    let Some(mut stage) = Stage::new("every_port_is_lost_for_a_while", slow_ports(2)) else { return };
    let (mut here, mut there) = pair(&mut stage, BUSY);
    let order = stage.begin("web1", &["--postcopy", "now", "--downtime-limit", "10s"]);
    wait_for_fetching(&stage);
    for port in [0, 1] {
        stage.rig.lab().host(HostId::A).port_down(port).unwrap();
    }
    for id in [HostId::A, HostId::B] {
        stage.wait_until(id, "web1", "word of what is waited for", |migration| {
            migration.postcopy.as_ref().is_some_and(|postcopy| postcopy.waits_for.is_some())
        });
    }
    for id in [HostId::A, HostId::B] {
        let status = stage.rig.ctl_command(id, &["status"]).output().unwrap();
        let status = String::from_utf8(status.stdout).unwrap();
        assert!(status.contains("missing; waits for"), "{status}");
        assert!(status.contains("web1 is lost if its VMM at host-b ends"), "{status}");
    }
    std::thread::sleep(Duration::from_secs(10));
    for port in [0, 1] {
        stage.rig.lab().host(HostId::A).port_up(port).unwrap();
    }
    hurry(&stage, 2);
    let answer = order.expect(0, &[]);
    assert_whole(answer.last().unwrap(), &mut here, &mut there);
}

#[test]
fn each_port_is_lost_in_turn() {
    let Some(mut stage) = Stage::new("each_port_is_lost_in_turn", slow_ports(2)) else { return };
    let (mut here, mut there) = pair(&mut stage, BUSY);
    let order = stage.begin("web1", &["--postcopy", "now", "--downtime-limit", "10s"]);
    wait_for_fetching(&stage);
    for port in [0, 1] {
        let host = stage.rig.lab().host(HostId::A);
        host.port_down(port).unwrap();
        let streamed = |migration: &Migration| migration.postcopy.clone().map_or(0, |p| p.pages_streamed);
        let before = streamed(&stage.wait_until(HostId::B, "web1", "progress", |_| true));
        stage.wait_until(HostId::B, "web1", "pages by the other port", |migration| {
            streamed(migration) > before + 100 || migration.outcome.is_some()
        });
        host.port_up(port).unwrap();
    }
    hurry(&stage, 2);
    let answer = order.expect(0, &[]);
    assert_whole(answer.last().unwrap(), &mut here, &mut there);
}

#[test]
fn the_source_daemon_is_killed_and_comes_back() {
    let test = "the_source_daemon_is_killed_and_comes_back";
    let Some(mut stage) = Stage::new(test, slow_ports(1)) else { return };
    let (mut here, mut there) = pair(&mut stage, BUSY);
    let order = stage.begin("web1", &["--postcopy", "now", "--downtime-limit", "10s"]);
    wait_for_fetching(&stage);
    stage.rig.stop_daemon(HostId::A).unwrap();
    order.expect(6, &["memlaned"]);
    stage.wait_until(HostId::B, "web1", "word of what is waited for", |migration| {
        migration.postcopy.as_ref().is_some_and(|postcopy| postcopy.waits_for.is_some())
    });
    stage.rig.start_daemon(HostId::A).unwrap();
    wait_for_fetching(&stage);
    hurry(&stage, 1);
    stage.wait_for_end("web1");
    let ended = stage.wait_until(HostId::B, "web1", "the end", |migration| migration.outcome.is_some());
    assert_whole(&serde_json::to_value(ended).unwrap(), &mut here, &mut there);
}

#[test]
fn the_destination_vmm_is_killed_and_the_guest_is_lost() {
    let test = "the_destination_vmm_is_killed_and_the_guest_is_lost";
    let Some(mut stage) = Stage::new(test, slow_ports(1)) else { return };
    let (mut here, mut there) = pair(&mut stage, BUSY);
    let order = stage.begin("web1", &["--postcopy", "now", "--downtime-limit", "10s"]);
    wait_for_fetching(&stage);
    there.process().kill().unwrap();
    let answer = order.expect(7, &["lost"]);
    assert_eq!(answer.last().unwrap()["outcome"], "lost", "{}", answer.text);
    assert_eq!(answer.last().unwrap()["guest_runs_at"], serde_json::Value::Null, "{}", answer.text);
    wait_for_exit(here.process());
}

/// Only that daemon knew which pages are missing, and the next one finds that out. The guest waits meanwhile.
#[test]
fn the_destination_daemon_is_killed_and_fetches_on() {
    let test = "the_destination_daemon_is_killed_and_fetches_on";
    let Some(mut stage) = Stage::new(test, slow_ports(1)) else { return };
    for (kind, when) in
        [("--tracker log", "now"), ("--tracker pagemap --gap", "now"), ("--guest process --vcpus 2", "now")]
    {
        eprintln!("{kind} {when}");
        let (mut here, mut there) = pair(&mut stage, &format!("{BUSY} {kind}"));
        let order = stage.begin("web1", &["--postcopy", when, "--downtime-limit", "10s"]);
        wait_for_fetching(&stage);
        for _ in 0..2 {
            stage.rig.stop_daemon(HostId::B).unwrap();
            stage.wait_until(HostId::A, "web1", "word of what is waited for", |migration| {
                migration.postcopy.as_ref().is_some_and(|postcopy| postcopy.waits_for.is_some())
            });
            stage.rig.start_daemon(HostId::B).unwrap();
            stage.wait_for_log(HostId::B, "going on to fetch");
            stage.wait_until(HostId::A, "web1", "post-copy again", |migration| {
                migration.postcopy.as_ref().is_some_and(|postcopy| postcopy.waits_for.is_none())
            });
        }
        hurry(&stage, 1);
        let answer = order.expect(0, &[]);
        assert_whole(answer.last().unwrap(), &mut here, &mut there);
        stage.rig.lab().set_port_rate(0, Some(Rate::from_bits_per_second(SLOW))).unwrap();
        there.quit().unwrap();
    }
}

#[test]
fn huge_pages_are_fetched_on_by_another_daemon() {
    let test = "huge_pages_are_fetched_on_by_another_daemon";
    let Some(mut stage) = Stage::new(test, slow_ports(1)) else { return };
    let _pages = match HugePages::reserve(64) {
        Ok(pages) => pages,
        Err(error) => return say_skipped(test, &format!("{error:#}")),
    };
    let (mut here, mut there) = pair(&mut stage, &format!("{BUSY} --backing huge --tracker log"));
    let order = stage.begin("web1", &["--postcopy", "now", "--downtime-limit", "10s"]);
    wait_for_fetching(&stage);
    stage.rig.stop_daemon(HostId::B).unwrap();
    stage.rig.start_daemon(HostId::B).unwrap();
    stage.wait_for_log(HostId::B, "going on to fetch");
    hurry(&stage, 1);
    let answer = order.expect(0, &[]);
    assert_whole(answer.last().unwrap(), &mut here, &mut there);
}

/// With both daemons gone, everything is still there: in two VMMs, and in two journals.
#[test]
fn both_daemons_are_killed_and_fetch_on() {
    let test = "both_daemons_are_killed_and_fetch_on";
    let Some(mut stage) = Stage::new(test, slow_ports(1)) else { return };
    let (mut here, mut there) = pair(&mut stage, BUSY);
    let order = stage.begin("web1", &["--postcopy", "now", "--downtime-limit", "10s"]);
    wait_for_fetching(&stage);
    for host in [HostId::B, HostId::A] {
        stage.rig.stop_daemon(host).unwrap();
    }
    order.expect(6, &["memlaned"]);
    for host in [HostId::A, HostId::B] {
        stage.rig.start_daemon(host).unwrap();
    }
    hurry(&stage, 1);
    stage.wait_for_end("web1");
    let ended = stage.wait_until(HostId::B, "web1", "the end", |migration| migration.outcome.is_some());
    assert_whole(&serde_json::to_value(ended).unwrap(), &mut here, &mut there);
}

#[test]
fn what_never_comes_is_abandoned_and_fails_loudly() {
    let test = "what_never_comes_is_abandoned_and_fails_loudly";
    let Some(mut stage) = Stage::new(test, slow_ports(1)) else { return };
    let (mut here, mut there) = pair(&mut stage, BUSY);
    let order = stage.begin("web1", &["--postcopy", "now", "--downtime-limit", "10s"]);
    wait_for_fetching(&stage);
    stage.rig.stop_daemon(HostId::A).unwrap();
    order.expect(6, &["memlaned"]);
    let answer = stage.rig.ctl(HostId::B, &["abandon", "web1"]).unwrap();
    assert_eq!(answer.code, 0, "{}", answer.text);
    let ended = stage.wait_until(HostId::B, "web1", "the end", |migration| migration.outcome.is_some());
    assert_eq!(ended.outcome.unwrap().as_str(), "lost", "{ended:?}");
    // The guest writes all over its memory, so that it soon comes to a page that is missing.
    wait_for("the guest to fail", LONG, || (!there.process().is_running()).then_some(())).unwrap();
    stage.rig.start_daemon(HostId::A).unwrap();
    wait_for_exit(here.process());
}

#[test]
fn what_a_stun_may_not_take_is_left_to_postcopy() {
    let test = "what_a_stun_may_not_take_is_left_to_postcopy";
    let Some(mut stage) = Stage::new(test, slow_ports(2)) else { return };
    let (mut here, mut there) = pair(&mut stage, BUSY);
    let answer = stage.migrate("web1", &["--converge", "stun", "--max-stun", "1", "--downtime-limit", "1s"]);
    assert_eq!(answer.code, 4, "{}", answer.text);
    for remedy in ["--max-stun", "--converge auto"] {
        assert!(answer.text.contains(remedy), "{}", answer.text);
    }
    stage.assert_runs_on("web1", &mut here);
    stage.wait_for_standing(HostId::B, "web1", "incoming");

    let order = stage.begin("web1", &["--converge", "auto", "--max-stun", "1", "--downtime-limit", "1s"]);
    wait_for_fetching(&stage);
    hurry(&stage, 2);
    let answer = order.expect(0, &[]);
    assert_whole(answer.last().unwrap(), &mut here, &mut there);
}
