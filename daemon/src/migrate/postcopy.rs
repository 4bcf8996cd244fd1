//! Post-copy at the source: the guest is handed over before all of its memory is.
//!
//! What is out of date at the destination is dropped there while the guest still runs here; in the pause
//! only what was written since, and the VMM's state, have to be told. From the moment that the
//! destination knows all that is missing, it is served.

use std::sync::atomic::Ordering;

use memlane_protocol::PageSet;
use memlane_protocol::wire::control::Control;

use super::copy::{CopyError, Copying};
use super::missing::tell;
use super::serve::{Server, Serving};
use crate::guest::SavedState;

/// Pages that are told once more before the pause: so many cost more there than another look.
const MANY: u64 = 4096;
/// Looks before the pause.
const LOOKS: u32 = 3;

impl Copying {
    /// Gets the destination ready to run the guest without all of its memory, while it runs here.
    /// `tracked` tells whether its writes are tracked; otherwise nothing was sent yet.
    pub async fn open_postcopy(&self, tracked: bool) -> Result<(), CopyError> {
        self.end_lanes().await?;
        let server = Server {
            host: self.host.clone(),
            ticket: self.ticket.clone(),
            ram: self.guest.ram.clone(),
            // Of a guest that was never looked through, much may be holes.
            sparse: !tracked || self.outbound.sparse.load(Ordering::Acquire),
        };
        let serving = Serving::begin(server).await?;
        self.postcopy.replace(Some(serving));
        if !tracked {
            let all = PageSet::new(self.guest.ram.pages());
            all.insert_range(0..all.pages());
            return self.tell_missing(&all).await;
        }
        for _ in 0..LOOKS {
            self.harvest().await?;
            if self.tell_dirty().await? < MANY {
                break;
            }
        }
        Ok(())
    }

    /// Lets what is in flight arrive, and ends the lanes: from then on nothing is written to the
    /// guest's memory at the destination that is not placed whole.
    async fn end_lanes(&self) -> Result<(), CopyError> {
        self.outbound.hold();
        while !self.outbound.is_settled() {
            self.wait_for_lanes().await?;
        }
        let closed = self.lanes.borrow().close();
        closed.await;
        Ok(())
    }

    /// The guest stands still: saves its state, and tells what was written since the last look.
    pub async fn save_for_postcopy(&self) -> Result<SavedState, CopyError> {
        let saved = self.guest.driver.save().await?;
        if self.guest.tracked.get() {
            // Device models have come to rest and saved themselves: nothing is written any more.
            self.harvest().await?;
            self.tell_dirty().await?;
        }
        Ok(saved)
    }

    /// Tells what of the dirty pages the destination has not been told; returns how many.
    async fn tell_dirty(&self) -> Result<u64, CopyError> {
        let fresh = PageSet::new(self.outbound.dirty.pages());
        for run in self.outbound.dirty.runs() {
            for page in run.filter(|page| self.told_missing.insert(*page)) {
                fresh.insert(page);
            }
        }
        let count = fresh.count();
        self.tell_missing(&fresh).await?;
        Ok(count)
    }

    /// Returns when the destination has dropped these pages.
    async fn tell_missing(&self, pages: &PageSet) -> Result<(), CopyError> {
        for missing in tell(pages) {
            self.link.send(&Control::Missing(missing)).await?;
        }
        match self.answer().await? {
            Control::MissingDone => Ok(()),
            _ => Err(CopyError::Protocol("something else than that pages are dropped")),
        }
    }
}
