//! A frame in a sender's window.

use memlane_protocol::wire::frame::{FRAME_HEADER_BYTES, MAX_RUNS, RUN_BYTES, Run};

use crate::message::Message;
use crate::send::method::SendMethod;

/// One frame, from its claim to its acknowledgement.
pub(super) struct Slot {
    pub sequence: u64,
    pub runs: Vec<Run>,
    pub head: Vec<u8>,
    pub message: Box<Message>,
    /// The pages of the frame have this many bytes.
    pub contents_bytes: u64,
    /// This many bytes of payload are on the wire: fewer than `contents_bytes` if the frame is compressed.
    pub payload_bytes: u64,
    pub method: SendMethod,
    /// The kernel has yet to release the pages of this many zero-copy sends.
    pub notifications: u32,
}

impl Slot {
    pub(super) fn new() -> Self {
        Self {
            sequence: 0,
            runs: Vec::with_capacity(MAX_RUNS),
            head: Vec::with_capacity(FRAME_HEADER_BYTES + MAX_RUNS * RUN_BYTES),
            message: Message::new(),
            contents_bytes: 0,
            payload_bytes: 0,
            method: SendMethod::Copy,
            notifications: 0,
        }
    }
}
