//! Memlane's formats and decisions.
//!
//! [`wire`] describes what crosses a socket. [`bandwidth`], [`compression`], [`convergence`], [`handover`],
//! [`liveness`], [`resumption`], [`throttle`] and [`window`] decide what to do next, as plain state machines that take events and return
//! actions. This crate opens no socket and reads no clock, so that the daemon, the tests and a simulator drive the same
//! code.
#![forbid(unsafe_code)]
#![warn(unreachable_pub, unnameable_types)]

pub mod bandwidth;
pub mod compression;
pub mod convergence;
pub mod handover;
pub mod lane_count;
pub mod liveness;
pub mod pages;
pub mod resumption;
pub mod throttle;
pub mod window;
pub mod wire;

pub use pages::{PAGE_SIZE, PageSet};
