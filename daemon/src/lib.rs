//! The Memlane daemon: moves running guests to other hosts.
//!
//! The control plane is one thread of tasks on tokio-uring: the [`api`], the attach socket, the
//! control connections, and one task for each half of a migration (`memlane_migrate`). The data plane is a
//! thread and an io_uring for each lane (`memlane_lane`). This crate wires them together.

#![forbid(unsafe_code)]

pub mod api;
pub mod arguments;
mod backend;
pub mod config;
mod control;
pub mod daemon;
mod host;
mod keys;
pub mod log;
pub mod metrics;
mod orders;
mod retry;
mod surroundings;
mod systemd;
mod views;
