//! The baselines that Memlane is compared with: the limits of the machine itself, and QEMU.
//!
//! [`raw`] is what sockets carry between two hosts of a [`Lab`](memlane_lab::Lab) when nothing else is done, and
//! [`rpc`] how soon they bring a single page; [`memcpy`] is what one core copies into shared [`memory`]. [`qemu`] is
//! QEMU's own migration.

pub mod cipher;
pub mod memcpy;
pub mod memory;
pub mod qemu;
pub mod raw;
mod ring;
pub mod rpc;
