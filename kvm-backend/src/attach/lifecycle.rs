//! [`Lifecycle`]: whether the guest may run here, which requests are in order, and what follows from each.

use memlane_protocol::wire::attach::{Bond, Request, RunState};

/// The guest's standing, the migration that it belongs to, and the pause that a daemon ordered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lifecycle {
    run_state: RunState,
    bond: Option<Bond>,
    pause: Pause,
}

/// How far a daemon has got with pausing the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    /// The guest runs.
    No,
    /// A pause was begun: the guest may be paused.
    Begun,
    /// The guest is paused.
    Done,
}

/// Why a request is not in order; the daemon passes the text on to the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("no guest has arrived here yet")]
    Incoming,
    #[error("the guest that arrived here has not run yet; resume it or discard it")]
    Loaded,
    #[error("the guest runs here already")]
    Running,
    #[error("the guest runs here and was not relinquished")]
    Owned,
    #[error("the guest was given up for a migration; resume it or discard it")]
    Relinquished,
    #[error("the guest must be paused first")]
    NotPaused,
    #[error("the guest belongs to another migration")]
    OtherMigration,
}

impl Lifecycle {
    /// Returns the lifecycle of a guest that begins with the run state given.
    pub(super) fn new(run_state: RunState) -> Self {
        Self { run_state, bond: None, pause: Pause::No }
    }

    /// Returns the guest's standing.
    pub(super) fn run_state(&self) -> RunState {
        self.run_state
    }

    /// Returns the migration that the run state belongs to.
    pub(super) fn bond(&self) -> Option<&Bond> {
        self.bond.as_ref()
    }

    /// Checks whether the request is in order now. Nothing changes before it is [`done`](Self::done).
    pub(super) fn check(&self, request: &Request) -> Result<(), Refusal> {
        use RunState::{Incoming, Loaded, Relinquished, Running};
        match (request, self.run_state) {
            // These requests are about memory, and are in order whichever host owns the guest, even if it is
            // awaited.
            (
                Request::StopTracking
                | Request::OpenUserfault { .. }
                | Request::KeptUserfault
                | Request::MappedFile { .. },
                _,
            ) => Ok(()),
            (Request::Discard, Running) => Err(Refusal::Owned),
            (Request::Discard, _) => Ok(()),
            (Request::Load { .. }, Incoming) => Ok(()),
            (Request::Load { .. }, Loaded) => Err(Refusal::Loaded),
            (Request::Load { .. }, Running) => Err(Refusal::Running),
            (Request::Load { .. }, Relinquished) => Err(Refusal::Relinquished),
            (_, Incoming) => Err(Refusal::Incoming),
            (Request::Prepare(bond), Loaded) => self.belongs(bond),
            (Request::Prepare(_), Running) => Err(Refusal::Running),
            (Request::Prepare(_), Relinquished) => Err(Refusal::Relinquished),
            (Request::Resume, _) => Ok(()),
            (_, Loaded) => Err(Refusal::Loaded),
            (Request::Relinquish(_), Running) if self.pause != Pause::Done => Err(Refusal::NotPaused),
            (Request::Relinquish(bond), _) => self.belongs(bond),
            (Request::Save, Running) if self.pause != Pause::Done => Err(Refusal::NotPaused),
            (Request::StartTracking, Relinquished) => Err(Refusal::Relinquished),
            _ => Ok(()),
        }
    }

    /// Notes that a pause is about to be tried: if the connection is lost on the way, the pause must be undone.
    pub(super) fn pausing(&mut self) {
        if self.run_state == RunState::Running {
            self.pause = Pause::Begun;
        }
    }

    /// Notes that the request was carried out.
    pub(super) fn done(&mut self, request: &Request) {
        match request {
            Request::Pause { .. } => self.pause = Pause::Done,
            Request::Resume => *self = Self::new(RunState::Running),
            Request::Load { .. } => self.run_state = RunState::Loaded,
            Request::Prepare(bond) => self.bond = Some(bond.clone()),
            Request::Relinquish(bond) => {
                let (run_state, bond) = (RunState::Relinquished, Some(bond.clone()));
                *self = Self { run_state, bond, pause: Pause::Done };
            }
            _ => {}
        }
    }

    /// Returns whether a daemon has paused a guest that should run. It must be resumed if no daemon is connected,
    /// or the daemon does not end the pause in time.
    pub(super) fn must_resume(&self) -> bool {
        self.run_state == RunState::Running && self.pause != Pause::No
    }

    /// Notes that the guest was resumed without a request: what was saved in that pause is out of date.
    pub(super) fn runs_on(&mut self) {
        *self = Self::new(RunState::Running);
    }

    fn belongs(&self, bond: &Bond) -> Result<(), Refusal> {
        match &self.bond {
            Some(ours) if ours.migration != bond.migration => Err(Refusal::OtherMigration),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: u8 = 1;
    const B: u8 = 2;
    const PAUSE: Request = Request::Pause { limit_nanoseconds: 0 };

    fn bond(number: u8) -> Bond {
        Bond { migration: [number; 16], peer: "host-b".parse().unwrap(), fetching: false }
    }

    fn after(run_state: RunState, requests: &[Request]) -> Lifecycle {
        let mut lifecycle = Lifecycle::new(run_state);
        for request in requests {
            lifecycle.check(request).unwrap();
            if matches!(request, Request::Pause { .. }) {
                lifecycle.pausing();
            }
            lifecycle.done(request);
        }
        lifecycle
    }

    #[test]
    fn a_lost_daemon_never_leaves_a_guest_paused_that_was_not_given_up() {
        let paused = after(RunState::Running, &[Request::StartTracking, PAUSE, Request::Save]);
        assert!(paused.must_resume());
        let resumed = after(RunState::Running, &[PAUSE, Request::Resume]);
        assert!(!resumed.must_resume());
        let given_up = after(RunState::Running, &[PAUSE, Request::Relinquish(bond(A))]);
        assert!(!given_up.must_resume());
        assert_eq!((given_up.run_state(), given_up.bond()), (RunState::Relinquished, Some(&bond(A))));

        // A pause that failed half way is undone as well, and the guest cannot be relinquished in it.
        let mut half = Lifecycle::new(RunState::Running);
        half.pausing();
        assert!(half.must_resume());
        assert_eq!(half.check(&Request::Relinquish(bond(A))), Err(Refusal::NotPaused));
    }

    #[test]
    fn a_guest_that_ran_on_cannot_be_given_up_for_the_pause_before() {
        let mut paused = after(RunState::Running, &[PAUSE, Request::Save]);
        assert!(paused.must_resume());
        paused.runs_on();
        assert_eq!(paused.check(&Request::Relinquish(bond(A))), Err(Refusal::NotPaused));
        assert_eq!(paused.check(&Request::Save), Err(Refusal::NotPaused));
        assert_eq!((paused.check(&Request::Resume), paused.must_resume()), (Ok(()), false));
    }

    #[test]
    fn requests_out_of_order_are_refused() {
        let load = Request::Load { bytes: 1 };
        let relinquish = Request::Relinquish(bond(A));
        let incoming = Lifecycle::new(RunState::Incoming);
        for request in [Request::StartTracking, PAUSE, Request::Resume, Request::Save, relinquish.clone()] {
            assert_eq!(incoming.check(&request), Err(Refusal::Incoming), "{request:?}");
        }
        let loaded = after(RunState::Incoming, &[load.clone(), Request::Prepare(bond(A))]);
        assert_eq!((loaded.run_state(), loaded.bond()), (RunState::Loaded, Some(&bond(A))));
        assert_eq!(loaded.check(&load), Err(Refusal::Loaded));
        assert_eq!(loaded.check(&Request::Prepare(bond(B))), Err(Refusal::OtherMigration));
        assert_eq!(loaded.check(&PAUSE), Err(Refusal::Loaded));
        assert_eq!(loaded.check(&Request::Discard), Ok(()));

        let running = after(RunState::Incoming, &[load.clone(), Request::Prepare(bond(A)), Request::Resume]);
        assert_eq!((running.run_state(), running.bond()), (RunState::Running, None));
        assert_eq!(running.check(&Request::Discard), Err(Refusal::Owned));
        assert_eq!(running.check(&relinquish), Err(Refusal::NotPaused));
        assert_eq!(running.check(&Request::Save), Err(Refusal::NotPaused));
        assert_eq!(running.check(&load), Err(Refusal::Running));

        let given_up = after(RunState::Running, &[PAUSE, relinquish.clone()]);
        assert_eq!(given_up.check(&relinquish), Ok(()));
        assert_eq!(given_up.check(&Request::Relinquish(bond(B))), Err(Refusal::OtherMigration));
        assert_eq!(given_up.check(&Request::Save), Ok(()));
    }

    proptest! {
        /// Whatever a daemon requests in whatever order, only a resume makes a guest run that was relinquished, has
        /// arrived, or is awaited.
        #[test]
        fn only_a_resume_makes_a_guest_run(
            incoming: bool,
            asked in prop::collection::vec((0usize..13, prop::bool::ANY), 0..40),
        ) {
            let start = if incoming { RunState::Incoming } else { RunState::Running };
            let mut lifecycle = Lifecycle::new(start);
            for (which, first) in asked {
                let bond = bond(if first { A } else { B });
                let request = [
                    Request::StartTracking,
                    Request::WriteProtect { first: 0, pages: 1 },
                    Request::Harvest,
                    Request::StopTracking,
                    PAUSE,
                    Request::Resume,
                    Request::Save,
                    Request::Load { bytes: 1 },
                    Request::Relinquish(bond.clone()),
                    Request::Prepare(bond),
                    Request::Discard,
                    Request::OpenUserfault { keep: first },
                    Request::Throttle { pages_per_second: 1 },
                ][which].clone();
                let before = lifecycle.clone();
                if lifecycle.check(&request).is_err() {
                    continue;
                }
                prop_assert!(request != Request::Discard || before.run_state() != RunState::Running);
                if matches!(request, Request::Pause { .. }) {
                    lifecycle.pausing();
                }
                lifecycle.done(&request);
                if before.run_state() != RunState::Running && lifecycle.run_state() == RunState::Running {
                    prop_assert_eq!(request, Request::Resume);
                    prop_assert_ne!(before.run_state(), RunState::Incoming);
                }
                if lifecycle.run_state() == RunState::Relinquished {
                    prop_assert!(lifecycle.bond().is_some());
                    prop_assert!(!lifecycle.must_resume());
                }
            }
        }
    }
}
