//! What the daemon has to do with the network and the disk, and how its one control thread works.
//!
//! The crate is the only user of tokio-uring besides the program itself. It knows nothing of guests or migrations.
//!
//! - [`link`] is the control connection to another daemon.
//! - [`port`] is what lanes are opened from and arrive at.
//! - [`config`] is what the configuration says of ports and peers.
//! - [`announce`] tells the switches of a network where a guest is.
//! - [`journal`] is what must be remembered across a crash, and [`private`] files that others cannot read.
//! - [`unix_socket`] is what local programs connect to.
//! - [`task`] runs and watches the tasks of the control thread, and [`log_limiter`] keeps a crowd from filling the log.

pub mod announce;
pub mod config;
pub mod journal;
pub mod link;
pub mod log_limiter;
pub mod port;
pub mod private;
pub mod task;
pub mod unix_socket;
