//! The switchover is what happens while the guest is paused: the last pages, the proof if it was ordered, and the VMM's
//! state.

use std::cell::RefCell;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use memlane_guest::{Guest, SavedState, StateWriter};
use memlane_protocol::PageSet;
use memlane_protocol::convergence::{Forecast, Measured, Predictor};

use super::error::CopyError;
use super::serve::Serving;
use super::state::StateSender;
use super::transfer::{LOOK, Transfer};
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
    /// The pause may take this long, without what comparing takes.
    pub downtime_limit: Duration,
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
        self.serving.is_none() && sends_state_at_once(&self.transfer.guest, self.verify)
    }

    async fn switch_over(self, state: &StateSender, writer: StateWriter) -> Result<Paused, CopyError> {
        let transfer = &self.transfer;
        // What holds up the guest's writes ends before its VMM writes anything: that must not take long then.
        transfer.guest.driver.prepare_pause(writer, transfer.guest.is_stunned()).await?;
        transfer.handle.update(|progress| progress.status.phase = Phase::SwitchingOver);
        let at = self.pause().await?;
        transfer.note_pause();
        state.note_pause();
        let pause_time = at.elapsed();
        let stopped_at = unix_seconds() - pause_time.as_secs_f64();
        transfer.handle.update(|progress| {
            progress.status.guest_runs_at = None;
            progress.pause.stopped_at_seconds = Some(stopped_at);
        });
        let saved = self.in_time(at, self.send_last_pages(state)).await?;
        let save_time = pause_time + saved.took;
        self.show_saved(&saved);
        // Both come before the commit, and neither waits for the other.
        let verify_time = match tokio::try_join!(self.send_the_rest(state, &saved, at), self.look_again(at)) {
            Ok((verify_time, ())) => verify_time,
            Err(error) => {
                // Also of a pause that came to nothing: the next one is forecast from it.
                self.predictor.borrow_mut().learn_save(save_time);
                return Err(error);
            }
        };
        let Self { downtime_limit, forecast, predictor, serving, .. } = self;
        Ok(Paused { at, save_time, verify_time, downtime_limit, forecast, predictor, serving })
    }

    /// Pauses the guest, whose VMM may write a first part of its state before. What the guest writes meanwhile is sent.
    /// Returns since when it stands still.
    async fn pause(&self) -> Result<Instant, CopyError> {
        /// Looking at what was written takes no more than this part of the time.
        const PART: u32 = 10;
        let (transfer, asked) = (&self.transfer, Instant::now());
        let mut look_at = asked + LOOK;
        let mut pausing = pin!(transfer.guest.pause(self.longest_pause()));
        loop {
            if let Ok(paused) = tokio::time::timeout(LOOK, &mut pausing).await {
                return Ok(paused?);
            }
            match transfer.guest.driver.standing_since(asked) {
                Some(at) => {
                    let deadline = deadline(at, self.downtime_limit, self.forecast.as_ref());
                    if deadline.at < Instant::now() {
                        return Err(CopyError::Late(deadline));
                    }
                }
                // In post-copy nothing is sent any more.
                None if self.serving.is_some() || Instant::now() < look_at => {}
                None => {
                    let began = Instant::now();
                    let send = async {
                        transfer.harvest().await?;
                        transfer.look_at_lanes().await
                    };
                    let (sent, paused) = both(send, &mut pausing).await;
                    sent?;
                    look_at = Instant::now() + (began.elapsed() * PART).max(LOOK);
                    if let Some(paused) = paused {
                        return Ok(paused?);
                    }
                }
            }
        }
    }

    /// Compares digests if that was ordered, and sends the end of the state. Returns how long comparing took.
    async fn send_the_rest(
        &self,
        state: &StateSender,
        saved: &SavedState,
        at: Instant,
    ) -> Result<Duration, CopyError> {
        let mut verify_time = Duration::ZERO;
        if self.verify {
            let started = Instant::now();
            self.compare().await?;
            verify_time = started.elapsed();
        }
        // All that was sent was the guest's, and nothing passed for a hole that was cut off.
        self.transfer.guest.ram.check().map_err(CopyError::Memory)?;
        let sent = async {
            state.finish(saved.bytes).await;
            Ok(())
        };
        self.in_time(at + verify_time, sent).await?;
        Ok(verify_time)
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
        if !self.looks_again() && transfer.harvest().await?.new > 0 {
            transfer.until_all_acknowledged().await?;
        }
        Ok(saved)
    }

    /// Tells whether the state is loaded on the promise that saving it writes nothing to memory.
    fn looks_again(&self) -> bool {
        self.transfer.guest.driver.saves_last() && self.sends_state_at_once()
    }

    /// Makes sure of that promise, if it was given. The next pause gives it no more where it was broken.
    async fn look_again(&self, at: Instant) -> Result<(), CopyError> {
        if self.looks_again() && self.in_time(at, self.transfer.harvest()).await?.new > 0 {
            self.transfer.guest.saves_into_memory.set(true);
            return Err(CopyError::SavesIntoMemory);
        }
        Ok(())
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
        self.transfer.guest.saved_bytes.set(Some(saved.bytes));
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

/// Does `first` to its end. Goes on with `second` meanwhile, which may have what the first one waits for, and returns what has
/// come of it if it ended.
async fn both<T, U>(
    first: impl Future<Output = T>,
    mut second: impl Future<Output = U> + Unpin,
) -> (T, Option<U>) {
    let (mut first, mut ended) = (pin!(first), None);
    loop {
        tokio::select! {
            first = &mut first => return (first, ended),
            second = &mut second, if ended.is_none() => ended = Some(second),
        }
    }
}

/// Tells whether the state of a guest's VMM may be sent while it is saved, unless the move ends by post-copy.
pub(super) fn sends_state_at_once(guest: &Guest, verify: bool) -> bool {
    !verify && !guest.saves_into_memory.get()
}

/// Returns when a pause that began `at` must have come to the commit. What is begun then cannot be taken back.
fn deadline(at: Instant, limit: Duration, forecast: Option<&Forecast>) -> Deadline {
    let later = forecast.map_or(Duration::ZERO, Forecast::after_commit);
    Deadline { at: at + limit.saturating_sub(later), limit }
}
