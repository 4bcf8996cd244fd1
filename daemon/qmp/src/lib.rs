//! QMP, the QEMU Machine Protocol, without I/O: bytes become messages, and commands become lines.
//!
//! QEMU greets with its version, and the client leaves the negotiation mode with the command [`NEGOTIATE`]; from then on
//! both sides write JSON objects, one a line (QEMU's `docs/interop/qmp-spec.rst`). A [`Decoder`] takes the bytes that
//! were received and returns [`Message`]s; [`Commands`] writes commands, each with a number that its [`Answer`] repeats.
//! The caller does the I/O: sockets, descriptors and timeouts are not known here.
//!
//! [`options`] reads and changes what QEMU is told on its command line.

#![forbid(unsafe_code)]

mod command;
mod decoder;
mod message;
pub mod options;

pub use command::{Commands, NEGOTIATE};
pub use decoder::{DecodeError, Decoder, MAX_LINE_BYTES};
pub use message::{Answer, Event, Greeting, Message, Refusal};
