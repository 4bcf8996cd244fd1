//! Filling the window: claims pages, makes frames of them, and compresses what is worth it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use memlane_protocol::wire::frame::{contents_bytes, encode_compressed_head};

use super::LaneSender;
use super::encode::{claim_frame, encode_frame};
use super::method::SendMethod;
use super::slot::Slot;
use crate::compress::Block;
use crate::{LaneError, LaneStats};

impl LaneSender {
    /// Sends frames until the window is full, or the kernel has no room, or there is nothing to claim.
    pub(super) fn fill_window(&mut self) -> Result<(), LaneError> {
        // A frame that is not yet handed over waits for room in the send buffer.
        self.full |= self.sending;
        while !self.sending {
            self.full |= self.window_bytes >= self.limit.bytes();
            let share = self.send_state.backlog.lane_share();
            let full = self.window_bytes >= self.limit.bytes_held(share);
            if full || self.window.len() >= self.limit.frames() || !self.send_next(share)? {
                break;
            }
        }
        Ok(())
    }

    /// Claims a frame and hands it to the kernel. If there is nothing to claim, rings the bell and returns `false`.
    fn send_next(&mut self, share: Duration) -> Result<bool, LaneError> {
        let mut slot = self.spare.pop().unwrap_or_else(Slot::new);
        let most_bytes = self.limit.frame_bytes(share);
        claim_frame(&self.send_state, &mut self.cursor, most_bytes, &mut slot.runs);
        if slot.runs.is_empty() {
            self.spare.push(slot);
            self.send_state.settle(1);
            (self.send_state.bell)();
            if self.window.is_empty() {
                self.full = false;
                self.limit.rest();
            }
            if let Some(compressor) = &mut self.compressor {
                compressor.idle();
            }
            return Ok(false);
        }
        self.sequence += 1;
        slot.sequence = self.sequence;
        slot.contents_bytes = contents_bytes(&slot.runs);
        if !self.encode_compressed(&mut slot) {
            slot.payload_bytes = encode_frame(&self.send_state, slot.sequence, &slot.runs, &mut slot.head);
            slot.method = if self.encryption.is_some() || self.send_state.devices_may_write() {
                SendMethod::Copy
            } else {
                self.trials.choose(slot.payload_bytes)
            };
            slot.message.fill(&mut slot.head, &self.send_state.ram, &slot.runs);
        }
        self.window_bytes += slot.payload_bytes;
        LaneStats::add(&self.stats.wire_bytes, slot.message.remaining() as u64);
        self.window.push_back(slot);
        // The memory that was read for the checksum or compressed may be cut off: then it did not hold the guest's data.
        self.send_state.ram.intact().map_err(LaneError::Memory)?;
        self.hand_over_newest()?;
        Ok(true)
    }

    /// Makes a compressed frame of the pages and returns `true`, if compression is allowed and worth it.
    fn encode_compressed(&mut self, slot: &mut Slot) -> bool {
        let compressor = self.compressor.as_mut();
        let block = compressor.and_then(|compressor| compressor.compress(&self.send_state.ram, &slot.runs));
        let Some(Block { bytes, contents }) = block else { return false };
        slot.payload_bytes = bytes.len() as u64;
        slot.method = SendMethod::Copy;
        let checksum = self.send_state.paused.load(Ordering::Acquire).then(|| crc32c::crc32c(contents));
        encode_compressed_head(&mut slot.head, slot.sequence, &slot.runs, checksum, slot.payload_bytes);
        // The block is left alone until this frame has been handed over, and the next one begins.
        slot.message.fill_plain(&mut slot.head, bytes);
        LaneStats::add(&self.stats.uncompressed_bytes, slot.contents_bytes);
        LaneStats::add(&self.stats.compressed_bytes, slot.payload_bytes);
        true
    }
}
