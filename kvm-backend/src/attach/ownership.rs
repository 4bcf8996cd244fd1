//! Whether the guest may run: which requests are in order, and what follows from each.

use memlane_protocol::wire::attach::{MigrationId, Request, Standing};

/// No migration.
pub(super) const NONE: MigrationId = [0; 16];

/// The guest's standing, and the pause that a daemon ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ownership {
    standing: Standing,
    migration: MigrationId,
    pause: Pause,
}

/// How far a daemon got with pausing the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    /// It runs.
    No,
    /// A pause was begun: the guest may stand still.
    Begun,
    /// It stands still.
    Done,
}

/// Why a request is not in order; the text goes to the daemon.
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
    #[error("the guest has been given up for a migration; resume it or discard it")]
    Relinquished,
    #[error("the guest must be paused first")]
    NotPaused,
    #[error("the guest belongs to another migration")]
    OtherMigration,
    #[error("a migration's identity cannot be all zeros")]
    NoMigration,
}

impl Ownership {
    /// A guest that runs here, or one that is awaited.
    pub(super) fn new(standing: Standing) -> Self {
        Self { standing, migration: NONE, pause: Pause::No }
    }

    pub(super) fn standing(&self) -> Standing {
        self.standing
    }

    /// The migration that the standing belongs to, or [`NONE`].
    pub(super) fn migration(&self) -> MigrationId {
        self.migration
    }

    /// Whether the request is in order now. Nothing changes before it is [`done`](Self::done).
    pub(super) fn check(&self, request: &Request) -> Result<(), Refusal> {
        use Standing::{Incoming, Loaded, Relinquished, Running};
        match (request, self.standing) {
            // Memory is looked at and provided whoever owns the guest, one that is awaited included.
            (Request::StopTracking | Request::OpenUserfault { .. }, _) => Ok(()),
            (Request::Discard, Running) => Err(Refusal::Owned),
            (Request::Discard, _) => Ok(()),
            (Request::Load { .. }, Incoming) => Ok(()),
            (Request::Load { .. }, Loaded) => Err(Refusal::Loaded),
            (Request::Load { .. }, Running) => Err(Refusal::Running),
            (Request::Load { .. }, Relinquished) => Err(Refusal::Relinquished),
            (_, Incoming) => Err(Refusal::Incoming),
            (Request::Prepare { migration }, Loaded) => self.belongs(migration),
            (Request::Prepare { .. }, Running) => Err(Refusal::Running),
            (Request::Prepare { .. }, Relinquished) => Err(Refusal::Relinquished),
            (Request::Resume, _) => Ok(()),
            (_, Loaded) => Err(Refusal::Loaded),
            (Request::Relinquish { .. }, Running) if self.pause != Pause::Done => Err(Refusal::NotPaused),
            (Request::Relinquish { migration }, _) => self.belongs(migration),
            (Request::Save, Running) if self.pause != Pause::Done => Err(Refusal::NotPaused),
            (Request::StartTracking, Relinquished) => Err(Refusal::Relinquished),
            _ => Ok(()),
        }
    }

    /// A pause is about to be tried: should the connection be lost on the way, it must be undone.
    pub(super) fn pausing(&mut self) {
        if self.standing == Standing::Running {
            self.pause = Pause::Begun;
        }
    }

    /// The request was carried out.
    pub(super) fn done(&mut self, request: &Request) {
        match *request {
            Request::Pause { .. } => self.pause = Pause::Done,
            Request::Resume => *self = Self::new(Standing::Running),
            Request::Load { .. } => self.standing = Standing::Loaded,
            Request::Prepare { migration } => self.migration = migration,
            Request::Relinquish { migration } => {
                *self = Self { standing: Standing::Relinquished, migration, pause: Pause::Done };
            }
            _ => {}
        }
    }

    /// Whether the guest, with no daemon there or none that ends its pause in time, should run but was paused
    /// by one.
    pub(super) fn must_resume(&self) -> bool {
        self.standing == Standing::Running && self.pause != Pause::No
    }

    /// The guest runs on by itself: what was saved of it in that pause is worth nothing any more.
    pub(super) fn runs_on(&mut self) {
        *self = Self::new(Standing::Running);
    }

    fn belongs(&self, migration: &MigrationId) -> Result<(), Refusal> {
        match *migration {
            NONE => Err(Refusal::NoMigration),
            _ if self.migration == NONE || self.migration == *migration => Ok(()),
            _ => Err(Refusal::OtherMigration),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: MigrationId = [1; 16];
    const B: MigrationId = [2; 16];
    const PAUSE: Request = Request::Pause { limit_nanoseconds: 0 };

    fn after(standing: Standing, requests: &[Request]) -> Ownership {
        let mut ownership = Ownership::new(standing);
        for request in requests {
            ownership.check(request).unwrap();
            if matches!(request, Request::Pause { .. }) {
                ownership.pausing();
            }
            ownership.done(request);
        }
        ownership
    }

    #[test]
    fn a_lost_daemon_never_leaves_a_guest_paused_that_was_not_given_up() {
        let paused = after(Standing::Running, &[Request::StartTracking, PAUSE, Request::Save]);
        assert!(paused.must_resume());
        let resumed = after(Standing::Running, &[PAUSE, Request::Resume]);
        assert!(!resumed.must_resume());
        let given_up = after(Standing::Running, &[PAUSE, Request::Relinquish { migration: A }]);
        assert!(!given_up.must_resume());
        assert_eq!((given_up.standing(), given_up.migration()), (Standing::Relinquished, A));

        // A pause that failed half way is undone as well, and is none to give the guest up in.
        let mut half = Ownership::new(Standing::Running);
        half.pausing();
        assert!(half.must_resume());
        assert_eq!(half.check(&Request::Relinquish { migration: A }), Err(Refusal::NotPaused));
    }

    #[test]
    fn a_guest_that_ran_on_cannot_be_given_up_for_the_pause_before() {
        let mut paused = after(Standing::Running, &[PAUSE, Request::Save]);
        assert!(paused.must_resume());
        paused.runs_on();
        assert_eq!(paused.check(&Request::Relinquish { migration: A }), Err(Refusal::NotPaused));
        assert_eq!(paused.check(&Request::Save), Err(Refusal::NotPaused));
        assert_eq!((paused.check(&Request::Resume), paused.must_resume()), (Ok(()), false));
    }

    #[test]
    fn requests_out_of_order_are_refused() {
        let load = Request::Load { bytes: 1 };
        let relinquish = Request::Relinquish { migration: A };
        let incoming = Ownership::new(Standing::Incoming);
        for request in [Request::StartTracking, PAUSE, Request::Resume, Request::Save, relinquish] {
            assert_eq!(incoming.check(&request), Err(Refusal::Incoming), "{request:?}");
        }
        let loaded = after(Standing::Incoming, &[load, Request::Prepare { migration: A }]);
        assert_eq!((loaded.standing(), loaded.migration()), (Standing::Loaded, A));
        assert_eq!(loaded.check(&load), Err(Refusal::Loaded));
        assert_eq!(loaded.check(&Request::Prepare { migration: B }), Err(Refusal::OtherMigration));
        assert_eq!(loaded.check(&PAUSE), Err(Refusal::Loaded));
        assert_eq!(loaded.check(&Request::Discard), Ok(()));

        let running = after(Standing::Incoming, &[load, Request::Prepare { migration: A }, Request::Resume]);
        assert_eq!((running.standing(), running.migration()), (Standing::Running, NONE));
        assert_eq!(running.check(&Request::Discard), Err(Refusal::Owned));
        assert_eq!(running.check(&relinquish), Err(Refusal::NotPaused));
        assert_eq!(running.check(&Request::Save), Err(Refusal::NotPaused));
        assert_eq!(running.check(&load), Err(Refusal::Running));

        let given_up = after(Standing::Running, &[PAUSE, relinquish]);
        assert_eq!(given_up.check(&relinquish), Ok(()));
        assert_eq!(given_up.check(&Request::Relinquish { migration: B }), Err(Refusal::OtherMigration));
        assert_eq!(given_up.check(&Request::Save), Ok(()));
        let paused = after(Standing::Running, &[PAUSE]);
        assert_eq!(paused.check(&Request::Relinquish { migration: NONE }), Err(Refusal::NoMigration));
    }

    proptest! {
        /// Whatever a daemon asks in whatever order: only a resume makes a guest run that was
        /// given up, has arrived, or is awaited.
        #[test]
        fn only_a_resume_makes_a_guest_run(
            incoming: bool,
            asked in prop::collection::vec((0usize..13, prop::bool::ANY), 0..40),
        ) {
            let start = if incoming { Standing::Incoming } else { Standing::Running };
            let mut ownership = Ownership::new(start);
            for (which, first) in asked {
                let migration = if first { A } else { B };
                let request = [
                    Request::StartTracking,
                    Request::Arm { first: 0, pages: 1 },
                    Request::Harvest,
                    Request::StopTracking,
                    PAUSE,
                    Request::Resume,
                    Request::Save,
                    Request::Load { bytes: 1 },
                    Request::Relinquish { migration },
                    Request::Prepare { migration },
                    Request::Discard,
                    Request::OpenUserfault { keep: first },
                    Request::Pace { pages_per_second: 1 },
                ][which];
                let before = ownership;
                if ownership.check(&request).is_err() {
                    continue;
                }
                prop_assert!(request != Request::Discard || before.standing() != Standing::Running);
                if matches!(request, Request::Pause { .. }) {
                    ownership.pausing();
                }
                ownership.done(&request);
                if before.standing() != Standing::Running && ownership.standing() == Standing::Running {
                    prop_assert_eq!(request, Request::Resume);
                    prop_assert_ne!(before.standing(), Standing::Incoming);
                }
                if ownership.standing() == Standing::Relinquished {
                    prop_assert_ne!(ownership.migration(), NONE);
                    prop_assert!(!ownership.must_resume());
                }
            }
        }
    }
}
