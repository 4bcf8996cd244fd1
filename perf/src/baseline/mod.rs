//! What Memlane is held against: the limits of the machine itself.
//!
//! [`raw`] is what sockets carry between two hosts of a [`Lab`](memlane_lab::Lab) when nothing else is done, and
//! [`rpc`] how soon they bring a single page; [`memory`] is what one core copies into shared memory. [`qemu`] is QEMU's
//! own migration.

pub mod memory;
pub mod qemu;
pub mod raw;
pub mod report;
mod ring;
pub mod rpc;
