//! [`MappedBlocks`]: what of a guest's memory has been mapped into this process on purpose.

use std::ops::Range;

use memlane_protocol::PageSet;

/// Pages that the kernel maps at a time around one that is read: 64 KiB (`fault_around_bytes`).
pub(super) const BLOCK_PAGES: u64 = 16;

/// Blocks of pages that are mapped, so that nobody asks the kernel for them again: walking the page
/// tables of what is there costs a tenth of receiving it.
///
/// A hint: whoever punches holes from another process unmaps pages here too, and they are faulted in.
#[derive(Debug)]
pub(super) struct MappedBlocks(PageSet);

impl MappedBlocks {
    /// Of memory of so many pages, of which nothing is mapped.
    pub(super) fn new(pages: u64) -> Self {
        Self(PageSet::new(pages.div_ceil(BLOCK_PAGES)))
    }

    /// What of `pages` lies in blocks that are not mapped, as one range; it may be empty.
    pub(super) fn unmapped(&self, pages: &Range<u64>) -> Range<u64> {
        let blocks = pages.start / BLOCK_PAGES..pages.end.div_ceil(BLOCK_PAGES);
        let is_unmapped = |block: &u64| !self.0.contains(*block);
        match blocks.clone().find(is_unmapped).zip(blocks.rev().find(is_unmapped)) {
            Some((first, last)) => {
                pages.start.max(first * BLOCK_PAGES)..pages.end.min((last + 1) * BLOCK_PAGES)
            }
            None => pages.end..pages.end,
        }
    }

    /// All of `pages` has been mapped.
    pub(super) fn note(&self, pages: &Range<u64>) {
        self.0.insert_range(pages.start.div_ceil(BLOCK_PAGES)..pages.end / BLOCK_PAGES);
    }

    /// Some of `pages` may not be mapped any more.
    pub(super) fn forget(&self, pages: &Range<u64>) {
        let mut blocks = pages.start / BLOCK_PAGES..pages.end.div_ceil(BLOCK_PAGES);
        // Run by run, as holes are made that are far longer than what is noted in them.
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
        let mapped = MappedBlocks::new(100);
        assert_eq!(mapped.unmapped(&(5..90)), 5..90);
        mapped.note(&(5..50));
        assert_eq!(mapped.unmapped(&(5..90)), 5..90);
        assert_eq!(mapped.unmapped(&(16..90)), 48..90);
        assert!(mapped.unmapped(&(17..47)).is_empty());
        mapped.forget(&(30..31));
        assert_eq!(mapped.unmapped(&(20..47)), 20..32);
    }
}
