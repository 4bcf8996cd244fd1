//! Finding the pages that a running guest writes.
//!
//! Three trackers implement one trait, [`DirtyTracker`], for the process that runs the guest: [`LogTracker`]
//! reads KVM's dirty bitmap, [`RingTracker`] reads KVM's dirty rings, and [`PagemapTracker`] reads the page
//! tables over userfaultfd write protection. [`ExternalTracker`] reads the page tables of another process, a VMM
//! that lent its descriptors and does nothing else for it.

pub mod external;
mod hole_watch;
pub mod log;
pub mod pagemap;
mod protected_pages;
pub mod ring;
mod scan;
mod throttle;

use std::ops::Range;

use memlane_protocol::PageSet;
use memlane_protocol::wire::machine::TrackerKind;

pub use external::{ExternalTracker, Harvest, WriteProtection};
pub use log::LogTracker;
pub use pagemap::PagemapTracker;
pub use ring::{RingHandle, RingSize, RingTracker};
pub use throttle::ThrottleStats;

pub use crate::error::TrackError;
use crate::shared::SharedWords;

use protected_pages::ProtectedPages;

/// Finds the pages that a guest writes, without ever stopping it.
///
/// Pages are numbered as in [`GuestRam`](crate::ram::GuestRam), in units of 4 KiB. A copy of the guest converges
/// if each page is copied after it was write-protected, and again after each harvest that reports it. After a last
/// harvest of the paused guest, and the copies that it asks for, copy and guest are equal.
pub trait DirtyTracker: Send {
    /// Returns which tracker this is.
    fn kind(&self) -> TrackerKind;

    /// Begins to track. No page is write-protected yet, and the vCPUs run on. The call does nothing if tracking
    /// has begun already.
    ///
    /// # Errors
    ///
    /// The kernel refused; tracking has not begun then.
    fn start(&mut self) -> Result<(), TrackError>;

    /// Write-protects pages for the first time, so that every later write to them is reported. It reports nothing
    /// itself.
    ///
    /// Pages that are write-protected already are left as they are. Pages of 2 MiB are protected whole.
    ///
    /// # Errors
    ///
    /// [`TrackError::NotStarted`] before [`start`](Self::start), [`TrackError::Range`] for pages that the guest
    /// does not have, and what the kernel refused.
    fn write_protect(&mut self, pages: Range<u64>) -> Result<(), TrackError>;

    /// Returns how many pages have been write-protected, whether or not they were written since.
    fn write_protected_pages(&self) -> u64;

    /// Adds the pages that were written since they were write-protected, or last harvested, to `into`, and returns
    /// how many were new there. Pages that were never write-protected are not reported.
    ///
    /// Each page is write-protected again before it appears in `into`, so that no write after that is missed.
    ///
    /// # Errors
    ///
    /// After any error writes may have been missed: stop the tracker, and count every page as written.
    fn harvest(&mut self, into: &PageSet<SharedWords>) -> Result<u64, TrackError>;

    /// Limits the guest's writes to this many pages of 4 KiB per second from now on, by keeping the vCPUs that
    /// write out of the guest. vCPUs that do not write run on. The limit ends with [`stop`](Self::stop). The call
    /// returns what has been written since the limit was first set.
    ///
    /// # Errors
    ///
    /// [`TrackError::ThrottleUnsupported`] where the tracker does not learn which vCPU writes.
    fn throttle(&mut self, _pages_per_second: u64) -> Result<ThrottleStats, TrackError> {
        Err(TrackError::ThrottleUnsupported)
    }

    /// Ends tracking; the guest runs at full speed again. The call does nothing if tracking has not begun.
    ///
    /// # Errors
    ///
    /// The kernel refused to lift the protection; the call can be repeated.
    fn stop(&mut self) -> Result<(), TrackError>;
}

#[cfg(test)]
mod tests;
