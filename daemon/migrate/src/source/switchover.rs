//! The switchover is what happens while the guest is paused: the last pages, the proof if it was ordered, and the VMM's
//! state.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use memlane_guest::{SavedState, StateWriter};
use memlane_protocol::PageSet;
use memlane_protocol::convergence::{Forecast, Measured, Predictor};

use super::error::CopyError;
use super::serve::Serving;
use super::state::StateSender;
use super::transfer::Transfer;
use crate::effects::Deadline;
use crate::handle::unix_seconds;
use crate::progress::Phase;

/// The stage in which the guest is paused and what is left of it is sent.
pub(super) struct Switchover {
    pub(super) transfer: Rc<Transfer>,
    /// The pause may take this long, without what comparing takes.
    pub(super) downtime_limit: Duration,
    /// If this is true, digests are compared.
    pub(super) verify: bool,
    /// The switchover was decided on this forecast.
    pub(super) forecast: Option<Forecast>,
    /// These are the forecasts for this kind of VMM.
    pub(super) predictor: Rc<RefCell<Predictor>>,
    /// This serves what is missing at the destination, in post-copy.
    pub(super) serving: Option<Serving>,
    /// The destination was told that these pages are missing.
    pub(super) told_missing: Arc<PageSet>,
}

/// A guest that is paused here, and of which the destination has all that it needs to run it.
pub(super) struct Paused {
    /// The guest stopped at this moment.
    pub at: Instant,
    /// From then on it took this long until its state was saved.
    save_time: Duration,
    /// Comparing digests took this long, which the limit does not bound.
    verify_time: Duration,
    downtime_limit: Duration,
    forecast: Option<Forecast>,
    predictor: Rc<RefCell<Predictor>>,
    serving: Option<Serving>,
}

/// These times of a pause are what the destination measured.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RemoteTimes {
    /// Loading the VMM's state took this long.
    pub load: Duration,
    /// Letting the vCPUs run took this long.
    pub resume: Duration,
}

impl Switchover {
    /// Pauses the guest and sends everything that is not there yet.
    ///
    /// # Errors
    ///
    /// Fails if something goes wrong, or if the pause would exceed the limit. The guest is then paused.
    pub(super) async fn run(self) -> Result<Paused, CopyError> {
        self.transfer.open_state_lane().await;
        let (link, lane) = (self.transfer.link.clone(), self.transfer.state_lane.take());
        let (mut state, writer) = StateSender::new(link, lane, self.sends_state_at_once());
        let remote = state.pass_on();
        tokio::select! {
            paused = self.switch_over(&state, writer) => paused,
            failed = remote => Err(failed),
        }
    }

    /// Tells whether the VMM's state may be loaded at the destination while it is saved here. Otherwise something remains
    /// to be done then that loading it must not disturb.
    fn sends_state_at_once(&self) -> bool {
        !self.verify && self.serving.is_none() && !self.transfer.guest.saves_into_memory.get()
    }

    async fn switch_over(self, state: &StateSender, writer: StateWriter) -> Result<Paused, CopyError> {
        let transfer = &self.transfer;
        transfer.guest.driver.prepare_pause(writer).await?;
        transfer.handle.update(|progress| {
            progress.status.phase = Phase::SwitchingOver;
            progress.status.guest_runs_at = None;
        });
        let asked = Instant::now();
        let pausing = async { Ok(transfer.guest.pause(self.longest_pause()).await?) };
        let at = self.in_time(asked, pausing).await?;
        transfer.note_pause();
        let pause_time = at.elapsed();
        let stopped_at = unix_seconds() - pause_time.as_secs_f64();
        transfer.handle.update(|progress| progress.pause.stopped_at_seconds = Some(stopped_at));
        let saved = self.in_time(at, self.send_last_pages(state)).await?;
        let save_time = pause_time + saved.took;
        self.show_saved(&saved);
        let mut verify_time = Duration::ZERO;
        if self.verify {
            let started = Instant::now();
            self.compare().await?;
            verify_time = started.elapsed();
        }
        // All that was sent was the guest's, and nothing passed for a hole that was cut off.
        transfer.guest.ram.check().map_err(CopyError::Memory)?;
        let sent = async {
            state.finish(saved.bytes).await;
            Ok(())
        };
        self.in_time(at + verify_time, sent).await?;
        let Self { downtime_limit, forecast, predictor, serving, .. } = self;
        Ok(Paused { at, save_time, verify_time, downtime_limit, forecast, predictor, serving })
    }

    /// Sends what was written since the last look, and saves the VMM's state.
    async fn send_last_pages(&self, state: &StateSender) -> Result<SavedState, CopyError> {
        let transfer = &self.transfer;
        if self.serving.is_some() {
            return self.save_for_postcopy().await;
        }
        transfer.outbound.paused.store(true, Ordering::Release);
        transfer.harvest().await?;
        let saved = if transfer.guest.driver.saves_last() {
            transfer.until_all_acknowledged().await?;
            if self.sends_state_at_once() {
                state.note_memory();
            }
            transfer.guest.driver.save().await?
        } else {
            // The VMM saves its state while the lanes send the last pages.
            let (saved, sent) = tokio::join!(transfer.guest.driver.save(), transfer.until_all_acknowledged());
            sent?;
            saved?
        };
        // What device models wrote while they came to rest and saved themselves.
        if transfer.harvest().await?.new > 0 {
            if transfer.guest.driver.saves_last() && self.sends_state_at_once() {
                transfer.guest.saves_into_memory.set(true);
                return Err(CopyError::SavesIntoMemory);
            }
            transfer.until_all_acknowledged().await?;
        }
        Ok(saved)
    }

    /// Returns after which time the VMM is to end the pause by itself: this daemon has done so by then, or hangs.
    fn longest_pause(&self) -> Duration {
        /// This is added for a daemon that is slow.
        const GRACE: Duration = Duration::from_secs(1);
        // Both sides go through all of memory, and neither is told how far the other is.
        let comparing = if self.verify { self.transfer.patience() * 2 } else { Duration::ZERO };
        self.downtime_limit.saturating_add(comparing).saturating_add(GRACE)
    }

    /// Does something while the limit of a pause that began `at` lasts.
    async fn in_time<T>(
        &self,
        at: Instant,
        work: impl Future<Output = Result<T, CopyError>>,
    ) -> Result<T, CopyError> {
        let deadline = deadline(at, self.downtime_limit, self.forecast.as_ref());
        let done = tokio::time::timeout_at(deadline.at.into(), work).await;
        done.unwrap_or(Err(CopyError::Late(deadline)))
    }

    fn show_saved(&self, saved: &SavedState) {
        self.transfer.handle.update(|progress| {
            progress.pause.vmm_state_bytes = Some(saved.bytes);
            progress.pause.save_seconds = Some(saved.took.as_secs_f64());
            progress.pause.guest_stays = saved.stays.clone();
        });
    }
}

impl Paused {
    /// Returns when the commit must have begun to be written, or the guest is kept.
    pub(super) fn deadline(&self) -> Deadline {
        deadline(self.at + self.verify_time, self.downtime_limit, self.forecast.as_ref())
    }

    /// Ends serving.
    pub(super) fn end_serving(&mut self) {
        self.serving = None;
    }

    /// Learns from a pause of this length, of which this host's journal took `journal`. Returns what was measured, and
    /// what had been expected.
    pub(super) fn learn(
        &self,
        downtime: Duration,
        journal: Duration,
        remote: RemoteTimes,
    ) -> Option<(Measured, Forecast)> {
        let forecast = self.forecast?;
        let measured = Measured {
            downtime: downtime.saturating_sub(self.verify_time),
            save: self.save_time,
            load: remote.load.min(downtime),
            // The destination writes two records, this host one.
            journal: journal * 3,
            resume: remote.resume.min(downtime),
        };
        self.predictor.borrow_mut().learn(&forecast, &measured);
        Some((measured, forecast))
    }
}

/// Returns when a pause that began `at` must have come to the commit. What is begun then cannot be taken back.
fn deadline(at: Instant, limit: Duration, forecast: Option<&Forecast>) -> Deadline {
    let later = forecast.map_or(Duration::ZERO, Forecast::after_commit);
    Deadline { at: at + limit.saturating_sub(later), limit }
}
