//! This module says when a pause must have come to the commit.

use std::time::{Duration, Instant};

use memlane_guest::{DriverError, Guest};
use memlane_protocol::handover::Event;
use tracing::warn;

use super::Effects;

/// By a deadline the pause must have come to the commit, or it ends. What is begun then cannot be taken back: until the
/// journal has answered, it is unknown which host owns the guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    /// This is the moment.
    pub at: Instant,
    /// The deadline comes from this downtime limit.
    pub limit: Duration,
}

impl Deadline {
    /// Returns why the pause is ended, for the operator.
    pub(crate) fn reason(&self) -> String {
        format!(
            "the pause was about to exceed the downtime limit of {:.0?}, so it was ended; try again, or raise the \
             limit",
            self.limit
        )
    }
}

impl Effects {
    /// Tells the VMM to relinquish the guest. It has what is left of the limit: an answer that comes later is of no
    /// use, as the record that follows would be late too.
    pub(super) async fn relinquish(&mut self, guest: &Guest) -> Result<Event, DriverError> {
        let bond = self.bond();
        let told = guest.driver.relinquish(&bond);
        let Some(deadline) = self.commit_by else { return told.await.map(|()| Event::Relinquished) };
        let told = tokio::time::timeout_at(deadline.at.into(), told).await;
        if told.is_ok() && Instant::now() < deadline.at {
            return told.unwrap_or(Ok(())).map(|()| Event::Relinquished);
        }
        // It may have done so: it is told to resume, which undoes it.
        warn!(guest = %self.entry.guest, limit = ?deadline.limit, "too late to hand the guest over; it is kept");
        self.blame(deadline.reason());
        Ok(Event::Failed)
    }
}
