//! Shared memory as a guest's RAM is made of, and what one core copies into it.

use std::ops::{Deref, DerefMut};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};

use crate::baseline::report::{CopyFigures, MemcpyReport};

/// Whether the pages of a mapping are there before the measurement starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum MemoryState {
    /// Every page was allocated and mapped beforehand.
    Prepared,
    /// Nothing was touched: allocating and mapping the pages is part of what is measured.
    Fresh,
}

impl MemoryState {
    /// As on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prepared => "prepared",
            Self::Fresh => "fresh",
        }
    }
}

/// A shared mapping of a memfd that nobody else has.
#[derive(Debug)]
pub struct SharedMemory {
    address: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping belongs to no thread, and access follows the borrow of this value as for a `Box<[u8]>`.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; through a shared borrow the bytes can only be read.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Makes a mapping of `bytes` zeros.
    ///
    /// # Errors
    ///
    /// If the memory is not to be had.
    pub fn new(bytes: usize, state: MemoryState) -> Result<Self> {
        ensure!(bytes > 0, "a mapping of 0 bytes cannot be made");
        let file =
            rustix::fs::memfd_create("memlane-perf", MemfdFlags::CLOEXEC).context("creating a memfd")?;
        rustix::fs::ftruncate(&file, bytes as u64)
            .with_context(|| format!("sizing a memfd to {bytes} bytes"))?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel picks replaces none.
        let address =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, &file, 0) }
                .with_context(|| format!("mapping {bytes} bytes"))?;
        let memory = Self { address: address.cast(), bytes };
        if state == MemoryState::Prepared {
            // SAFETY: the range is the mapping made above; populating it changes no contents.
            unsafe { rustix::mm::madvise(address, bytes, Advice::LinuxPopulateWrite) }
                .with_context(|| format!("allocating {bytes} bytes"))?;
        }
        Ok(memory)
    }

    /// Makes a prepared mapping whose 64-bit words all differ, so that nothing can pass for something else.
    ///
    /// # Errors
    ///
    /// If the memory is not to be had.
    pub fn with_pattern(bytes: usize) -> Result<Self> {
        let mut memory = Self::new(bytes, MemoryState::Prepared)?;
        for (index, word) in memory.chunks_mut(size_of::<u64>()).enumerate() {
            // An odd factor (2^64 / the golden ratio) maps no two indices to the same word.
            let value = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
            word.copy_from_slice(&value[..word.len()]);
        }
        Ok(memory)
    }
}

impl Deref for SharedMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is `bytes` long and lives as long as `self`, and nobody else maps the memfd.
        unsafe { std::slice::from_raw_parts(self.address, self.bytes) }
    }
}

impl DerefMut for SharedMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`; the exclusive borrow of `self` is one of the only mapping.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the range is this value's mapping, and all borrows of it have ended.
        // The call fails only for a range that is none.
        let _ = unsafe { rustix::mm::munmap(self.address.cast(), self.bytes) };
    }
}

/// Touches as much memory as is about to be received, and gives it back, so that the kernel hands out pages that the machine
/// has.
///
/// A virtual machine gets pages that it has not used lately from its own host, at a sixth of the speed at which it hands
/// out those that were just given back: without this, whose turn comes after another's looks faster.
///
/// # Errors
///
/// If the memory is not to be had.
pub fn warm_up(bytes: u64) -> Result<()> {
    const MOST_BYTES: u64 = 4 << 30;
    // What the kernel takes for itself comes on top.
    let bytes = (bytes + bytes / 4).min(MOST_BYTES);
    SharedMemory::new(bytes.try_into()?, MemoryState::Prepared)
        .map(drop)
        .context("warming up the machine's memory")
}

/// How fast one core reads memory that is there, and does nothing with it.
#[derive(Debug, Clone, Copy)]
pub struct ReadFigures {
    /// When it has not touched a page of the mapping yet, as one that shares a guest's memory.
    pub unmapped: f64,
    /// When it has read them all before.
    pub mapped: f64,
}

/// Reads all of `memory` on one core, as if it had just been mapped, and then once more; in GB (10^9 bytes) a second.
///
/// # Errors
///
/// If the kernel does not forget that the pages were mapped.
pub fn measure_read(memory: &SharedMemory) -> Result<ReadFigures> {
    // SAFETY: the range is a mapping of a memfd, which keeps its contents; only the page tables lose them.
    unsafe { rustix::mm::madvise(memory.address.cast(), memory.bytes, Advice::LinuxDontNeed) }
        .context("unmapping pages")?;
    let read = || {
        let start = Instant::now();
        // Eight sums, so that the compiler may have them side by side.
        let mut sums = [0u64; 8];
        for piece in memory.chunks_exact(size_of_val(&sums)) {
            for (sum, word) in sums.iter_mut().zip(piece.chunks_exact(size_of::<u64>())) {
                *sum ^= u64::from_le_bytes(word.try_into().expect("a word has eight bytes"));
            }
        }
        std::hint::black_box(sums);
        CopyFigures::new(memory.len(), start.elapsed()).gb_per_second
    };
    let (unmapped, mapped) = (read(), read());
    Ok(ReadFigures { unmapped, mapped })
}

/// Copies `bytes` into fresh shared memory on one core, and then once more, now that its pages are there.
///
/// # Errors
///
/// If the memory is not to be had.
pub fn measure_memcpy(bytes: usize) -> Result<MemcpyReport> {
    let source = SharedMemory::with_pattern(bytes)?;
    copy_twice(&source)
}

/// As [`measure_memcpy`], of memory that is there already.
///
/// # Errors
///
/// If the memory is not to be had.
pub fn copy_twice(source: &SharedMemory) -> Result<MemcpyReport> {
    let bytes = source.len();
    warm_up(bytes as u64)?;
    let mut destination = SharedMemory::new(bytes, MemoryState::Fresh)?;
    let mut copy = || {
        let start = Instant::now();
        destination.copy_from_slice(source);
        CopyFigures::new(bytes, start.elapsed())
    };
    let (fresh, prepared) = (copy(), copy());
    ensure!(**source == *destination, "the copy differs from its source");
    Ok(MemcpyReport { bytes, fresh, prepared })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_starts_zero_in_either_state() {
        for state in [MemoryState::Prepared, MemoryState::Fresh] {
            let memory = SharedMemory::new(10_000, state).expect("memory");
            assert!(memory.len() == 10_000 && memory.iter().all(|&byte| byte == 0));
        }
        assert!(SharedMemory::new(0, MemoryState::Fresh).is_err());
    }

    #[test]
    fn the_words_of_a_pattern_differ() {
        let memory = SharedMemory::with_pattern(64 * 1024 + 3).expect("memory");
        let words: std::collections::HashSet<&[u8]> = memory.chunks_exact(8).collect();
        assert_eq!(words.len(), 8 * 1024);
    }

    #[test]
    fn reading_changes_nothing() {
        let memory = SharedMemory::with_pattern(1 << 20).expect("memory");
        let figures = measure_read(&memory).expect("a measurement");
        assert!(figures.unmapped > 0.0 && figures.mapped > 0.0);
        assert!(*memory == *SharedMemory::with_pattern(1 << 20).expect("memory"));
    }

    #[test]
    fn memcpy_reports_both_states() {
        let report = measure_memcpy(1 << 20).expect("memory");
        assert_eq!(report.bytes, 1 << 20);
        assert!(report.fresh.seconds > 0.0 && report.prepared.seconds > 0.0);
    }
}
