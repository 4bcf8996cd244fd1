//! Slowing the guest's writes while it is copied, as far as was decided.

use std::cell::RefCell;
use std::sync::atomic::Ordering;

use memlane_protocol::convergence::Convergence;
use tracing::{debug, info};

use super::copy::{CopyError, Copying};
use crate::observer::Measurement;
use crate::progress::Stun;

impl Copying {
    /// Holds the guest's writes to this rate from now on.
    pub async fn stun(&self, pages_per_second: u64) -> Result<(), CopyError> {
        if self.guest.stun_report().is_some() {
            return Ok(self.guest.set_stun(pages_per_second).await?);
        }
        let switch =
            self.guest.stun(&self.outbound.dirty, &self.outbound.in_flight, pages_per_second).await?;
        if switch.harvest.holes {
            self.outbound.sparse.store(true, Ordering::Release);
        }
        self.outbound.wake(self.outbound.dirty.count());
        info!(
            guest = %self.ticket.guest,
            pages_per_second,
            switch = ?switch.took,
            dirtied_pages = switch.harvest.new,
            "the guest's writes are held up"
        );
        self.context.observer.measured(Measurement::StunBegan(switch.took));
        let switch_seconds = switch.took.as_secs_f64();
        self.ticket.update(|progress| progress.stun = Some(Stun { switch_seconds, ..Stun::default() }));
        Ok(())
    }

    /// Holds the writes of a stunned guest to what the lanes deliver now.
    pub async fn follow_lanes(&self, convergence: &RefCell<Convergence>) {
        let bandwidth = self.bandwidth.borrow().bytes_per_second();
        let target = convergence.borrow().stun_target(bandwidth);
        if let Some(pages_per_second) = target
            && let Err(error) = self.guest.set_stun(pages_per_second).await
        {
            // Whoever harvests next hears of it too, and that ends the copy.
            debug!(%error, "the rate of a stun stays as it was");
        }
    }

    /// Brings what everyone sees of a stun up to date.
    pub fn show_stun(&self) {
        let Some(report) = self.guest.stun_report() else { return };
        let before = self.stunned.replace(report);
        self.context.observer.measured(Measurement::Stunned { before: &before, now: &report });
        let seconds = report.in_force.as_secs_f64();
        let per_second = |pages: f64| if seconds > 0.0 { pages / seconds } else { 0.0 };
        self.ticket.update(|progress| {
            let stun = progress.stun.get_or_insert_default();
            stun.seconds = seconds;
            stun.released_pages_per_second = per_second(report.released_pages as f64);
            stun.target_pages_per_second = per_second(report.target_pages);
        });
    }
}
