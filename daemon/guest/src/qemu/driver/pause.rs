//! What decides about a pause of the guest: whether it may begin, and whether the guest runs when it is over.

use std::rc::Rc;
use std::time::{Duration, Instant};

use memlane_net::task;
use serde_json::json;
use tokio::task::JoinHandle;

use super::{PATIENCE, Qemu};
use crate::qemu::machine::{self, Parts};
use crate::qemu::qmp::{Qmp, is_migrating};
use crate::qemu::{others, run_state, settings};
use crate::{Blocker, Driver, DriverError};

/// QEMU is asked how it stands while something else is waited for.
pub(super) struct Asked {
    at: Instant,
    answer: JoinHandle<Result<String, DriverError>>,
}

impl Asked {
    pub(super) fn begin(qmp: Rc<Qmp>) -> Self {
        let answer = task::spawn("asking a QEMU how it stands", async move { qmp.status().await });
        Self { at: Instant::now(), answer }
    }
}

impl Qemu {
    /// Checks that QEMU can be told to pause the guest, has nothing to do for others that the move would spoil, and is made
    /// of what the other host was told. Returns the guest's status.
    pub(super) async fn check_unoccupied(&self) -> Result<String, DriverError> {
        let failed = |reason: String| DriverError::Failed { request: "pause", reason };
        let status = self.qmp.status().await?;
        run_state::movable(&status, self.qmp.version()).map_err(|error| failed(error.to_string()))?;
        if let Some(blocker) = others::at_work(&self.qmp).await?.into_iter().next() {
            let (what, remedy) = (blocker.detail, blocker.remedy.unwrap_or_default());
            return Err(failed(format!("{what}: it has begun while the guest was copied; {remedy}")));
        }
        let told = self.told.borrow().clone();
        let now = Parts::look(&self.qmp).await?.lines();
        let changed = machine::missing(&told, &now).into_iter().chain(machine::missing(&now, &told)).next();
        match changed {
            Some(part) if !told.is_empty() => {
                Err(failed(format!("{part} was changed while the guest was copied; order the move again")))
            }
            _ => Ok(status),
        }
    }

    /// Waits for one of these `states` of QEMU's own migration. Video memory is written first, as fast as it travels, while the
    /// guest runs. When that gets no less, because the guest draws as fast, the guest is to stand still for more of it. A QEMU
    /// that writes nothing any more is waited for as long as one that does not answer.
    pub(super) async fn until_paused(&self, states: &[&str]) -> Result<String, DriverError> {
        const LOOK: Duration = Duration::from_secs(1);
        let patience = self.patience.get();
        let (began, mut downtime, mut least) = (Instant::now(), settings::DOWNTIME, u64::MAX);
        let mut progressed = began;
        loop {
            match self.qmp.migration_reaches(states, "pause", LOOK).await {
                Err(DriverError::Slow { .. }) => {}
                reached => return reached,
            }
            if progressed.elapsed() > patience {
                return Err(self.slow("pause", began.elapsed()));
            }
            let _patient = self.qmp.waiting_for(patience);
            let left = self.qmp.state_left().await?;
            if left < least {
                (least, progressed) = (left, Instant::now());
            } else if self.standing_since(began).is_none() {
                downtime = (2 * downtime).min(settings::MOST_DOWNTIME);
                settings::allow_downtime(&self.qmp, downtime).await?;
            }
        }
    }

    /// Tells whether the guest, which has this status, is to run: it ran before it was moved, or is not moved after all.
    pub(super) async fn is_to_run(&self, status: &str) -> Result<bool, DriverError> {
        let standing = self.stays.borrow().clone();
        let wakes_standing = |state: String| run_state::continues_standing(&state, self.qmp.version());
        let may_run = standing.is_none_or(wakes_standing);
        if self.incoming.get() {
            // One that was stopped since it was told to run was stopped by its operator.
            return Ok(may_run && matches!(status, "paused" | "prelaunch" | "inmigrate"));
        }
        // QEMU runs one itself that it was not done with, if it ran before; and what others have migrated is elsewhere.
        Ok(may_run
            && self.migrates.get()
            && status == "postmigrate"
            && self.qmp.migration().await? == "completed")
    }

    /// Returns how QEMU stands that is to let its guest run. It may have been asked already.
    ///
    /// # Errors
    ///
    /// Fails with [`DriverError::Failed`] if it has loaded a guest and is certain never to have run it.
    pub(super) async fn status_to_resume(&self) -> Result<String, DriverError> {
        /// An answer that was asked for longer ago does not count.
        const HOLDS: Duration = Duration::from_secs(1);
        let asked = self.asked.take().filter(|asked| asked.at.elapsed() < HOLDS);
        let status = match asked {
            Some(asked) => asked.answer.await.expect("asking does not panic"),
            None => self.qmp.status().await,
        };
        let gone = || self.process.has_ended() || self.qmp.is_gone();
        match status.and_then(|status| if gone() { Err(DriverError::Gone) } else { Ok(status) }) {
            // It was not told to run yet, and by itself it does not.
            Err(error) if self.loaded.get() => {
                Err(DriverError::Failed { request: "resume", reason: error.to_string() })
            }
            status => status,
        }
    }

    /// Tells whether the next daemon would believe that this one migrates the guest.
    pub(super) fn is_noted(&self) -> bool {
        self.states.read(&self.name).is_some_and(|record| record.migrating)
    }

    /// Finds out whether the guest's disks were left to the host that it came from, as it has not run since. A QEMU that is to
    /// give them up once more aborts then.
    pub(super) async fn inactive_disks(&self) -> Result<Option<Blocker>, DriverError> {
        let stands = self.stays.borrow().is_some() && self.qmp.status().await? != "running";
        let has_run = self.qmp.resumed().is_some();
        Ok((stands && !has_run && self.qmp.version() < settings::GIVES_UP_TWICE).then(|| {
            let detail = "the guest has come here standing still and has not run since, and QEMU before 10.0 ends itself when it is to \
                          give up the disks of such a guest";
            let remedy = "let it run once (QEMU's `cont`, then `stop`), or start it in a newer QEMU";
            Blocker::new("guest", detail.to_owned(), Some(remedy.to_owned()))
        }))
    }

    /// Ends a migration of QEMU's own that this daemon has begun. The guest is then as it was before.
    pub(super) async fn cancel(&self) -> Result<(), DriverError> {
        let until = Instant::now() + PATIENCE;
        let mut asked = false;
        loop {
            // It is over before the guest has its state again.
            if !is_migrating(&self.qmp.migration().await?) && self.qmp.status().await? != "finish-migrate" {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(self.slow("migrate_cancel", PATIENCE));
            }
            if !std::mem::replace(&mut asked, true) {
                self.qmp.execute("migrate_cancel", json!({})).await?;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}
