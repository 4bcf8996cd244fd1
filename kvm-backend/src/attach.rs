//! The VMM's side of the attach protocol ([`memlane_protocol::wire::attach`]).
//!
//! A VMM implements [`Vmm`] and calls [`serve`]. A thread then connects to the daemon, lends it the guest's
//! memory, and carries out its requests. When the daemon goes away, tracking ends and the thread connects again.
//! Meanwhile:
//!
//! - A guest that was paused and not relinquished is resumed. (It also is if a daemon that stays connected neither
//!   ends the pause nor takes the guest over within the time limit of its own request.)
//! - A guest that was relinquished ([`Request::Relinquish`]) stays paused until a daemon decides.
//! - A guest that has arrived, or is awaited, does not run before a daemon says so.
//!
//! [`Request::Relinquish`]: memlane_protocol::wire::attach::Request::Relinquish

mod connection;
mod lifecycle;
mod requests;
mod serve;
mod state_memfd;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memlane_protocol::wire::machine::GuestShape;

use crate::dirty::DirtyTracker;
pub use crate::error::AttachError;
use crate::ram::GuestRam;

pub use serve::{Attachment, Ended, Options, serve};

/// Why a VMM could not carry out a request; the daemon passes the text on to the operator.
pub type VmmError = Box<dyn std::error::Error + Send + Sync>;

/// The VMM, as the attach thread uses it.
///
/// Only the attach thread calls these functions, and it holds the lock of the `Mutex` that was given to [`serve`].
pub trait Vmm: Send {
    /// Describes the guest; if one is awaited, describes what this VMM could run.
    fn shape(&self) -> GuestShape;

    /// Returns the guest's memory.
    fn ram(&self) -> &Arc<GuestRam>;

    /// Returns the tracker of that memory.
    fn tracker(&mut self) -> &mut dyn DirtyTracker;

    /// Pauses all vCPUs; none of them runs when this returns. It does nothing to a paused guest.
    ///
    /// # Errors
    ///
    /// The guest could not be paused; its vCPUs run on.
    fn pause(&mut self) -> Result<(), VmmError>;

    /// Resumes the vCPUs. It does nothing to a running guest.
    ///
    /// # Errors
    ///
    /// The guest could not be resumed; the attach thread tries again where the guest must run.
    fn resume(&mut self) -> Result<(), VmmError>;

    /// Returns the state of the paused guest, which is everything but its memory.
    ///
    /// # Errors
    ///
    /// The state could not be read; the guest stays paused.
    fn save(&mut self) -> Result<Vec<u8>, VmmError>;

    /// Loads the state that [`Vmm::save`] returned on another host. The guest stays paused until [`Vmm::resume`].
    ///
    /// # Errors
    ///
    /// The state could not be loaded; the guest must not run.
    fn load(&mut self, state: &[u8]) -> Result<(), VmmError>;

    /// Discards the guest, which runs elsewhere or will never run here. It must never run again in this VMM, which
    /// should end if it has no other guest. The attachment ends after this. From here on, memory that never
    /// arrived reads as zeros.
    fn discard(&mut self);

    /// Reports a change of tracking, for the VMM's own statistics.
    fn tracking_changed(&mut self, _phase: TrackingPhase) {}
}

/// A phase of tracking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrackingPhase {
    /// Tracking is on; no page is write-protected yet.
    Started,
    /// All pages are write-protected.
    WriteProtected,
    /// Tracking is off.
    Stopped,
}

/// Locks the VMM. After a panic in another thread the guest still must not stay paused, so a poisoned lock is
/// taken too.
fn lock<'a>(vmm: &'a Mutex<dyn Vmm>) -> MutexGuard<'a, dyn Vmm + 'static> {
    vmm.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
