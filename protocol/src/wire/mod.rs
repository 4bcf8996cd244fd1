//! The wire formats: every byte that crosses a socket.
//!
//! - [`hello`] opens each connection between daemons and settles the version.
//! - [`control`] carries an order between two daemons.
//! - [`frame`] carries pages on a lane.
//! - [`attach`] is spoken between the daemon and a VMM on the same host.
//! - [`machine`] describes a guest, and what a host can run.
//! - [`starter`] is spoken between the daemon and the program that starts QEMU.
//!
//! Integers are little-endian. A decoder takes any bytes and returns a value or a [`WireError`]; nothing that a peer
//! wrote is used before it is checked.

pub mod attach;
pub mod control;
mod error;
pub mod frame;
pub mod hello;
pub mod machine;
mod plain;
mod reader;
pub mod starter;
mod text;

pub use error::WireError;
pub use plain::{is_obeyed, plain, plain_lines};
pub use reader::MAX_TEXT_BYTES;
pub use text::{BadLabel, Label};

#[cfg(test)]
mod tests;
