//! One cell of the matrix: a migration on two hosts of its own, in which one thing fails in one phase.

use std::fmt;
use std::time::Duration;

use memlane_api::types::{Migration, Outcome};
use memlane_lab::{GuestHistory, HostId, LabOptions, NotedState, Rate, Time, time_now, wait_for};

use crate::common::{Stage, Tap, assert_runs, words};
use crate::fault::{Fault, Vmms};
use crate::phase::Phase;

const NAME: &str = "web1";
/// A guest that writes more than slow ports carry, and little enough for all others.
const GUEST: &str = "--ram 64MiB --working-set 32MiB --rate 3000 --vcpus 1 --guest process";
/// Two ports of this rate take 6 seconds for the guest.
const SLOW: u64 = 20_000_000;
/// After this time all that was to be settled is, or hangs.
const REST: Duration = Duration::from_secs(120);

/// What has become of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fate {
    /// It runs at its source, whole.
    Source,
    /// It runs at its destination, whole.
    Destination,
    /// It runs nowhere any more.
    Gone,
}

/// What was seen of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seen {
    pub fate: Fate,
    /// The exit code of `memlanectl migrate`.
    pub code: i32,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fate = match self.fate {
            Fate::Source => "source",
            Fate::Destination => "destination",
            Fate::Gone => "gone",
        };
        write!(f, "{fate} {}", self.code)
    }
}

/// Plays a cell. Panics if the guest has two owners, is not whole, or is not told about.
pub(crate) fn play(fault: Fault, phase: Phase) -> Seen {
    let port_rate = phase.is_slow().then(|| Rate::from_bits_per_second(SLOW));
    let mut stage = Stage::beside_others(LabOptions { ports: 2, port_rate, ..LabOptions::default() });
    let tap = Tap::install(&mut stage);
    fault.prepare(&mut stage);

    let files =
        [HostId::A, HostId::B].map(|id| stage.rig.lab().host(id).directory().join(format!("{NAME}.history")));
    let arguments = |at: usize| words(&format!("{GUEST} --history {}", files[at].display()));
    let here = stage.rig.start_vmm(HostId::A, NAME, &arguments(0)).unwrap();
    let there = fault.start_receiver(&mut stage, NAME, &arguments(1));
    let mut vmms: Vmms = [here, there];

    let order = phase.reach(&stage, &tap, NAME);
    fault.strike(&mut stage, &tap, &mut vmms);
    let struck = time_now();
    if phase.is_slow() {
        (0..2).for_each(|port| stage.rig.lab().set_port_rate(port, None).unwrap());
    }
    let answer = order.end_within(REST);
    let told = rest(&stage, &mut vmms);

    let histories = files.map(|file| GuestHistory::read(&file));
    let ends = [0, 1].map(|at| if vmms[at].process().is_running() { time_now() } else { struck });
    assert_never_ran_twice(&histories, ends);
    let running =
        [0, 1].map(|at| vmms[at].process().is_running() && histories[at].last() == Some(NotedState::Running));
    let fate = match running {
        [true, true] => panic!("two owners: {told:#?}"),
        [true, false] => Fate::Source,
        [false, true] => Fate::Destination,
        [false, false] => Fate::Gone,
    };
    match fate {
        Fate::Source => assert_runs(&mut vmms[0]),
        Fate::Destination => assert_runs(&mut vmms[1]),
        Fate::Gone => {}
    }
    let code = answer.code;
    assert!(code == 0 || answer.text.contains("error") || answer.text.contains("reason"), "{}", answer.text);
    let fits = match fate {
        Fate::Source => [3, 4, 6].contains(&code),
        Fate::Destination => [0, 6].contains(&code),
        // It may have been gone before the order began, or after it had ended well.
        Fate::Gone => [0, 3, 4, 6, 7].contains(&code),
    };
    assert!(fits, "the exit code of {fate:?} is {code}: {}", answer.text);
    // Whoever still knows of the migration says the same of it.
    for migration in told.iter().filter(|migration| migration.guest_runs_at.is_some()) {
        let host = if fate == Fate::Source { "host-a" } else { "host-b" };
        assert_eq!(migration.guest_runs_at.as_deref(), Some(host), "{fate:?}: {migration:#?}");
    }
    // And says why it did not go well, though it has been started anew since.
    for migration in told.iter().filter(|migration| migration.outcome != Some(Outcome::Completed)) {
        assert!(migration.reason.as_ref().is_some_and(|reason| !reason.is_empty()), "why? {migration:#?}");
    }
    Seen { fate, code }
}

/// Waits until nothing is under way any more. Returns what both daemons say in the end, if they know of the migration.
fn rest(stage: &Stage, vmms: &mut Vmms) -> Vec<Migration> {
    let mut told = Vec::new();
    let at_rest = || {
        told.clear();
        for id in [HostId::A, HostId::B] {
            told.extend(stage.migrations(id)?);
        }
        let over = told.iter().all(|migration| migration.outcome.is_some());
        let known = [HostId::A, HostId::B].iter().zip(vmms.iter_mut()).all(|(id, vmm)| {
            let guest = stage.rig.guest(*id, NAME).ok().flatten();
            guest.is_some() == vmm.process().is_running()
        });
        (over && known).then_some(())
    };
    let rest = wait_for("rest", REST, at_rest);
    rest.unwrap_or_else(|error| {
        let guests = [HostId::A, HostId::B].map(|id| stage.rig.guest(id, NAME));
        let lives = vmms.each_mut().map(|vmm| vmm.process().is_running());
        panic!("{error}: it hangs: VMMs live: {lives:?}; daemons have {guests:?}; {told:#?}")
    });
    told
}

/// Checks that the guest never ran in both VMMs at once. `ends` are the times at which the VMMs have ended, or now.
fn assert_never_ran_twice(histories: &[GuestHistory; 2], ends: [Time; 2]) {
    let [here, there] = [0, 1].map(|at| {
        let ran = histories[at].ran().into_iter();
        ran.map(|(from, until)| (from, until.unwrap_or(ends[at]))).collect::<Vec<_>>()
    });
    for one in &here {
        for other in &there {
            let apart = one.1 <= other.0 || other.1 <= one.0;
            assert!(
                apart,
                "two owners: the guest ran at its source in {one:?} and at its destination in {other:?}"
            );
        }
    }
    assert!(!here.is_empty(), "the guest has never run at its source");
}
