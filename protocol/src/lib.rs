//! Memlane's formats and decisions.
//!
//! What crosses a socket is described in [`wire`]; what to do next is decided in
//! [`bandwidth`], [`compression`], [`convergence`], [`handover`], [`liveness`], [`throttle`] and [`window`], as plain
//! state machines that take events and return actions. Nothing here opens a socket or reads a clock, so
//! that the daemon, the tests and a simulator drive the same code.
#![forbid(unsafe_code)]

pub mod bandwidth;
pub mod compression;
pub mod convergence;
pub mod handover;
pub mod liveness;
pub mod pages;
pub mod throttle;
pub mod window;
pub mod wire;

pub use pages::{PAGE_SIZE, PageSet};
