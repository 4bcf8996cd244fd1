//! [`Marks`]: the pages that the VMM itself writes.

use std::sync::Arc;

use memlane_protocol::{PAGE_SIZE, PageSet};
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};

/// Notes what is written through [`vm_memory`], for KVM's dirty log and ring see only what
/// the vCPUs write.
///
/// vm-memory marks a page after it has written it, and each mark is a full atomic
/// read-modify-write even where the bit is set already: a tracker that takes the bit before
/// finds the page marked again, one that takes it after copies what was written.
#[derive(Clone, Debug)]
pub struct Marks {
    pages: Arc<PageSet>,
    first_page: u64,
}

impl Marks {
    /// Marks for a region whose first page has the number `first_page` in `pages`.
    pub(super) fn new(pages: Arc<PageSet>, first_page: u64) -> Self {
        Self { pages, first_page }
    }

    fn page(&self, offset: usize) -> u64 {
        self.first_page.saturating_add(offset as u64 / PAGE_SIZE)
    }
}

impl<'a> WithBitmapSlice<'a> for Marks {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for Marks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(last) = len.checked_sub(1) {
            self.pages
                .insert_range(self.page(offset)..self.page(offset.saturating_add(last)).saturating_add(1));
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.pages.contains(self.page(offset))
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}
