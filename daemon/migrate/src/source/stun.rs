//! The source slows the guest's writes while it is copied, as far as was decided.

use std::sync::atomic::Ordering;

use tracing::{debug, info};

use super::error::CopyError;
use super::precopy::Precopy;
use crate::observer::Measurement;
use crate::progress::Stun;

impl Precopy {
    /// Holds the guest's writes to this rate, in pages of 4 KiB per second, from now on.
    pub(super) async fn stun(&self, pages_per_second: u64) -> Result<(), CopyError> {
        let transfer = &self.transfer;
        if transfer.guest.stun_report().is_some() {
            return Ok(transfer.guest.set_stun(pages_per_second).await?);
        }
        let switch = transfer
            .guest
            .stun(&transfer.outbound.dirty, &transfer.outbound.in_flight, pages_per_second)
            .await?;
        transfer.note_stall(switch.stall);
        if switch.harvest.holes {
            transfer.outbound.sparse.store(true, Ordering::Release);
        }
        transfer.outbound.publish();
        info!(
            guest = %transfer.handle.guest,
            pages_per_second,
            switch = ?switch.took,
            dirtied_pages = switch.harvest.new,
            "the guest's writes are held up"
        );
        transfer.context.observer.measured(Measurement::StunBegan(switch.took));
        let switch_seconds = switch.took.as_secs_f64();
        transfer.handle.update(|progress| progress.stun = Some(Stun { switch_seconds, ..Stun::default() }));
        Ok(())
    }

    /// Holds the writes of a stunned guest to what the lanes deliver now.
    pub(super) async fn follow_lanes(&self) {
        let bandwidth = self.bandwidth.borrow().bytes_per_second();
        let target = self.convergence.borrow().stun_target(bandwidth);
        if let Some(pages_per_second) = target
            && let Err(error) = self.transfer.guest.set_stun(pages_per_second).await
        {
            // The next harvest fails too, and that ends the copy.
            debug!(%error, "the rate of a stun stays as it was");
        }
    }
}
