//! [`DirtyBitmap`]: the pages that the VMM itself writes.

use std::sync::Arc;

use memlane_protocol::{PAGE_SIZE, PageSet};
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};

/// One region's part of the bitmap of pages that were written through [`vm_memory`]: KVM's dirty log and dirty
/// rings see only what the vCPUs write.
///
/// vm-memory sets a page's bit after it has written the page, and each time by a full atomic read-modify-write,
/// even where the bit is set already. So a tracker that takes the bit before finds it set again, and one that
/// takes it after copies what was written.
#[derive(Clone, Debug)]
pub struct DirtyBitmap {
    pages: Arc<PageSet>,
    first_page: u64,
}

impl DirtyBitmap {
    /// Returns the part for a region whose first page has the number `first_page` in `pages`.
    pub(super) fn new(pages: Arc<PageSet>, first_page: u64) -> Self {
        Self { pages, first_page }
    }

    /// Returns the page at an offset, in bytes, into the region.
    fn page(&self, offset: usize) -> u64 {
        self.first_page.saturating_add(offset as u64 / PAGE_SIZE)
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DirtyBitmap {
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
