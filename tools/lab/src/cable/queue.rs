//! Packets that are on their way through a cable.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Instant;

use crate::tun::MAX_PACKET_BYTES;

/// The largest number of packets that a queue holds, however small they are.
const MAX_PACKETS: usize = 1 << 16;

/// Packets in the order of their arrival, in one piece of memory that is reused round and round.
pub(super) struct Queue {
    bytes: Box<[u8]>,
    /// The place of each packet in the memory, and the time when it is due, the oldest first.
    packets: VecDeque<(Range<usize>, Instant)>,
}

impl Queue {
    /// Makes a queue with room for so many bytes of packets, and at least for one packet.
    pub(super) fn new(bytes: usize) -> Self {
        // Untouched memory of zeros costs nothing yet.
        let bytes = vec![0; bytes.max(MAX_PACKET_BYTES)].into_boxed_slice();
        Self { bytes, packets: VecDeque::with_capacity(1024) }
    }

    /// Returns where the next packet may be written, if there is room for the longest one.
    pub(super) fn room(&mut self) -> Option<&mut [u8]> {
        let start = self.free()?;
        Some(&mut self.bytes[start..start + MAX_PACKET_BYTES])
    }

    /// Adds the packet that was written to the beginning of [`Queue::room`].
    pub(super) fn push(&mut self, length: usize, due: Instant) {
        let start = self.free().expect("the packet was written where there was room");
        assert!(0 < length && length <= MAX_PACKET_BYTES, "a packet of {length} bytes");
        self.packets.push_back((start..start + length, due));
    }

    /// Returns when the oldest packet is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.packets.front().map(|(_, due)| *due)
    }

    /// Returns the oldest packet.
    pub(super) fn front(&self) -> Option<&[u8]> {
        self.packets.front().map(|(place, _)| &self.bytes[place.clone()])
    }

    /// Forgets the oldest packet.
    pub(super) fn pop(&mut self) {
        self.packets.pop_front();
    }

    /// Finds where the longest packet would fit: behind the newest, or else at the beginning.
    fn free(&self) -> Option<usize> {
        let (Some((oldest, _)), Some((newest, _))) = (self.packets.front(), self.packets.back()) else {
            return Some(0);
        };
        if self.packets.len() == MAX_PACKETS {
            return None;
        }
        let fits = |start: usize, end: usize| (start + MAX_PACKET_BYTES <= end).then_some(start);
        if newest.start < oldest.start {
            return fits(newest.end, oldest.start);
        }
        fits(newest.end, self.bytes.len()).or_else(|| fits(0, oldest.start))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Draws what is done to a queue next.
    fn draw(state: &mut u64) -> usize {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 33) as usize
    }

    #[test]
    fn packets_come_out_as_they_went_in() {
        for seed in 0..50 {
            let mut state = seed;
            let (mut queue, mut model) =
                (Queue::new(5 * MAX_PACKET_BYTES / 2), VecDeque::<(Vec<u8>, Instant)>::new());
            let now = Instant::now();
            for step in 0..2000_u32 {
                if draw(&mut state).is_multiple_of(2) {
                    let Some(room) = queue.room() else {
                        let queued: usize = model.iter().map(|(packet, _)| packet.len()).sum();
                        assert!(queued > 0, "an empty queue has room");
                        continue;
                    };
                    let length = match draw(&mut state) % 3 {
                        0 => MAX_PACKET_BYTES,
                        _ => 1 + draw(&mut state) % MAX_PACKET_BYTES,
                    };
                    room[..length].fill(step as u8);
                    let due = now + Duration::from_millis(u64::from(step));
                    queue.push(length, due);
                    model.push_back((vec![step as u8; length], due));
                } else {
                    let expected = model.pop_front();
                    let found = queue.front().map(<[u8]>::to_vec).zip(queue.due());
                    assert!(found == expected, "seed {seed}, step {step}");
                    queue.pop();
                }
            }
        }
    }

    #[test]
    fn small_packets_are_bounded_too() {
        let mut queue = Queue::new(64 << 20);
        let now = Instant::now();
        for _ in 0..MAX_PACKETS {
            assert!(queue.room().is_some());
            queue.push(40, now);
        }
        assert!(queue.room().is_none());
        queue.pop();
        assert!(queue.room().is_some());
    }
}
