//! Measures the limits of the machine that Memlane runs on, for its own figures to be held against.
//!
//! [`raw`] is what sockets carry between two hosts of a [`Lab`](memlane_lab::Lab) when nothing else is done;
//! [`memory`] is what one core copies into shared memory; [`qemu`] is Memlane itself beside QEMU's own migration. All
//! figures are from one run, on the machine as it is.

pub mod memory;
pub mod qemu;
pub mod raw;
pub mod report;
mod ring;
