//! The oracle: whatever the tracker, the ports, the vCPUs and the pages, the guest that
//! arrives has the memory that an unmigrated one would have.

use memlane_lab::{HostId, HugePages, LabOptions, Programs, Requirement, Rig, RigOptions, skip};

const RAM: &str = "64MiB";
/// 2 MiB pages for two guests of [`RAM`].
const HUGE_PAGES: u64 = 64;
/// Generous: time is judged by benchmarks, not here.
const LIMIT: &str = "20s";
/// Longest wait for a VMM whose guest has left.
const ENDING: std::time::Duration = std::time::Duration::from_secs(60);

fn arguments(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Moves a guest, lets it run on, and compares its memory with the model.
fn move_and_compare(rig: &mut Rig, guest: &str) {
    let source = rig.start_vmm(HostId::A, "web1", &arguments(guest)).unwrap();
    let mut there = rig.start_vmm(HostId::B, "web1", &arguments(&format!("{guest} --incoming"))).unwrap();
    let answer =
        rig.ctl(HostId::A, &["migrate", "web1", "host-b", "--downtime-limit", LIMIT, "--verify"]).unwrap();
    assert_eq!(answer.code, 0, "{guest}: {}", answer.text);
    let migration = answer.last().unwrap();
    assert_eq!(migration["digest_verified"], true, "{guest}: {migration}");
    let arrived: u64 = steps(&there.stats().unwrap());
    std::thread::sleep(std::time::Duration::from_millis(100));
    let report = there.verify().unwrap();
    assert_eq!(report["equal"], true, "{guest}: {report}");
    assert!(report["steps"].as_u64().unwrap() >= arrived, "{guest}: the guest lost steps");
    drop(source);
    there.quit().unwrap();
    // The logs of both hosts can be joined by the migration's identity.
    let id = migration["id"].as_str().expect("each migration has an identity");
    for (host, role) in [(HostId::A, "Source"), (HostId::B, "Destination")] {
        let log = std::fs::read_to_string(rig.daemon(host).log()).unwrap();
        let is_of_it = |line: &&str| line.contains(&format!("id={id} ")) && line.contains(role);
        assert!(log.lines().any(|line| is_of_it(&line)), "{guest}: nothing of {id} on {host:?}:\n{log}");
    }
}

fn steps(stats: &serde_json::Value) -> u64 {
    stats["steps"].as_array().unwrap().iter().map(|steps| steps.as_u64().unwrap()).sum()
}

fn rig(ports: usize) -> Rig {
    let programs = Programs::build(false).unwrap();
    let lab = LabOptions { ports, bridge: false, ..LabOptions::default() };
    Rig::new(&programs, RigOptions { lab, ..RigOptions::default() }).unwrap()
}

#[test]
fn every_tracker_on_any_ports_vcpus_and_pages() {
    if skip("every_tracker_on_any_ports_vcpus_and_pages", Requirement::LAB_WITH_KVM) {
        return;
    }
    let huge = HugePages::reserve(HUGE_PAGES);
    if let Err(error) = &huge {
        memlane_lab::say_skipped("every tracker on 2 MiB pages", &error.to_string());
    }
    let backings: &[&str] = if huge.is_ok() { &["memfd", "huge"] } else { &["memfd"] };
    for ports in [1, 2, 4] {
        let mut rig = rig(ports);
        for (tracker, vcpus, backing) in combinations(backings) {
            let gap = if vcpus == 2 { "--gap" } else { "" };
            if let (Ok(huge), "huge") = (&huge, backing) {
                huge.wait_until_free().unwrap();
            }
            move_and_compare(
                &mut rig,
                &format!(
                    "--ram {RAM} --working-set 8MiB --rate 20000 --tracker {tracker} --vcpus {vcpus} \
                     --backing {backing} {gap}"
                ),
            );
        }
    }
}

fn combinations<'a>(backings: &'a [&str]) -> impl Iterator<Item = (&'static str, u16, &'a str)> {
    ["log", "ring", "pagemap"].into_iter().flat_map(move |tracker| {
        [1, 2, 4]
            .into_iter()
            .flat_map(move |vcpus| backings.iter().map(move |backing| (tracker, vcpus, *backing)))
    })
}

#[test]
fn a_process_without_kvm() {
    if skip("a_process_without_kvm", Requirement::LAB) {
        return;
    }
    let mut rig = rig(2);
    for pattern in ["uniform", "sequential", "hot-cold"] {
        let guest = format!(
            "--guest process --ram {RAM} --working-set 8MiB --rate 20000 --vcpus 2 --pattern {pattern}"
        );
        move_and_compare(&mut rig, &guest);
    }
}

/// One guest goes there and back, writing as fast as it can all the time.
#[test]
fn round_trips_under_a_flat_out_writer() {
    if skip("round_trips_under_a_flat_out_writer", Requirement::LAB_WITH_KVM) {
        return;
    }
    let mut rig = rig(2);
    let guest = format!("--ram {RAM} --working-set 2MiB --flat-out");
    let mut at = rig.start_vmm(HostId::A, "web1", &arguments(&guest)).unwrap();
    for leg in 0..6 {
        let (from, to, name) =
            if leg % 2 == 0 { (HostId::A, HostId::B, "host-b") } else { (HostId::B, HostId::A, "host-a") };
        let mut next = rig.start_vmm(to, "web1", &arguments(&format!("{guest} --incoming"))).unwrap();
        let answer = rig.ctl(from, &["migrate", "web1", name, "--downtime-limit", LIMIT]).unwrap();
        assert_eq!(answer.code, 0, "leg {leg}: {}", answer.text);
        let report = next.verify().unwrap();
        assert_eq!(report["equal"], true, "leg {leg}: {report}");
        assert!(!at.process().is_running() || at.process().wait_timeout(ENDING).unwrap().is_some());
        at = next;
    }
}
