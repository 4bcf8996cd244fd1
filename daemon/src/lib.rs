//! The Memlane daemon: moves running guests to other hosts.
//!
//! The control plane is one thread of tasks on tokio-uring: the [`api`], the
//! [attach socket](guest::attach_socket), the [control connections](control), and one task for
//! each half of a [migration](migrate). The data plane is a thread and an io_uring for each
//! [`lane`].

pub mod announce;
pub mod api;
pub mod backend;
pub mod config;
pub mod control;
pub mod daemon;
pub mod guest;
pub mod hex;
pub mod host;
pub mod journal;
pub mod lane;
pub mod link;
pub mod log;
pub mod metrics;
pub mod migrate;
pub mod port;
pub mod priority;
pub mod private;
pub mod seldom;
pub mod systemd;
pub mod task;
pub mod unix_socket;
