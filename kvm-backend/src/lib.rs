//! Everything that Memlane asks of the kernel about a guest. A VMM links this crate.
//!
//! - [`ram`] is the guest's memory: shared mappings behind descriptors.
//! - [`dirty`] finds the pages that a running guest writes.
//! - [`userfault`] is what a tracker needs for that, and whoever holds up a guest's writes or provides
//!   pages that are missing; [`foreign_ram`] tells where they lie in the process of the guest.
//! - [`shared`] is the memory in which a VMM hands those pages to its daemon.
//! - [`vcpu`] and [`state`] capture and restore everything but memory; [`compat`] says beforehand
//!   whether a host can.
//! - [`attach`] serves the daemon's requests inside the VMM; [`packet`] is how both ends of that
//!   socket send bytes with descriptors, and [`descriptors`] what they say when they have too many.

pub mod attach;
pub mod compat;
pub mod descriptors;
pub mod dirty;
mod error;
pub mod foreign_ram;
mod ioctl;
pub mod packet;
pub mod ram;
pub mod shared;
pub mod state;
pub mod userfault;
pub mod vcpu;

pub use error::{AttachError, RamError, RamLost, TrackError};
