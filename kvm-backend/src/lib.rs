//! Everything that Memlane asks of the kernel about a guest. A VMM links this crate.
//!
//! - [`ram`] is the guest's memory: shared mappings behind descriptors.
//! - [`dirty`] finds the pages that a running guest writes.
//! - [`userfault`] is userfaultfd, which trackers need, and with which a daemon delays a guest's writes and
//!   provides missing pages; [`vmm_mapping`] translates between pages and addresses in the VMM's process.
//! - [`shared`] is the memory in which a VMM hands dirty pages to its daemon.
//! - [`vcpu`] and [`state`] capture and restore everything but memory; [`compat`] tells beforehand whether a host
//!   can run a guest.
//! - [`attach`] serves the daemon's requests inside the VMM; [`packet`] sends bytes with descriptors over the
//!   attach socket, and [`descriptors`] explains what to do when a process has run out of descriptors.
//!
//! Modules import only those after them: `attach`; `dirty`; `vmm_mapping`, `compat`; `state`; `ram`, `userfault`,
//! `vcpu`, `packet`; `shared`, `descriptors`, `error`.

pub mod attach;
mod clock;
pub mod compat;
pub mod descriptors;
pub mod dirty;
mod error;
mod ioctl;
pub mod packet;
pub mod ram;
pub mod shared;
pub mod state;
pub mod userfault;
pub mod vcpu;
pub mod vmm_mapping;

pub use error::{AttachError, RamError, RamFault, TrackError};
