use std::time::Duration;

use serde_json::json;

use super::*;

fn told(outcome: &str, at: &str) -> Option<Value> {
    Some(json!({ "id": "1", "outcome": outcome, "guest_runs_at": at, "reason": "so it is" }))
}

/// A move that went well.
fn moved() -> MoveFacts {
    let daemon = |standing: Option<&str>| DaemonFacts {
        migration: told("completed", "host-b"),
        standing: standing.map(str::to_owned),
    };
    MoveFacts {
        hosts: ["host-a".into(), "host-b".into()],
        runs: [false, true],
        daemons: [daemon(None), daemon(Some("running"))],
        exit: Some(0),
        must_succeed: true,
        orders: 1,
        ..MoveFacts::default()
    }
}

/// A move that failed, and left the guest where it was.
fn failed(code: i32, outcome: &str) -> MoveFacts {
    let daemon = |standing: &str| DaemonFacts {
        migration: told(outcome, "host-a"),
        standing: Some(standing.to_owned()),
    };
    MoveFacts {
        runs: [true, false],
        daemons: [daemon("running"), daemon("incoming")],
        exit: Some(code),
        told: "why".into(),
        ..moved()
    }
}

fn came(facts: MoveFacts, trouble: Trouble) -> MoveFacts {
    MoveFacts { troubles: vec![MadeTrouble { trouble, under_way: true }], ..facts }
}

const A_WHILE: Duration = Duration::from_secs(1);

#[test]
fn what_goes_well_has_no_fault() {
    assert_eq!(moved().judge(), Vec::<String>::new());
    assert_eq!(moved().fate(), MoveFate::There);
}

#[test]
fn a_failure_needs_a_cause() {
    assert_eq!(failed(4, "failed").judge().len(), 1);
    let port = Trouble::PortSilent { port: 0, away: A_WHILE };
    assert_eq!(came(failed(4, "failed"), port).judge().len(), 1, "one port is left");
    let killed = |side| Trouble::DaemonKilled { side, away: A_WHILE };
    assert!(came(failed(4, "failed"), killed(Side::Destination)).judge().is_empty());
    assert_eq!(came(failed(6, "failed"), killed(Side::Destination)).judge().len(), 1);
    assert!(came(failed(6, "failed"), killed(Side::Source)).judge().is_empty());
    assert!(MoveFacts { must_succeed: false, ..failed(4, "failed") }.judge().is_empty());
    assert_eq!(failed(5, "cancelled").judge().len(), 1);
    assert!(came(failed(5, "cancelled"), Trouble::Cancel).judge().is_empty());
}

#[test]
fn a_guest_runs_on_one_host_and_its_daemon_says_so() {
    assert!(!MoveFacts { runs: [true, true], ..moved() }.judge().is_empty());
    assert!(!MoveFacts { runs: [false, false], ..moved() }.judge().is_empty());
    let mut silent = moved();
    silent.daemons[1].standing = None;
    assert_eq!(silent.judge().len(), 1);
}

#[test]
fn what_is_said_must_be_so() {
    assert!(!MoveFacts { exit: Some(4), told: "why".into(), ..moved() }.judge().is_empty());
    assert!(!MoveFacts { exit: Some(0), ..failed(0, "failed") }.judge().is_empty());
    assert!(!MoveFacts { exit: None, ..moved() }.judge().is_empty());
    assert!(!MoveFacts { exit: Some(7), ..moved() }.judge().is_empty());
    let mut lie = moved();
    lie.daemons[0].migration = told("failed", "host-a");
    assert!(lie.judge().iter().any(|fault| fault.contains("do not agree")), "{:?}", lie.judge());
    assert!(
        !MoveFacts { told: String::new(), ..came(failed(5, "cancelled"), Trouble::Cancel) }
            .judge()
            .is_empty()
    );
}

#[test]
fn the_answer_to_an_operator_fits() {
    let second = Trouble::SecondOrder { side: Side::Source };
    let asked = |exit: Option<i32>, told: &str| {
        let asked = vec![(second, exit, told.to_owned())];
        let orders = orders_taken(&asked);
        MoveFacts { asked, orders, ..came(moved(), second) }
    };
    assert!(asked(Some(3), "it is moving").judge().is_empty());
    assert_eq!(asked(Some(3), "").judge().len(), 1);
    assert_eq!(asked(None, "").judge().len(), 1);
    assert_eq!(asked(Some(6), "gone").judge().len(), 1);
    assert_eq!((asked(Some(0), "").orders, asked(Some(3), "busy").orders), (2, 1));
}

#[test]
fn migrations_of_before_are_left_out() {
    let facts = moved().daemons[0].clone();
    let known = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect();
    assert!(without_known(facts.clone(), &known(&["1"])).migration.is_none());
    assert!(without_known(facts, &known(&["2"])).migration.is_some());
}
