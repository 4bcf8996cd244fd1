//! This crate deals with the network and the disk for the daemon, and runs the daemon's one control thread.
//!
//! The crate is the only user of tokio-uring besides the program itself. It knows nothing of guests or migrations.
//!
//! - [`channel`] is an encrypted connection to another host, and [`link`] the control connection to its daemon.
//! - [`port`] opens lanes from the host's ports, and takes in those that arrive there.
//! - [`config`] holds what the configuration says of ports and peers.
//! - [`announce`] tells the switches of a network where a guest is.
//! - [`journal`] remembers what must survive a crash, and [`private`] makes files that others cannot read.
//! - [`unix_socket`] deals with the sockets that local programs connect to.
//! - [`task`] runs and watches the tasks of the control thread, [`resident`] keeps their code in memory, and
//!   [`log_limiter`] keeps a crowd from filling the log.

pub mod announce;
pub mod channel;
pub mod config;
mod error;
pub mod journal;
pub mod link;
pub mod log_limiter;
pub mod port;
pub mod private;
pub mod resident;
pub mod resumable;
pub mod task;
pub mod unix_socket;
