//! The VMM's side of the attach protocol ([`memlane_protocol::wire::attach`]).
//!
//! A VMM implements [`Vmm`] and calls [`serve`]; a thread then connects to the daemon, lends it
//! the guest's memory, and does what it asks. When the daemon goes away, tracking ends, the
//! thread connects again, and:
//!
//! - a guest that was paused and not given up runs on by itself (as it does when a daemon that is there
//!   neither ends the pause nor takes the guest over in the time that it has said itself);
//! - a guest that was given up ([`Request::Relinquish`]) stays paused until a daemon decides;
//! - a guest that has arrived, or is awaited, does not run before a daemon says so.
//!
//! [`Request::Relinquish`]: memlane_protocol::wire::attach::Request::Relinquish

mod ownership;
mod serve;
mod session;

use std::sync::Arc;

use memlane_protocol::wire::machine::GuestShape;

use crate::dirty::DirtyTracker;
pub use crate::error::AttachError;
use crate::ram::GuestRam;

pub use serve::{Attachment, Ended, Options, serve};

/// Why a VMM could not do what was asked; the daemon passes its text on to the operator.
pub type VmmError = Box<dyn std::error::Error + Send + Sync>;

/// What the attach thread asks of the VMM around it.
///
/// Called with the lock held that was given to [`serve`], and by its thread alone.
pub trait Vmm: Send {
    /// The guest; for one that is awaited, what this VMM could run.
    fn shape(&self) -> GuestShape;

    /// The guest's memory.
    fn ram(&self) -> &Arc<GuestRam>;

    /// The tracker of that memory.
    fn tracker(&mut self) -> &mut dyn DirtyTracker;

    /// Stops all vCPUs; they stand still when this returns. After an error they run.
    /// Does nothing to a paused guest.
    fn pause(&mut self) -> Result<(), VmmError>;

    /// Lets the vCPUs run. Does nothing to a running guest.
    fn resume(&mut self) -> Result<(), VmmError>;

    /// Everything about the paused guest but its memory.
    fn save(&mut self) -> Result<Vec<u8>, VmmError>;

    /// Takes over what [`Vmm::save`] gave on another host. The guest stays paused until
    /// [`Vmm::resume`].
    fn load(&mut self, state: &[u8]) -> Result<(), VmmError>;

    /// The guest runs elsewhere, or will never run here: it must never run again, and the VMM is to end if it
    /// has no other guest. The attachment ends after this. Memory that never came reads as zeros from here on.
    fn discard(&mut self);

    /// Tells what tracking does, for the VMM's own statistics.
    fn tracking_changed(&mut self, _phase: TrackingPhase) {}
}

/// What tracking does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrackingPhase {
    /// It is on; nothing is armed yet.
    Started,
    /// All pages are armed.
    Armed,
    /// It is off.
    Stopped,
}

#[cfg(test)]
mod tests;
