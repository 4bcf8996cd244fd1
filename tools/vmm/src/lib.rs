//! A small VMM whose guest can prove its memory whole.
//!
//! - [`workload`] is what the guest does, as a model; [`oracle`] compares RAM with it.
//! - [`guest`] is the guest itself: a bare-metal program under KVM, or the same on threads.
//! - [`vmm`] puts them together, and does what a Memlane daemon asks.
//! - [`statistics`] is what the guest saw, and [`control`] the socket that tells it.
//! - [`flags`] are the command line of the program.
//! - [`history`] is a file that says when the guest ran, which outlives the VMM.

pub mod control;
pub mod flags;
mod gate;
pub mod guest;
pub mod history;
pub mod oracle;
pub mod run_state;
pub mod statistics;
pub mod vmm;
pub mod workload;
