//! The messages between two daemons on a control connection, which follow the [`hello`](super::hello).
//!
//! Each message is a [header](HEADER_BYTES) with its kind and length, and a body. The source offers a guest, the
//! destination accepts or refuses it, and so on. The [`handover`](crate::handover) messages that [`Control::Handover`]
//! carries decide which host owns the guest.

mod codec;
mod fetch;
mod message;
mod offer;
mod qemu;

pub use codec::{HEADER_BYTES, decode_header};
pub use fetch::{FetchReport, MAX_WORDS, Missing};
pub use message::{
    Control, DIGEST_CHUNK_BYTES, LAST_ITERATION, MAX_BODY_BYTES, MAX_DIGESTS, MAX_RANGES,
    MAX_STATE_CHUNK_BYTES,
};
pub use offer::{Accept, MAX_PORTS, MAX_REFUSALS, Offer, Port, Refusal, RefusalKind};
pub use qemu::{MAX_DEFINITION_BYTES, MAX_DISKS, MAX_NAME_BYTES, MAX_PART_BYTES, MAX_PARTS, QemuGuest};
