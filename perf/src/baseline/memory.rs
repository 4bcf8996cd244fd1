//! Shared memory of the kind that a guest's RAM is made of.

use std::ops::{Deref, DerefMut};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};

/// Whether the pages of a mapping are there before the measurement starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum MemoryState {
    /// Every page was allocated and mapped beforehand.
    Prepared,
    /// No page was touched: the measurement includes allocating and mapping the pages.
    Fresh,
}

impl MemoryState {
    /// Returns the name that the command line uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prepared => "prepared",
            Self::Fresh => "fresh",
        }
    }
}

/// A shared mapping of a memfd that no other process has.
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

    /// Takes all pages out of the page tables. They keep their contents: the next access maps them again.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn unmap_pages(&self) -> Result<()> {
        // SAFETY: the range is a mapping of a memfd, which keeps its contents; only the page tables lose them.
        unsafe { rustix::mm::madvise(self.address.cast(), self.bytes, Advice::LinuxDontNeed) }
            .context("unmapping pages")
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

/// Touches as much memory as is about to be received, and frees it, so that the kernel hands out pages that the machine
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
}
