//! Finding the pages that a running guest writes.
//!
//! Three trackers behind one trait, for the process that runs the guest: [`LogTracker`] reads
//! KVM's dirty bitmap, [`RingTracker`] KVM's dirty rings, and [`PagemapTracker`] the page tables,
//! over userfaultfd write protection. [`ForeignTracker`] reads the page tables of a process that
//! lent its descriptors and does nothing else for it.

mod armed;
pub mod foreign;
pub mod log;
mod pace;
pub mod pagemap;
mod punches;
pub mod ring;
mod scan;

use std::ops::Range;

use memlane_protocol::PageSet;
use memlane_protocol::wire::machine::TrackerKind;

pub use foreign::{ForeignTracker, Harvest, Writes};
pub use log::LogTracker;
pub use pace::Paced;
pub use pagemap::PagemapTracker;
pub use ring::{RingHandle, RingSize, RingTracker};

pub use crate::error::TrackError;
use crate::shared::SharedWords;

use armed::Armed;

/// Finds the pages that a guest writes, without ever stopping it.
///
/// A copy of the guest converges if each page is copied after it was armed, and again after
/// each harvest that reports it; after a last harvest of the paused guest, and the copies that
/// it asks for, both are equal.
pub trait DirtyTracker: Send {
    /// Which tracker this is.
    fn kind(&self) -> TrackerKind;

    /// Begins to track. Nothing is armed yet, and the vCPUs run on. Does nothing if begun already.
    fn start(&mut self) -> Result<(), TrackError>;

    /// Arms pages for the first time: every write from now on will be reported. Reports nothing.
    ///
    /// Pages that are armed already are left as they are. Pages of 2 MiB are armed whole.
    fn arm(&mut self, pages: Range<u64>) -> Result<(), TrackError>;

    /// How many pages are armed.
    fn armed(&self) -> u64;

    /// Adds the pages written since they were armed, or last harvested, to `into`, and returns
    /// how many were new there. Pages never armed are not reported.
    ///
    /// Each page is armed again before it appears in `into`, so that no write after that is missed.
    fn harvest(&mut self, into: &PageSet<SharedWords>) -> Result<u64, TrackError>;

    /// Holds the guest's writes to so many pages of 4 KiB per second from now on, by keeping the vCPUs that
    /// write out of the guest; vCPUs that do not write run on. It ends with [`stop`](Self::stop). Tells how
    /// that went since it began.
    ///
    /// Fails with [`TrackError::NoPace`] where it is not known which vCPU writes.
    fn pace(&mut self, _pages_per_second: u64) -> Result<Paced, TrackError> {
        Err(TrackError::NoPace)
    }

    /// Ends tracking; the guest runs at full speed again. Does nothing if it has not begun.
    fn stop(&mut self) -> Result<(), TrackError>;
}

#[cfg(test)]
mod tests;
