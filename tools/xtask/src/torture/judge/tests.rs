use std::time::Duration;

use serde_json::json;

use super::*;

const SOURCE: &str = "host-a";
const DESTINATION: &str = "host-b";
const MS: Time = 1_000_000;

/// A pre-copy migration that went well.
fn completed() -> RoundFacts {
    let migration = json!({ "outcome": "completed", "guest_runs_at": DESTINATION });
    let here = [(0, NotedState::Running), (10 * MS, NotedState::Paused), (30 * MS, NotedState::Discarded)];
    let there = [(0, NotedState::Incoming), (15 * MS, NotedState::Loaded), (20 * MS, NotedState::Running)];
    RoundFacts {
        hosts: [SOURCE.to_owned(), DESTINATION.to_owned()],
        vmms: [
            VmmFacts { history: GuestHistory::of(&here), ended: true, ..VmmFacts::default() },
            VmmFacts { history: GuestHistory::of(&there), runs: true, ..VmmFacts::default() },
        ],
        daemons: [
            DaemonFacts { migration: Some(migration.clone()), standing: None },
            DaemonFacts { migration: Some(migration), standing: Some("running".into()) },
        ],
        committed: Some(18 * MS),
        told_to_run: Some(19 * MS),
        whole: Some(21 * MS),
        exit: Some(0),
        ..RoundFacts::default()
    }
}

/// One that failed before anything was handed over.
fn failed() -> RoundFacts {
    let migration = json!({ "outcome": "failed", "guest_runs_at": SOURCE });
    let here = [(0, NotedState::Running), (10 * MS, NotedState::Paused), (30 * MS, NotedState::Running)];
    RoundFacts {
        vmms: [
            VmmFacts { history: GuestHistory::of(&here), runs: true, ..VmmFacts::default() },
            VmmFacts { history: GuestHistory::of(&[(0, NotedState::Incoming)]), ..VmmFacts::default() },
        ],
        daemons: [
            DaemonFacts { migration: Some(migration), standing: Some("running".into()) },
            DaemonFacts { migration: None, standing: Some("incoming".into()) },
        ],
        committed: None,
        told_to_run: None,
        whole: None,
        exit: Some(4),
        ..completed()
    }
}

/// One after which the guest runs nowhere, and everybody says so.
fn lost(mut facts: RoundFacts) -> RoundFacts {
    for vmm in &mut facts.vmms {
        (vmm.ended, vmm.runs) = (true, false);
    }
    for daemon in &mut facts.daemons {
        daemon.standing = None;
        daemon.migration = Some(json!({ "outcome": "lost", "guest_runs_at": null }));
    }
    facts.exit = Some(7);
    facts
}

fn killed(victim: Victim, at: Time) -> Struck {
    Struck { victim, blow: Blow::Kill(Duration::ZERO), phase: RoundPhase::Copying, at, done: at + MS / 2 }
}

fn faults(facts: &RoundFacts) -> String {
    facts.judge().faults.join("; ")
}

#[test]
fn what_goes_well_is_no_fault() {
    assert_eq!((completed().judge().fate, faults(&completed())), (Fate::There, String::new()));
    assert_eq!((failed().judge().fate, faults(&failed())), (Fate::Here, String::new()));
}

#[test]
fn two_owners_are_found_even_where_one_has_gone() {
    let mut facts = completed();
    let back = [(0, NotedState::Running), (10 * MS, NotedState::Paused), (40 * MS, NotedState::Running)];
    facts.vmms[0].history = GuestHistory::of(&back);
    facts.strikes.push(killed(Victim::SourceVmm, 50 * MS));
    assert!(faults(&facts).contains("two owners"), "{}", faults(&facts));
    // It stood still when it was killed.
    facts.vmms[0].history = GuestHistory::of(&back[..2]);
    assert_eq!(faults(&facts), "");
    // Paused too late.
    facts.vmms[0].history = GuestHistory::of(&[(0, NotedState::Running), (25 * MS, NotedState::Paused)]);
    assert!(faults(&facts).contains("for 5000 µs more"), "{}", faults(&facts));

    let mut both = completed();
    both.vmms[0] = failed().vmms[0].clone();
    both.daemons[0].standing = Some("running".into());
    assert_eq!(both.judge().fate, Fate::Wrong);
}

#[test]
fn a_guest_may_be_lost_with_its_vmm() {
    let mut facts = lost(failed());
    assert!(faults(&facts).contains("runs nowhere"), "{}", faults(&facts));
    facts.strikes.push(killed(Victim::SourceVmm, 12 * MS));
    assert_eq!(faults(&facts), "");
    // The destination has all that it needs.
    facts.committed = Some(11 * MS);
    assert_eq!(facts.judge().fate, Fate::Wrong);

    let mut facts = lost(completed());
    assert_eq!(facts.judge().fate, Fate::Wrong);
    facts.strikes.push(killed(Victim::DestinationVmm, 19 * MS));
    assert_eq!(faults(&facts), "");
    // It was told to run before it had ended, and may have run; or it was told too late.
    facts.vmms[1].history = GuestHistory::of(&[(0, NotedState::Incoming), (15 * MS, NotedState::Loaded)]);
    assert_eq!(faults(&facts), "");
    let late = RoundFacts { told_to_run: Some(20 * MS), ..facts.clone() };
    assert_eq!(late.judge().fate, Fate::Wrong);
    facts.seen_gone = Some(18 * MS);
    assert_eq!(facts.judge().fate, Fate::Wrong);

    // It never ran there, and was not told to.
    let mut facts = lost(failed());
    facts.committed = Some(11 * MS);
    facts.strikes.push(killed(Victim::DestinationVmm, 12 * MS));
    assert_eq!(facts.judge().fate, Fate::Wrong);
}

#[test]
fn postcopy_may_lose_a_guest_with_all_of_its_source() {
    // One daemon alone, or both, only cost time.
    let mut facts = RoundFacts { postcopy: true, whole: None, ..lost(completed()) };
    for daemon in [Victim::DestinationDaemon, Victim::SourceDaemon] {
        facts.strikes.push(killed(daemon, 100 * MS));
        assert_eq!(facts.judge().fate, Fate::Wrong);
    }
    facts.strikes.push(killed(Victim::SourceVmm, 200 * MS));
    assert_eq!(faults(&facts), "");
    // It was whole before, or the source's daemon still had its memory.
    assert_eq!(RoundFacts { whole: Some(20 * MS), ..facts.clone() }.judge().fate, Fate::Wrong);
    facts.strikes.remove(1);
    assert_eq!(facts.judge().fate, Fate::Wrong);
}

#[test]
fn words_that_are_not_so_are_faults() {
    let mut facts = completed();
    facts.exit = Some(4);
    assert!(faults(&facts).contains("exit code 4, which is not so"), "{}", faults(&facts));
    facts.exit = Some(6);
    assert!(faults(&facts).contains("exit code 6"), "{}", faults(&facts));
    facts.strikes.push(killed(Victim::SourceDaemon, 25 * MS));
    assert_eq!(faults(&facts), "");

    facts.daemons[0].migration = Some(json!({ "outcome": "failed", "guest_runs_at": SOURCE }));
    let found = faults(&facts);
    assert!(found.contains("which is not so") && found.contains("where it is not"), "{found}");

    let mut facts = failed();
    facts.daemons[0].migration = Some(json!({ "outcome": "failed", "guest_runs_at": null }));
    assert!(faults(&facts).contains("though it runs at its own"), "{}", faults(&facts));
    let mut facts = failed();
    facts.daemons[0].standing = Some("relinquished".into());
    assert!(faults(&facts).contains("says that it is relinquished"), "{}", faults(&facts));
}

#[test]
fn what_is_left_over_or_damaged_is_a_fault() {
    let mut facts = failed();
    facts.vmms[1].history = GuestHistory::of(&[(0, NotedState::Incoming), (15 * MS, NotedState::Loaded)]);
    assert!(faults(&facts).contains("holds a guest that does not run"), "{}", faults(&facts));
    let mut facts = failed();
    facts.vmms[0].damage = Some("a page of zeros".into());
    facts.unsettled = Some("the source waits".into());
    let found = faults(&facts);
    assert!(found.contains("a page of zeros") && found.contains("the source waits"), "{found}");
}

#[test]
fn phases_follow_from_histories() {
    let history = |standings: &[NotedState]| {
        GuestHistory::of(&standings.iter().map(|standing| (0, *standing)).collect::<Vec<_>>())
    };
    use NotedState::{Discarded, Incoming, Loaded, Paused, Running};
    let phase = |here, there, postcopy| RoundPhase::of(&history(&[here]), &history(&[there]), postcopy);
    assert_eq!(phase(Running, Incoming, false), RoundPhase::Copying);
    assert_eq!(phase(Paused, Incoming, false), RoundPhase::Paused);
    assert_eq!(phase(Paused, Loaded, false), RoundPhase::HandingOver);
    assert_eq!(phase(Paused, Running, false), RoundPhase::Arrived);
    assert_eq!(phase(Paused, Running, true), RoundPhase::Fetching);
    assert_eq!(phase(Discarded, Running, true), RoundPhase::Over);
}
