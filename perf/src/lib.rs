//! Measures Memlane, and what it is held against in the same run, on the machine as it is.
//!
//! A [`scenario`] is one kind of migration: a guest, ports, and what is asked about them. It moves guests with Memlane
//! ([`memlane`]) and with its baselines ([`baseline`]) in turn, several times each, and makes a [`report`] of it: figures
//! of each, and ratios between them. A [`timeline`] is what a guest and its ports did in one move, and a [`page`] is a
//! file with pictures of all that.

pub mod baseline;
pub mod cpu;
pub mod memlane;
pub mod page;
pub mod peak;
mod picture;
pub mod report;
pub mod scenario;
pub mod timeline;
