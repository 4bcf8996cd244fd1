//! Walks every state that two hosts, their journals, their VMMs and the network between them
//! can reach during one handover, and checks in each that the guest has one owner, and in
//! post-copy that its memory stays at the source for as long as it is needed.
//!
//! The network keeps, for each direction, the set of messages that have been sent: each may be
//! delivered any number of times, in any order, or never; and at any step all of them may
//! be lost. (To lose some and not others would add nothing: what can go wrong with few
//! messages on their way can go wrong with more, if those are not delivered; and what can
//! still end well with none can with some.) Daemons crash and come back, VMMs end, journals
//! refuse, a restarted daemon does not know what is missing, the operator cancels or gives up,
//! as often as the [`Budget`] allows, at any step.

mod model;

use model::world::{Budget, Fault, World};
use model::{Explored, Violation, check};

/// The trouble that runs may meet; more of one kind leaves less of another, for the time it takes.
const BUDGETS: [Budget; 4] = [
    Budget { crashes: 3, vmm: 0, journal: 0, cancel: true, ..NOTHING },
    Budget { crashes: 1, vmm: 1, journal: 1, cancel: true, ..NOTHING },
    Budget { crashes: 2, vmm: 1, journal: 0, ..NOTHING },
    Budget { crashes: 0, vmm: 2, journal: 0, cancel: true, ..NOTHING },
];
const POSTCOPY_BUDGETS: [Budget; 5] = [
    Budget { crashes: 2, vmm: 0, journal: 0, ..POSTCOPY },
    Budget { crashes: 1, vmm: 1, journal: 0, ..POSTCOPY },
    Budget { crashes: 0, vmm: 1, journal: 1, ..POSTCOPY },
    Budget { crashes: 2, vmm: 0, journal: 0, hangs: true, ..POSTCOPY },
    Budget { crashes: 1, vmm: 1, journal: 0, hangs: true, ..POSTCOPY },
];

/// Damaged journals, hosts that burn, and operators who decide what nobody else can.
const DOUBT_BUDGETS: [Budget; 7] = [
    Budget { crashes: 1, damage: 1, vmm: 1, ..DOUBT },
    Budget { crashes: 1, damage: 1, discard: true, ..DOUBT },
    Budget { crashes: 1, burn: 1, discard: true, ..DOUBT },
    Budget { crashes: 1, damage: 1, postcopy: true, abandon: true, ..DOUBT },
    Budget { crashes: 1, damage: 1, postcopy: true, vmm: 1, ..DOUBT },
    Budget { crashes: 1, damage: 1, postcopy: true, journal: 1, ..DOUBT },
    Budget { crashes: 1, burn: 1, postcopy: true, abandon: true, ..DOUBT },
];

const DOUBT: Budget = Budget { resolve: true, ..NOTHING };
const NOTHING: Budget = Budget {
    crashes: 0,
    vmm: 0,
    journal: 0,
    cancel: false,
    postcopy: false,
    hangs: false,
    abandon: false,
    damage: 0,
    burn: 0,
    resolve: false,
    discard: false,
};
const POSTCOPY: Budget = Budget { postcopy: true, abandon: true, ..NOTHING };

#[test]
fn never_two_owners_and_never_none_for_good() {
    for budget in BUDGETS {
        explore(budget);
    }
}

#[test]
fn nothing_is_lost_in_postcopy_but_what_really_is() {
    for budget in POSTCOPY_BUDGETS {
        let explored = explore(budget);
        assert!(explored.ran_nowhere > 0, "guests can be lost");
    }
}

#[test]
fn damaged_journals_and_burnt_hosts_leave_at_worst_what_an_operator_can_resolve() {
    for budget in DOUBT_BUDGETS {
        explore(budget);
    }
}

fn explore(budget: Budget) -> Explored {
    let explored = check(World::new(budget, Fault::None)).unwrap_or_else(|violation| panic!("{violation}"));
    println!("{budget:?}: {explored}");
    assert!(explored.ran_at_source > 0 && explored.ran_at_destination > 0);
    explored
}

/// The checker is worth something only if it finds what is wrong with a daemon that does not
/// keep its part.
#[test]
fn a_daemon_that_cheats_is_caught() {
    use memlane_protocol::handover::Record;

    let calm = NOTHING;
    let crash = Budget { crashes: 1, ..NOTHING };
    let crash_and_vmm = Budget { vmm: 1, ..crash };
    let damage = Budget { crashes: 1, damage: 1, ..DOUBT };
    let fetch_calm = POSTCOPY;
    let fetch_crash = Budget { crashes: 1, ..POSTCOPY };
    let fetch_crash_and_vmm = Budget { vmm: 1, ..fetch_crash };
    for (fault, budget, expected) in [
        // `Ready` is sent before the promise not to forget is durable.
        (Fault::NotDurable(Record::Prepared), crash_and_vmm, Violation::is_stuck as fn(&Violation) -> bool),
        (Fault::NotDurable(Record::Running), crash_and_vmm, Violation::is_unsafe),
        (Fault::NotDurable(Record::Declined), crash_and_vmm, Violation::is_unsafe),
        (Fault::NotDurable(Record::Finished), crash, Violation::is_stuck),
        (Fault::NotDurable(Record::TakenBack), crash_and_vmm, Violation::is_stuck),
        (Fault::NotRelinquished, crash, Violation::is_unsafe),
        (Fault::ForgetBeforeDiscard, crash, Violation::is_stuck),
        (Fault::ResumeOnPeerLost, calm, Violation::is_unsafe),
        (Fault::SentBeforePause, calm, Violation::is_unsafe),
        (Fault::GiveUpInDoubt, calm, Violation::is_stuck),
        (Fault::NeverRepeat, calm, Violation::is_stuck),
        (Fault::CompleteTooEarly, fetch_calm, Violation::is_unsafe),
        (Fault::ForgetsMissing, fetch_crash, Violation::is_unsafe),
        (Fault::ForgetsComplete, fetch_crash, Violation::is_unsafe),
        (Fault::RunsWithHoles, fetch_crash, Violation::is_unsafe),
        (Fault::LosesWhatNeverRan, fetch_crash, Violation::is_unsafe),
        (Fault::GivesUpWithoutTrace, fetch_calm, Violation::is_unsafe),
        (Fault::FetchingIsRunning, fetch_calm, Violation::is_unsafe),
        (Fault::FreesOnPeerLost, fetch_calm, Violation::is_unsafe),
        (Fault::ServesNotAfterCrash, fetch_crash, Violation::is_stuck),
        (Fault::ServesWhatIsDropped, fetch_crash_and_vmm, Violation::is_stuck),
        (Fault::RecoveringIsFetching, Budget { hangs: true, ..fetch_crash_and_vmm }, Violation::is_unsafe),
        (Fault::BelievesStrangers, Budget { vmm: 1, ..calm }, Violation::is_unsafe),
        (Fault::ResumesOnAGuess, damage, Violation::is_unsafe),
        (Fault::UnknownIsDeclined, damage, Violation::is_unsafe),
        (Fault::TakesRunningForLoaded, Budget { postcopy: true, ..damage }, Violation::is_unsafe),
        (Fault::TakesLoadingForLoaded, crash, Violation::is_unsafe),
        (Fault::PromisesWhatIsNotTrue, DOUBT, Violation::is_unsafe),
    ] {
        let violation = check(World::new(budget, fault)).expect_err(&format!("{fault:?} was not caught"));
        assert!(expected(&violation), "{fault:?} was caught as something else: {violation}");
    }
}
