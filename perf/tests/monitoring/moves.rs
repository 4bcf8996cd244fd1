//! Guests move between two hosts under the eyes of a Prometheus: every panel has data then, and no alert fires before
//! something is wrong. Root and Prometheus are needed.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, SystemTime};

use memlane_lab::{HostId, LabOptions, Programs, Rate, Requirement, Rig, RigOptions, skip, wait_for};
use serde_json::Value;

use crate::dashboards::queries;
use crate::fed;
use crate::prometheus::Watched;

/// The longest wait for Prometheus to have seen something, which a daemon may look at four times a minute only.
const SEEN: Duration = Duration::from_secs(120);
/// Panels that may be empty here, and why.
const MAY_BE_EMPTY: &[(&str, &str)] = &[("migration.json: Block I/O held up", "no guest here has a disk")];
/// What is wrong with the hosts of a lab from the start: their certificates are valid for a day.
const OF_LAB: [&str; 1] = ["MemlaneCertificateEnds"];
/// Alerts about how long something takes, which are right on a busy machine.
const OF_TIMES: &[&str] = &["MemlaneJournalSlow", "MemlaneForecastOff", "MemlaneDowntimeLimitMissed"];
/// What guests are, and how they are ordered to move.
const MOVES: [(&str, &str); 3] = [
    ("--ram 64MiB", "--downtime-limit 2s"),
    ("--ram 64MiB --working-set 48MiB --flat-out", "--postcopy now --downtime-limit 10s"),
    (
        "--ram 128MiB --working-set 96MiB --flat-out --vcpus 2",
        "--converge stun --max-stun 99 --downtime-limit 2s",
    ),
];

#[test]
fn panels_have_data_and_alerts_are_silent_until_something_is_wrong() {
    let test = "panels_have_data_and_alerts_are_silent_until_something_is_wrong";
    if skip(test, &[Requirement::LAB, &[Requirement::Prometheus]].concat()) {
        return;
    }
    let port_rate = Some(Rate::from_bits_per_second(200_000_000));
    let lab = LabOptions { ports: 2, port_rate, ..LabOptions::default() };
    let programs = Programs::build(false).expect("programs");
    let rig = Rig::new(&programs, RigOptions { lab, ..RigOptions::default() }).expect("two hosts");
    let mut watched = Watched::new(rig);
    watched.wait_until("count(memlane_peer_reachable == 1) == 2", SEEN);
    assert_eq!(alarmed(&watched), BTreeSet::from(OF_LAB.map(str::to_owned)));

    let since = now();
    MOVES.iter().for_each(|(guest, order)| move_guest(&mut watched.rig, guest, order));
    let ended = 2 * MOVES.len();
    let all = format!("sum(memlane_migrations_total{{outcome=\"completed\"}}) == {ended}");
    watched.wait_until(&all, SEEN);
    // Of the last guest, which was slowed.
    watched.wait_until("sum(memlane_not_converging_total{remedy=\"stun\"}) > 0", SEEN);
    assert_every_panel_has_data(&watched, since);
    for id in [HostId::A, HostId::B] {
        assert_eq!(complaints(&watched.rig.metrics(id).expect("metrics")), "", "about the metrics of {id:?}");
    }
    assert_eq!(alarmed(&watched), BTreeSet::from(OF_LAB.map(str::to_owned)));

    watched.rig.lab().host(HostId::A).port_down(0).expect("a port");
    watched.rig.stop_daemon(HostId::B).expect("a daemon");
    let wrong = ["MemlaneDaemonGone", "MemlaneNoPeers", "MemlanePortDown"].into_iter().chain(OF_LAB);
    let wrong: BTreeSet<String> = wrong.map(str::to_owned).collect();
    let found = wait_for("the alerts", SEEN, || (alarmed(&watched) == wrong).then_some(()));
    assert!(found.is_ok(), "{:?} are alarmed, and not {wrong:?}", alarmed(&watched));
}

/// Moves a guest from host A to host B, where it ends.
fn move_guest(rig: &mut Rig, guest: &str, order: &str) {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let guest = format!("{guest} --guest process");
    let _source = rig.start_vmm(HostId::A, "web1", &words(&guest)).expect("a guest");
    let there = rig.start_vmm(HostId::B, "web1", &words(&format!("{guest} --incoming"))).expect("a receiver");
    let arguments =
        [&["migrate", "web1", "host-b"], &order.split_whitespace().collect::<Vec<_>>()[..]].concat();
    let answer = rig.ctl(HostId::A, &arguments).expect("an order");
    assert_eq!(answer.code, 0, "{}", answer.text);
    there.quit().expect("it ends");
}

/// Asserts that each query of each panel gave a number since then, at some time and for some host.
fn assert_every_panel_has_data(watched: &Watched, since: Duration) {
    let mut empty: Vec<_> = queries("10s");
    empty.retain(|query| {
        let series = watched.query_range(&query.expression, since, now());
        !series.iter().flat_map(samples).any(f64::is_finite)
    });
    let unexpected: Vec<String> = empty
        .iter()
        .filter(|query| MAY_BE_EMPTY.iter().all(|(panel, _)| *panel != query.panel))
        .map(|query| format!("{}: {}", query.panel, query.expression))
        .collect();
    assert_eq!(unexpected.join("\n"), "", "these have no data");
    for (panel, reason) in MAY_BE_EMPTY {
        let is_empty = empty.iter().any(|query| query.panel == *panel);
        assert!(is_empty, "{panel} has data although {reason}: take it off the list");
    }
}

/// Returns the values of a series.
fn samples(series: &Value) -> impl Iterator<Item = f64> {
    let samples = series["values"].as_array().expect("samples");
    samples.iter().map(|sample| sample[1].as_str().expect("a value").parse().expect("a number"))
}

/// Returns the alerts whose conditions hold now, even if not for long enough yet.
fn alarmed(watched: &Watched) -> BTreeSet<String> {
    let rules = watched.rules();
    assert!(rules.len() > 10, "{rules:?}");
    let of_times = |name: &str| OF_TIMES.contains(&name);
    let holds = rules.iter().filter(|rule| !of_times(&rule.name) && !watched.query(&rule.query).is_empty());
    holds.map(|rule| rule.name.clone()).collect()
}

/// Returns what promtool has to say against these metrics.
fn complaints(metrics: &str) -> String {
    let checked = fed(Command::new("promtool").args(["check", "metrics"]), metrics).expect("promtool");
    let said = [checked.stdout, checked.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let said = said.concat();
    assert_eq!(checked.status.success(), said.is_empty(), "{said}");
    said
}

/// Returns the time since 1970.
fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time after 1970")
}
