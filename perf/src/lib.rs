//! Measures the limits of the machine that Memlane runs on, for its own figures to be held against.
//!
//! [`raw`] is what sockets carry between two hosts of a [`Lab`](memlane_lab::Lab) when nothing else is done, and
//! [`rpc`] how soon they bring a single page; [`memory`] is what one core copies into shared memory; [`postcopy`] is how
//! long a guest waits for pages beside that; [`qemu`] is Memlane itself beside QEMU's own migration. All figures are
//! from one run, on the machine as it is.

pub mod memory;
pub mod postcopy;
pub mod qemu;
pub mod raw;
pub mod report;
mod ring;
pub mod rpc;
pub mod spread;
