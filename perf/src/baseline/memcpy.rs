//! The speed at which one core copies into shared memory, and reads from it.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::baseline::memory::{MemoryState, SharedMemory, warm_up};

/// Copies `bytes` into fresh shared memory on one core, and then once more, now that its pages are there.
///
/// # Errors
///
/// If the memory is not to be had.
pub fn measure_memcpy(bytes: usize) -> Result<MemcpyReport> {
    let source = SharedMemory::with_pattern(bytes)?;
    copy_twice(&source)
}

/// Copies memory that exists already, as [`measure_memcpy`] does.
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

/// The speed at which one core reads memory that exists, in GB (10^9 bytes) a second.
#[derive(Debug, Clone, Copy)]
pub struct ReadFigures {
    /// The speed if the core has not touched a page of the mapping yet, like a process that shares a guest's memory.
    pub unmapped: f64,
    /// The speed if the core has read all pages before.
    pub mapped: f64,
}

/// Reads all of `memory` on one core, as if it had just been mapped, and then once more.
///
/// # Errors
///
/// If the kernel does not forget that the pages were mapped.
pub fn measure_read(memory: &SharedMemory) -> Result<ReadFigures> {
    memory.unmap_pages()?;
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

/// The result of [`measure_memcpy`].
#[derive(Debug, Clone, Serialize)]
pub struct MemcpyReport {
    /// The number of bytes that each copy moves.
    pub bytes: usize,
    /// The copy into memory whose pages had to be allocated.
    pub fresh: CopyFigures,
    /// The copy into memory whose pages existed.
    pub prepared: CopyFigures,
}

/// The figures of one copy. GB are powers of ten.
#[derive(Debug, Clone, Serialize)]
pub struct CopyFigures {
    /// The time that it took, in seconds.
    pub seconds: f64,
    /// The number of GB copied in a second.
    pub gb_per_second: f64,
}

impl CopyFigures {
    pub(crate) fn new(bytes: usize, elapsed: Duration) -> Self {
        let seconds = elapsed.as_secs_f64();
        Self { seconds, gb_per_second: bytes as f64 / 1e9 / seconds }
    }
}

impl fmt::Display for MemcpyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "memcpy of {:.2} GB on one core", self.bytes as f64 / 1e9)?;
        writeln!(f, "  fresh    {:5.2} GB/s: {:.3} s", self.fresh.gb_per_second, self.fresh.seconds)?;
        write!(f, "  prepared {:5.2} GB/s: {:.3} s", self.prepared.gb_per_second, self.prepared.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
