//! Allocating and freeing a guest's memory, and [`PopulatedBlocks`]: what of it has been mapped into this process.

use std::io;
use std::ops::Range;

use memlane_protocol::{PAGE_SIZE, PageSet};
use rustix::fs::FallocateFlags;
use rustix::mm::Advice;

use super::GuestRam;
use super::layout::is_huge;

/// The number of pages that the kernel maps around a page that is read, "fault-around" (64 KiB,
/// `fault_around_bytes`).
const FAULT_AROUND_PAGES: u64 = 16;

impl GuestRam {
    /// Makes `pages` zero and frees their memory (fallocate(2), `FALLOC_FL_PUNCH_HOLE`). If a 2 MiB page is
    /// covered in part, the kernel zeroes that part and keeps the page.
    ///
    /// # Errors
    ///
    /// The kernel refused; some of the pages may be zero then.
    pub fn punch(&self, pages: Range<u64>) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for (index, piece) in self.pieces(pages) {
            let (file, offset) = self.file_range(index, &piece);
            let bytes = (piece.end - piece.start) * PAGE_SIZE;
            rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, flags, offset, bytes))?;
            self.extent_cache.remove(&piece);
            self.populated.forget(&piece);
        }
        Ok(())
    }

    /// Takes `pages` from the guest, as a VMM does for its balloon: they are zero from now on, and the VMM's
    /// tracker reports them.
    ///
    /// The balloon has to wait while the guest's writes are throttled by write protection, when the VMM's own
    /// tracker is off, and while memory is still to come by post-copy.
    ///
    /// # Errors
    ///
    /// The kernel refused; some of the pages may be zero then.
    pub fn discard(&self, pages: Range<u64>) -> io::Result<()> {
        // Holes stay as they are, and are not to be reported.
        for extent in self.data_extents_uncached(pages)? {
            self.punch(extent.clone())?;
            // The bits are set afterwards, as they are for writes.
            self.dirty.insert_range(extent);
        }
        Ok(())
    }

    /// Allocates `pages` and maps them for writing (madvise(2), `MADV_POPULATE_WRITE`), so that the first write to
    /// them takes no fault. What the pages hold stays.
    ///
    /// # Errors
    ///
    /// There is no memory for them, or the file was truncated.
    pub fn populate_write(&self, pages: Range<u64>) -> io::Result<()> {
        self.populate(pages, Advice::LinuxPopulateWrite)
    }

    /// Maps `pages` (madvise(2), `MADV_POPULATE_READ`), for reading and writing, since the mapping is shared.
    ///
    /// The kernel maps pages that are allocated already 16 at a time, as it never does for writing: this takes a
    /// tenth of the time of [`populate_write`](Self::populate_write). It allocates the others among them. But if
    /// none of the pages is allocated, the call does nothing: allocating a page when it is written costs less. The
    /// call also skips what it has mapped before, and what a fault or two would map as soon: fewer than those 16
    /// pages, and huge pages, about which moreover the file does not tell whether they are allocated.
    ///
    /// # Errors
    ///
    /// There is no memory for them, or the file was truncated.
    pub fn populate_read(&self, pages: Range<u64>) -> io::Result<()> {
        for (index, piece) in self.pieces(pages) {
            let unmapped = self.populated.unmapped(&piece);
            let many = unmapped.end - unmapped.start >= FAULT_AROUND_PAGES;
            if many && !is_huge(&self.regions[index]) && self.first_data(&unmapped)?.is_some() {
                self.populate(unmapped.clone(), Advice::LinuxPopulateRead)?;
                self.populated.note(&unmapped);
            }
        }
        Ok(())
    }

    /// Populates the page tables of `pages` by madvise(2).
    fn populate(&self, pages: Range<u64>, advice: Advice) -> io::Result<()> {
        for slice in self.slices(pages) {
            // SAFETY: the slice lies within a mapping of ours; populating changes no contents.
            let populate = || unsafe { rustix::mm::madvise(slice.ptr.cast(), slice.len, advice) };
            rustix::io::retry_on_intr(populate)?;
        }
        Ok(())
    }
}

/// The blocks of pages that are mapped, so that the kernel is not asked for them again: walking the page tables of
/// what is mapped costs a tenth of receiving it.
///
/// It is only a hint: a hole that another process punches unmaps pages here too, and they are then faulted in.
#[derive(Debug)]
pub(super) struct PopulatedBlocks(PageSet);

impl PopulatedBlocks {
    /// Returns the blocks of a memory of this many pages, none of which is mapped.
    pub(super) fn new(pages: u64) -> Self {
        Self(PageSet::new(pages.div_ceil(FAULT_AROUND_PAGES)))
    }

    /// Returns what of `pages` lies in blocks that are not mapped, as one range, which may be empty.
    pub(super) fn unmapped(&self, pages: &Range<u64>) -> Range<u64> {
        let blocks = pages.start / FAULT_AROUND_PAGES..pages.end.div_ceil(FAULT_AROUND_PAGES);
        let is_unmapped = |block: &u64| !self.0.contains(*block);
        match blocks.clone().find(is_unmapped).zip(blocks.rev().find(is_unmapped)) {
            Some((first, last)) => {
                pages.start.max(first * FAULT_AROUND_PAGES)..pages.end.min((last + 1) * FAULT_AROUND_PAGES)
            }
            None => pages.end..pages.end,
        }
    }

    /// Notes that all of `pages` have been mapped.
    pub(super) fn note(&self, pages: &Range<u64>) {
        self.0.insert_range(pages.start.div_ceil(FAULT_AROUND_PAGES)..pages.end / FAULT_AROUND_PAGES);
    }

    /// Notes that some of `pages` may not be mapped any more.
    pub(super) fn forget(&self, pages: &Range<u64>) {
        let mut blocks = pages.start / FAULT_AROUND_PAGES..pages.end.div_ceil(FAULT_AROUND_PAGES);
        // It goes run by run, as holes are made that are far longer than what is noted in them.
        while let Some(run) = self.0.next_run_within(blocks.clone()) {
            blocks.start = run.end;
            self.0.remove_range(run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_blocks_are_mapped_once_and_parts_as_often_as_asked() {
        let mapped = PopulatedBlocks::new(100);
        assert_eq!(mapped.unmapped(&(5..90)), 5..90);
        mapped.note(&(5..50));
        assert_eq!(mapped.unmapped(&(5..90)), 5..90);
        assert_eq!(mapped.unmapped(&(16..90)), 48..90);
        assert!(mapped.unmapped(&(17..47)).is_empty());
        mapped.forget(&(30..31));
        assert_eq!(mapped.unmapped(&(20..47)), 20..32);
    }
}
