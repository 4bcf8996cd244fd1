//! Measures Memlane, and what it is held against in the same run, on the machine as it is.
//!
//! A [`scenario`] is one kind of migration: a guest, ports, and what is asked about them. It moves guests with Memlane
//! ([`memlane`]) and with its baselines ([`baseline`]; [`qemu`] is QEMU's own migration) in turn, several times each,
//! and makes a [`report`] of it: figures of each, and ratios between them.

pub mod baseline;
pub mod cpu;
pub mod memlane;
pub mod postcopy;
pub mod qemu;
pub mod report;
pub mod scenario;
