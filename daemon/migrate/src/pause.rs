//! What happens while the guest stands still: the last pages, the proof if it was ordered,
//! and the VMM's state.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use memlane_guest::SavedState;
use memlane_protocol::wire::control::{Control, MAX_STATE_CHUNK_BYTES};

use super::copy::{CopyError, Copying};
use super::digest::{Digest, chunks, difference, digest_all};
use crate::handle::unix_seconds;
use crate::progress::Phase;

impl Copying {
    /// Pauses the guest and sends everything that is not there yet. On success the
    /// destination has all it needs to run the guest.
    pub async fn pause(&self) -> Result<(), CopyError> {
        self.ticket.update(|progress| {
            progress.phase = Phase::SwitchingOver;
            progress.guest_runs_at = None;
        });
        self.paused_at.set(Some(Instant::now()));
        let paused_at = self.guest.pause(self.longest_pause()).await?;
        self.paused_at.set(Some(paused_at));
        let pause_time = paused_at.elapsed();
        let stopped_at = unix_seconds() - pause_time.as_secs_f64();
        self.ticket.update(|progress| progress.stopped_at_seconds = Some(stopped_at));
        if self.postcopy.borrow().is_some() {
            let saved = self.save_for_postcopy().await?;
            self.guest.ram.check().map_err(CopyError::Memory)?;
            self.save_time.set(pause_time + saved.took);
            return self.send_state(&saved).await;
        }
        self.outbound.still.store(true, Ordering::Release);
        self.harvest().await?;
        self.outbound.wake(self.outbound.dirty.count());
        let saved = if self.guest.driver.saves_last() {
            self.until_all_acknowledged().await?;
            self.guest.driver.save().await?
        } else {
            // The VMM saves its state while the lanes send the last pages.
            let (saved, sent) = tokio::join!(self.guest.driver.save(), self.until_all_acknowledged());
            sent?;
            saved?
        };
        // What device models wrote while they came to rest and saved themselves.
        if self.harvest().await? > 0 {
            self.outbound.wake(self.outbound.dirty.count());
            self.until_all_acknowledged().await?;
        }
        self.save_time.set(pause_time + saved.took);
        if self.verify {
            self.compare().await?;
        }
        // All that was sent was the guest's, and nothing passed for a hole that was cut off.
        self.guest.ram.check().map_err(CopyError::Memory)?;
        self.send_state(&saved).await
    }

    /// When the VMM is to end the pause by itself: this daemon has done so by then, or hangs.
    fn longest_pause(&self) -> Duration {
        /// For a daemon that is slow.
        const GRACE: Duration = Duration::from_secs(1);
        // Both sides go through all of memory, and neither is told how far the other is.
        let comparing = if self.verify { self.patience() * 2 } else { Duration::ZERO };
        self.policy.downtime_limit.saturating_add(comparing).saturating_add(GRACE)
    }

    /// Compares digests of all RAM at both ends.
    async fn compare(&self) -> Result<(), CopyError> {
        let started = Instant::now();
        self.comparing.set(true);
        self.link.send(&Control::Verify).await?;
        let ram = self.guest.ram.clone();
        let digesting = tokio::task::spawn_blocking(move || digest_all(&ram));
        let mut there = Vec::new();
        loop {
            let Control::Digests { digests, last } = self.answer().await? else {
                return Err(CopyError::Protocol("something else than its digests"));
            };
            let known = there.len();
            there.extend(digests);
            let from = known.saturating_sub(1);
            let in_order = there[from..].is_sorted_by(|before: &Digest, after| before.0 < after.0);
            if !in_order || there.last().is_some_and(|(chunk, _)| *chunk >= chunks(&self.guest.ram)) {
                return Err(CopyError::Protocol("digests that are out of order, or of no memory"));
            }
            if last {
                break;
            }
            if there.len() == known {
                return Err(CopyError::Protocol("no digests where some are left"));
            }
        }
        let here = digesting.await.expect("digesting does not panic").map_err(CopyError::Memory)?;
        let difference = difference(&self.guest.ram, &here, &there);
        self.verify_time.set(started.elapsed());
        self.comparing.set(false);
        self.ticket.update(|progress| progress.digest_verified = Some(difference.is_none()));
        match difference {
            Some(difference) => Err(CopyError::Unequal(difference)),
            None => Ok(()),
        }
    }

    async fn send_state(&self, saved: &SavedState) -> Result<(), CopyError> {
        let total = saved.bytes.len() as u64;
        self.ticket.update(|progress| {
            progress.vmm_state_bytes = Some(total);
            progress.save_seconds = Some(saved.took.as_secs_f64());
        });
        let mut offset = 0;
        loop {
            let end = (offset + MAX_STATE_CHUNK_BYTES).min(saved.bytes.len());
            let bytes = saved.bytes[offset..end].to_vec();
            self.link.send(&Control::State { total, offset: offset as u64, bytes }).await?;
            offset = end;
            if offset == saved.bytes.len() {
                return Ok(());
            }
        }
    }
}
