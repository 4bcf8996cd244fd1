//! What a sender keeps of a frame.

use memlane_protocol::wire::frame::{FRAME_HEADER_BYTES, MAX_RUNS, RUN_BYTES, Run};

use crate::message::Message;
use crate::send::method::SendMethod;

/// One frame, from its claim to its acknowledgement.
pub struct Slot {
    pub sequence: u64,
    pub runs: Vec<Run>,
    pub head: Vec<u8>,
    pub message: Box<Message>,
    /// Bytes of its pages,
    pub contents_bytes: u64,
    /// and what of them is on the wire: less, if they are compressed.
    pub payload_bytes: u64,
    pub way: SendMethod,
    /// The kernel has not yet released the pages of a zero-copy send.
    pub notifications: u32,
}

impl Slot {
    pub fn new() -> Self {
        Self {
            sequence: 0,
            runs: Vec::with_capacity(MAX_RUNS),
            head: Vec::with_capacity(FRAME_HEADER_BYTES + MAX_RUNS * RUN_BYTES),
            message: Message::new(),
            contents_bytes: 0,
            payload_bytes: 0,
            way: SendMethod::Copy,
            notifications: 0,
        }
    }
}
