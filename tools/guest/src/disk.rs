//! The threads that read a disk past the page cache, and check what came.
//!
//! Every word of 8 bytes on the disk is a function of its place. What has been read is checked at once, and once more much
//! later, before something else is read into the same memory: a page that came too late to be moved with the guest
//! holds what had been read there before.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, mpsc};

use crate::counters::{CheckCounters, Order};
use crate::memory::map;

/// This many reads of a disk are under way at once.
const READERS: u64 = 2;
/// This many bytes are read at once.
const READ_BYTES: usize = 16 << 10;
/// Each reader remembers this many reads.
const REMEMBERED: usize = 64;

/// Starts the threads that read `disk`. Returns what takes orders to check all that they remember.
pub(crate) fn start(disk: &str, counters: &Arc<CheckCounters>) -> Result<Vec<mpsc::Sender<Order>>, String> {
    let path = format!("/dev/{disk}");
    let failed = |error: std::io::Error| format!("opening {path}: {error}");
    let sectors = std::fs::read_to_string(format!("/sys/class/block/{disk}/size")).map_err(failed)?;
    let blocks = sectors.trim().parse::<u64>().unwrap_or(0) * 512 / READ_BYTES as u64;
    if blocks == 0 {
        return Err(format!("{path} is too small to be read"));
    }
    let readers = (0..READERS).map(|number| {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path).map_err(failed)?;
        let memory = map((REMEMBERED * READ_BYTES) as u64)?;
        let (orders, receiver) = mpsc::channel();
        let reader = Reader { file, blocks, memory, held: [None; REMEMBERED], counters: counters.clone() };
        std::thread::spawn(move || reader.run(number, &receiver));
        Ok(orders)
    });
    readers.collect()
}

struct Reader {
    file: File,
    /// The disk has this many pieces of [`READ_BYTES`].
    blocks: u64,
    memory: &'static mut [u64],
    /// These places of the disk were read into the parts of `memory`.
    held: [Option<u64>; REMEMBERED],
    counters: Arc<CheckCounters>,
}

impl Reader {
    fn run(mut self, number: u64, orders: &mpsc::Receiver<Order>) {
        for turn in 0.. {
            while let Ok(done) = orders.try_recv() {
                (0..REMEMBERED).for_each(|part| self.check(part));
                // Who asked may have hung up.
                let _ = done.send(());
            }
            let part = (turn % REMEMBERED as u64) as usize;
            self.check(part);
            // Every piece in its turn, by steps that have no divisor in common with powers of 2.
            let block = (turn * READERS + number).wrapping_mul(2_654_435_761) % self.blocks;
            if let Err(error) = self.read(part, block * READ_BYTES as u64) {
                self.counters.note(Some(format!("the disk cannot be read: {error}")));
            }
            self.check(part);
        }
    }

    fn read(&mut self, part: usize, offset: u64) -> std::io::Result<()> {
        let place = place(part);
        let words = &mut self.memory[place];
        // SAFETY: bytes of our own memory, any of which may have any value.
        let bytes = unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), READ_BYTES) };
        self.held[part] = None;
        self.file.read_exact_at(bytes, offset)?;
        self.held[part] = Some(offset);
        Ok(())
    }

    fn check(&self, part: usize) {
        let Some(offset) = self.held[part] else { return };
        let wrong = place(part).zip((offset..).step_by(8)).find_map(|(at, place)| {
            // SAFETY: a word of our own memory. Volatile, since a move replaces it under the program's feet.
            let found = unsafe { (&raw const self.memory[at]).read_volatile() };
            (found != word(place)).then_some((place, found))
        });
        let text = |(place, found)| format!("byte {place} of the disk was read as {found:#018x}");
        self.counters.note(wrong.map(text));
    }
}

/// The words of the reader's memory that belong to a part of it.
fn place(part: usize) -> std::ops::Range<usize> {
    const WORDS: usize = READ_BYTES / size_of::<u64>();
    part * WORDS..(part + 1) * WORDS
}

/// Returns the word that is at `offset` of the disk, as `tools/lab/src/late_disk.rs` has it.
fn word(offset: u64) -> u64 {
    offset.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
