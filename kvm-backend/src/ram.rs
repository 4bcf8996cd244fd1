//! [`GuestRam`]: a guest's memory, as shared mappings behind descriptors.
//!
//! A VMM makes it ([`GuestRam::create`]) and lends the descriptors to its daemon, which maps the same pages
//! ([`GuestRam::map`]). Pages have 4 KiB, whatever the size of the pages behind them. They are numbered densely
//! over the regions in order, so that gaps in the guest's address space have no numbers.

mod backing;
mod dirty_bitmap;
mod extent_cache;
mod extents;
mod layout;
mod observer;
mod populated;
mod sigbus;
mod slots;
mod write;
mod zero;

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use memlane_protocol::wire::machine::Region;
use memlane_protocol::{PAGE_SIZE, PageSet};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use self::extent_cache::DataExtentCache;
use self::populated::PopulatedBlocks;
use self::sigbus::SigbusGuard;
use self::write::WriteLock;

pub use backing::Backing;
pub use dirty_bitmap::DirtyBitmap;
pub use sigbus::install_sigbus_handler;
pub use slots::MemorySlot;
pub use zero::{is_zero, zero_pages};

pub use crate::error::{RamError, RamFault};

/// A guest's memory, mapped into this process. It is shared as `Arc<GuestRam>`.
#[derive(Debug)]
pub struct GuestRam {
    /// The guard is the first field, so that it ends before the regions are unmapped.
    sigbus_guard: SigbusGuard,
    memory: GuestMemoryMmap<DirtyBitmap>,
    regions: Vec<Region>,
    mapped: Vec<Mapped>,
    /// The pages that were written through `memory`.
    dirty: Arc<PageSet>,
    extent_cache: DataExtentCache,
    populated: PopulatedBlocks,
    write_lock: WriteLock,
    sealed: bool,
    /// Whether [`GuestRam::mark_as_observer`] was called.
    is_observer: AtomicBool,
}

/// A region, as it is mapped into this process.
#[derive(Debug)]
struct Mapped {
    pages: Range<u64>,
    mapping: Arc<MmapRegion<DirtyBitmap>>,
    file: Arc<File>,
}

/// A contiguous piece of guest memory in this process.
///
/// Guest and VMM write it at any time: read it as raw or volatile memory, never through a reference. The slice is
/// valid for as long as the [`GuestRam`] that it came from.
#[derive(Clone, Copy, Debug)]
pub struct HostSlice {
    /// The address of the first byte.
    pub ptr: *mut u8,
    /// The length in bytes, a multiple of the page size.
    pub len: usize,
    /// The number of the page that begins at `ptr`.
    pub first_page: u64,
}

// SAFETY: the value is an address and two numbers. Dereferencing the address is unsafe on any thread.
unsafe impl Send for HostSlice {}

impl GuestRam {
    /// Makes the memory of a guest: one region for each guest physical address and length, in bytes, in `layout`.
    ///
    /// Addresses must ascend, and addresses and lengths must be multiples of the backing's page size. memfds are
    /// sealed against shrinking (memfd_create(2)), so that no process that maps them can be sent `SIGBUS`.
    ///
    /// # Errors
    ///
    /// [`RamError`] says which region could not be made, and why.
    pub fn create(layout: &[(u64, u64)], backing: &Backing) -> Result<Self, RamError> {
        Self::map(backing::create(layout, backing)?)
    }

    /// Maps memory that another process made.
    ///
    /// Descriptors and regions may come from a process that is not trusted: each descriptor must be shared memory
    /// of the stated page size and long enough, and regions must not overlap. A file that can be sealed against
    /// shrinking is sealed; see [`GuestRam::is_sealed`] for one that cannot.
    ///
    /// # Errors
    ///
    /// [`RamError`] says which region was refused, and why.
    pub fn map(regions: Vec<(Region, OwnedFd)>) -> Result<Self, RamError> {
        layout::check_layout(regions.iter().map(|(region, _)| region))?;
        let sealed = backing::check(&regions)?;
        let pages = regions.iter().map(|(region, _)| region.bytes / PAGE_SIZE).sum();
        let dirty = Arc::new(PageSet::new(pages));
        let (mut mapped, mut shape, mut guest) = (Vec::new(), Vec::new(), Vec::new());
        let mut first_page = 0;
        for (index, (region, fd)) in regions.into_iter().enumerate() {
            let failed = |reason| RamError::Layout { index, reason };
            let file = Arc::new(File::from(fd));
            let bitmap = DirtyBitmap::new(Arc::clone(&dirty), first_page);
            let mapping = layout::map_region(index, &region, &file, bitmap)?;
            let end = first_page + region.bytes / PAGE_SIZE;
            guest.push(
                GuestRegionMmap::with_arc(Arc::clone(&mapping), GuestAddress(region.address))
                    .ok_or(failed("it ends beyond the address space"))?,
            );
            mapped.push(Mapped { pages: first_page..end, mapping, file });
            shape.push(region);
            first_page = end;
        }
        let memory = GuestMemoryMmap::from_regions(guest)
            .map_err(|_| RamError::Layout { index: 0, reason: "the regions are not in order" })?;
        Ok(Self {
            sigbus_guard: SigbusGuard::new(&mapped),
            memory,
            regions: shape,
            mapped,
            dirty,
            extent_cache: DataExtentCache::default(),
            populated: PopulatedBlocks::new(pages),
            write_lock: WriteLock::default(),
            sealed,
            is_observer: AtomicBool::new(false),
        })
    }

    /// Returns the memory as the rust-vmm crates know it. What is written through it sets bits in a
    /// [`DirtyBitmap`], and every tracker reports it.
    pub fn memory(&self) -> &GuestMemoryMmap<DirtyBitmap> {
        &self.memory
    }

    /// Returns the regions, in the order of page numbers.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Returns the descriptors behind the regions, in the order of the regions.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.mapped.iter().map(|mapped| mapped.file.as_fd()).collect()
    }

    /// Returns the number of pages.
    pub fn pages(&self) -> u64 {
        self.mapped.last().map_or(0, |mapped| mapped.pages.end)
    }

    /// Returns whether all files are sealed against shrinking. Where this is false (files on tmpfs or hugetlbfs),
    /// another process that has the file can truncate it, and touching the pages then raises `SIGBUS`: see
    /// [`install_sigbus_handler`] and [`GuestRam::intact`].
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Returns where `pages` lie in this process, in order; pages that do not exist are left out.
    pub fn slices(&self, pages: Range<u64>) -> impl Iterator<Item = HostSlice> + '_ {
        self.pieces(pages).map(|(index, piece)| {
            let mapped = &self.mapped[index];
            let offset = (piece.start - mapped.pages.start) * PAGE_SIZE;
            HostSlice {
                ptr: mapped.mapping.as_ptr().wrapping_add(offset as usize),
                len: ((piece.end - piece.start) * PAGE_SIZE) as usize,
                first_page: piece.start,
            }
        })
    }

    /// Returns the page at a guest physical address, or `None` in a gap.
    pub fn page_of(&self, guest_address: u64) -> Option<u64> {
        let index = self.regions.partition_point(|region| region.address <= guest_address).checked_sub(1)?;
        let offset = guest_address - self.regions[index].address;
        (offset < self.regions[index].bytes).then(|| self.mapped[index].pages.start + offset / PAGE_SIZE)
    }

    /// Returns the guest physical address of a page, or `None` if the guest has no such page.
    pub fn address_of(&self, page: u64) -> Option<u64> {
        let index = self.region_of(page)?;
        Some(self.regions[index].address + (page - self.mapped[index].pages.start) * PAGE_SIZE)
    }

    /// Returns the index in [`regions`](Self::regions) of the region that a page lies in.
    pub fn region_of(&self, page: u64) -> Option<usize> {
        let index = self.mapped.partition_point(|mapped| mapped.pages.end <= page);
        (index < self.mapped.len()).then_some(index)
    }

    /// Returns `pages` grown to whole pages of the sizes of the regions that they begin and end in: huge pages are
    /// taken whole.
    pub fn whole(&self, pages: Range<u64>) -> Range<u64> {
        if pages.is_empty() {
            return pages;
        }
        let place = |page| {
            let index = self.region_of(page)?;
            Some((self.mapped[index].pages.start, u64::from(self.regions[index].page_bytes) / PAGE_SIZE))
        };
        let start = place(pages.start)
            .map_or(pages.start, |(first, unit)| pages.start - (pages.start - first) % unit);
        let end = place(pages.end - 1)
            .map_or(pages.end, |(first, unit)| first + (pages.end - first).next_multiple_of(unit));
        start..end
    }

    /// Copies what a page holds, while the guest may be writing it. Returns whether there is such a page.
    pub fn copy_page(&self, page: u64, into: &mut [u8; PAGE_SIZE as usize]) -> bool {
        page.checked_add(1).is_some_and(|end| self.copy_pages(page..end, into))
    }

    /// Copies what `pages` hold, while the guest may be writing them: each byte is read once. Returns false, and
    /// copies nothing, unless all these pages exist and `into` is exactly as long as they are.
    pub fn copy_pages(&self, pages: Range<u64>, into: &mut [u8]) -> bool {
        let within = pages.end <= self.pages() && pages.start <= pages.end;
        if !within || (pages.end - pages.start) * PAGE_SIZE != into.len() as u64 {
            return false;
        }
        let mut rest = into;
        for (_, piece) in self.pieces(pages) {
            let (into, left) = rest.split_at_mut(((piece.end - piece.start) * PAGE_SIZE) as usize);
            rest = left;
            let address = self.address_of(piece.start).map(GuestAddress);
            let copied = address.is_some_and(|address| self.memory.read_slice(into, address).is_ok());
            if !copied {
                return false;
            }
        }
        true
    }

    /// What was written through [`GuestRam::memory`] and not yet drained.
    pub(crate) fn dirty_bitmap(&self) -> &PageSet {
        &self.dirty
    }

    /// Returns, for each region that `pages` reach into, its index and those of `pages` that lie in it.
    pub(crate) fn pieces(&self, pages: Range<u64>) -> impl Iterator<Item = (usize, Range<u64>)> + '_ {
        let from = self.mapped.partition_point(|mapped| mapped.pages.end <= pages.start);
        self.mapped.iter().enumerate().skip(from).map_while(move |(index, mapped)| {
            let piece = pages.start.max(mapped.pages.start)..pages.end.min(mapped.pages.end);
            (!piece.is_empty()).then_some((index, piece))
        })
    }

    /// Returns the file behind region `index`, and the offset in bytes at which `piece` begins in it.
    fn file_range(&self, index: usize, piece: &Range<u64>) -> (&File, u64) {
        let mapped = &self.mapped[index];
        let offset = self.regions[index].offset + (piece.start - mapped.pages.start) * PAGE_SIZE;
        (&mapped.file, offset)
    }
}

#[cfg(test)]
mod tests;
