//! LZ4 at the sending end: a frame's pages, copied and compressed.

use std::time::{Duration, Instant};

use lz4_flex::block::{compress_into, get_maximum_output_size};
use memlane_kvm::ram::GuestRam;
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::compression::{Compression, Load};
use memlane_protocol::wire::frame::{Content, Run, contents_bytes};

use crate::thread_clock::ThreadClock;

/// One page in this many is sampled to tell whether a frame is worth compressing.
const SAMPLED: u64 = 16;

/// Compresses the frames of one lane, where that is worth it. Its buffers hold one frame.
pub(crate) struct Compressor {
    decisions: Compression,
    /// This is a copy of the pages, because the guest goes on writing the originals.
    contents: Vec<u8>,
    block: Vec<u8>,
}

/// The compressed block that is sent in place of a frame's pages.
pub(crate) struct Block<'a> {
    /// The compressed bytes.
    pub bytes: &'a mut [u8],
    /// The bytes of the pages before compression.
    pub contents: &'a [u8],
}

impl Compressor {
    /// Makes a compressor that does not compress before it has [observed](Self::observe) that this is worth it.
    pub(crate) fn new() -> Self {
        let (decisions, contents, block) = Default::default();
        Self { decisions, contents, block }
    }

    /// Notes that the lane has nothing to send.
    pub(crate) fn idle(&mut self) {
        self.decisions.idle();
    }

    /// Observes how the lane does at `now`, a time since any fixed moment: so many bytes of payload, and of the pages in
    /// it, are acknowledged. The clock is that of the lane's thread.
    pub(crate) fn observe(
        &mut self,
        now: Duration,
        clock: &ThreadClock,
        (wire_bytes, contents_bytes): (u64, u64),
    ) {
        if self.decisions.is_due(now)
            && let Some((ran, crowded)) = clock.read()
        {
            self.decisions.observe(now, Load { wire_bytes, contents_bytes, ran, crowded });
        }
    }

    /// Compresses the pages of a frame. Returns `None` if that is not worth the work.
    pub(crate) fn compress(&mut self, ram: &GuestRam, runs: &[Run]) -> Option<Block<'_>> {
        let bytes = contents_bytes(runs);
        if !self.decisions.wants_sample(bytes) {
            return None;
        }
        let sample = runs.iter().filter(|run| run.content == Content::Data).flat_map(sampled_pages);
        let (sampled, compressed) = self.sample(ram, sample);
        if !self.decisions.judge_sample(sampled, compressed) {
            return None;
        }
        let began = Instant::now();
        let filled = copy(ram, runs, grown(&mut self.contents, bytes as usize))?;
        let block = grown(&mut self.block, get_maximum_output_size(filled.len()));
        let length = compress_into(filled, block).ok()?;
        let worth = self.decisions.judge_frame(bytes, length as u64, began.elapsed());
        let contents = &self.contents[..bytes as usize];
        worth.then_some(Block { bytes: &mut self.block[..length], contents })
    }

    /// Compresses each of these pages by itself. Returns how many bytes they have, and how many they become.
    fn sample(&mut self, ram: &GuestRam, pages: impl Iterator<Item = u64>) -> (u64, u64) {
        let mut page = [0; PAGE_SIZE as usize];
        let block = grown(&mut self.block, get_maximum_output_size(page.len()));
        let (mut sampled, mut compressed) = (0, 0);
        for number in pages {
            if ram.copy_page(number, &mut page) {
                sampled += PAGE_SIZE;
                compressed += compress_into(&page, block).map_or(PAGE_SIZE, |bytes| bytes as u64);
            }
        }
        (sampled, compressed)
    }

    /// Leaks the block, which the kernel may still read if the io_uring is broken.
    pub(crate) fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.block));
    }
}

/// Returns the pages of a run that are sampled: each is in the middle of the pages that it stands for.
fn sampled_pages(run: &Run) -> impl Iterator<Item = u64> + use<> {
    let pages = run.pages.clone();
    let middle = (pages.end - pages.start).min(SAMPLED) / 2;
    (pages.start + middle..pages.end).step_by(SAMPLED as usize)
}

/// Copies the pages with data to `into`. Returns `None` if memory is gone.
fn copy<'a>(ram: &GuestRam, runs: &[Run], into: &'a mut [u8]) -> Option<&'a [u8]> {
    let mut rest = &mut *into;
    for run in runs.iter().filter(|run| run.content == Content::Data) {
        let (piece, left) = rest.split_at_mut(run.payload_bytes() as usize);
        rest = left;
        if !ram.copy_pages(run.pages.clone(), piece) {
            return None;
        }
    }
    Some(into)
}

/// Returns the first so many bytes of `buffer`, which grows if it is shorter.
pub(crate) fn grown(buffer: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    if buffer.len() < bytes {
        buffer.resize(bytes, 0);
    }
    &mut buffer[..bytes]
}

#[cfg(test)]
mod tests {
    use memlane_kvm::ram::Backing;

    use super::*;

    const PAGES: u64 = 64;

    /// One that a wire of 100 MB/s holds up.
    fn held_up() -> Compressor {
        let mut compressor = Compressor::new();
        let idle = Load { wire_bytes: 0, contents_bytes: 0, ran: Duration::ZERO, crowded: Duration::ZERO };
        for second in 0..2 {
            let load = Load { wire_bytes: second * 100_000_000, ..idle };
            compressor.decisions.observe(Duration::from_secs(second), load);
        }
        compressor
    }

    /// Memory whose lines all begin alike; `noise` of the 8 words of a line are of no pattern.
    fn ram(noise: usize) -> GuestRam {
        let ram = GuestRam::create(&[(0, PAGES * PAGE_SIZE)], &Backing::Memfd).unwrap();
        let slice = ram.slices(0..PAGES).next().unwrap();
        let mut random = 1u64;
        for word in 0..slice.len / 8 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let value = if word % 8 < noise { random ^ random >> 29 } else { 5 };
            // SAFETY: within the slice, which no other thread uses.
            unsafe { slice.ptr.cast::<u64>().add(word).write(value) };
        }
        ram
    }

    fn run(pages: std::ops::Range<u64>, content: Content) -> Run {
        Run { pages, content }
    }

    #[test]
    fn pages_are_compressed_in_the_order_of_their_runs() {
        let runs = [run(40..50, Content::Data), run(50..60, Content::Zero), run(3..33, Content::Data)];
        let (mut compressor, ram) = (held_up(), ram(2));
        let block = compressor.compress(&ram, &runs).unwrap();
        let mut expected = vec![0; 40 * PAGE_SIZE as usize];
        let (first, second) = expected.split_at_mut(10 * PAGE_SIZE as usize);
        assert!(ram.copy_pages(40..50, first) && ram.copy_pages(3..33, second));
        assert!(block.contents == expected && 2 * block.bytes.len() < expected.len());
        let decompressed = lz4_flex::block::decompress(block.bytes, expected.len()).unwrap();
        assert!(decompressed == expected);
    }

    #[test]
    fn what_has_no_pattern_stays_and_so_does_what_no_wire_holds_up() {
        let runs = [run(0..PAGES, Content::Data)];
        assert!(held_up().compress(&ram(8), &runs).is_none());
        assert!(Compressor::new().compress(&ram(2), &runs).is_none());
        assert!(held_up().compress(&ram(2), &[run(0..PAGES + 1, Content::Data)]).is_none(), "no such pages");
        assert!(held_up().compress(&ram(2), &[run(0..PAGES, Content::Zero)]).is_none());
    }

    #[test]
    fn samples_are_spread_over_a_run() {
        let pages = |pages| sampled_pages(&Run { pages, content: Content::Data }).collect::<Vec<_>>();
        assert_eq!(pages(5..6), [5]);
        assert_eq!(pages(0..7), [3]);
        assert_eq!(pages(100..140), [108, 124]);
        assert_eq!(pages(0..256).len(), 16);
    }
}
