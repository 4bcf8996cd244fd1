//! Walks every state that two hosts, their journals, their VMMs and the network between them
//! can reach during one handover, and checks in each that the guest has one owner.
//!
//! The network keeps, for each direction, the set of messages that have been sent: each may be
//! delivered any number of times, in any order, or never; and at any step all of them may
//! be lost. (To lose some and not others would add nothing: what can go wrong with few
//! messages on their way can go wrong with more, if those are not delivered; and what can
//! still end well with none can with some.) Daemons crash and come back, VMMs end, journals
//! refuse, the operator cancels, as often as the [`Budget`] allows, at any step.

mod model;

use model::world::{Budget, Fault, World};
use model::{Violation, check};

/// The trouble that runs may meet; more of one kind leaves less of another, for the time it takes.
const BUDGETS: [Budget; 3] = [
    Budget { crashes: 3, vmm: 0, journal: 0, cancel: true },
    Budget { crashes: 2, vmm: 1, journal: 1, cancel: true },
    Budget { crashes: 0, vmm: 2, journal: 1, cancel: true },
];

#[test]
fn never_two_owners_and_never_none_for_good() {
    for budget in BUDGETS {
        let explored =
            check(World::new(budget, Fault::None)).unwrap_or_else(|violation| panic!("{violation}"));
        println!("{budget:?}: {explored}");
        assert!(explored.ran_at_source > 0 && explored.ran_at_destination > 0);
    }
}

/// The checker is worth something only if it finds what is wrong with a daemon that does not
/// keep its part.
#[test]
fn a_daemon_that_cheats_is_caught() {
    use memlane_protocol::handover::Record;

    let crash = Budget { crashes: 1, vmm: 0, journal: 0, cancel: false };
    let calm = Budget { crashes: 0, ..crash };
    let crash_and_vmm = Budget { vmm: 1, ..crash };
    for (fault, budget, expected) in [
        // `Ready` is sent before the promise not to forget is durable.
        (Fault::NotDurable(Record::Prepared), crash, Violation::is_stuck as fn(&Violation) -> bool),
        // `Commit` is sent before the promise not to run is durable.
        (Fault::NotDurable(Record::Committed), crash, Violation::is_unsafe),
        (Fault::NotDurable(Record::Running), crash, Violation::is_stuck),
        (Fault::NotDurable(Record::Declined), crash_and_vmm, Violation::is_unsafe),
        (Fault::NotDurable(Record::Finished), crash, Violation::is_stuck),
        (Fault::NotDurable(Record::TakenBack), crash_and_vmm, Violation::is_stuck),
        (Fault::NotRelinquished, crash, Violation::is_unsafe),
        (Fault::ForgetBeforeDiscard, crash, Violation::is_unsafe),
        (Fault::ResumeOnPeerLost, calm, Violation::is_unsafe),
        (Fault::SentBeforePause, calm, Violation::is_unsafe),
        (Fault::GiveUpInDoubt, calm, Violation::is_stuck),
        (Fault::NeverRepeat, calm, Violation::is_stuck),
    ] {
        let violation = check(World::new(budget, fault)).expect_err(&format!("{fault:?} was not caught"));
        assert!(expected(&violation), "{fault:?} was caught as something else: {violation}");
    }
}
