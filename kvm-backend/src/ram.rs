//! [`GuestRam`]: a guest's memory, as shared mappings behind descriptors.
//!
//! A VMM makes it ([`GuestRam::create`]) and lends the descriptors to its daemon, which maps the
//! same pages ([`GuestRam::map`]). Pages are numbered densely over the regions in order, so
//! gaps in the guest's address space have no numbers.

mod backing;
mod extents;
mod known;
mod looking_on;
mod loss;
mod mapped;
mod marks;
mod write;
mod zero;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use memlane_protocol::wire::machine::{MAX_RAM_BYTES, MAX_REGIONS, Region};
use memlane_protocol::{PAGE_SIZE, PageSet};
use rustix::fs::FallocateFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use self::known::KnownData;
use self::loss::Guarded;
use self::mapped::MappedBlocks;
use self::write::Writing;

pub use backing::Backing;
pub use loss::contain_faults;
pub use marks::Marks;
pub use zero::{is_zero, zero_pages};

pub use crate::error::{RamError, RamLost};

/// Pages of the largest KVM memory slot; the kernel's limit is just under twice that.
const SLOT_PAGES: u64 = 1 << 30;

/// A guest's memory, mapped into this process. Share it as `Arc<GuestRam>`.
#[derive(Debug)]
pub struct GuestRam {
    /// First, so that it ends before the regions are unmapped.
    guarded: Guarded,
    memory: GuestMemoryMmap<Marks>,
    regions: Vec<Region>,
    mapped: Vec<Mapped>,
    marks: Arc<PageSet>,
    data: KnownData,
    in_tables: MappedBlocks,
    writing: Writing,
    sealed: bool,
    /// See [`GuestRam::look_on`].
    looks_on: AtomicBool,
}

/// Where a region lies in this process.
#[derive(Debug)]
struct Mapped {
    pages: Range<u64>,
    mapping: Arc<MmapRegion<Marks>>,
    file: Arc<File>,
}

/// A contiguous piece of guest memory in this process.
///
/// Guest and VMM write it at any time: read it as raw or volatile memory, never through a
/// reference. It is valid for as long as the [`GuestRam`] that it came from.
#[derive(Clone, Copy, Debug)]
pub struct HostSlice {
    /// First byte.
    pub ptr: *mut u8,
    /// Length in bytes, whole pages.
    pub len: usize,
    /// Number of the page that begins at `ptr`.
    pub first_page: u64,
}

// SAFETY: it is an address and two numbers. Whoever dereferences the address, on whatever
// thread, answers for that.
unsafe impl Send for HostSlice {}

/// A KVM memory slot over consecutive pages of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    pub(crate) slot: u32,
    pub(crate) first_page: u64,
    pub(crate) pages: u64,
    pub(crate) flags: u32,
}

impl MemorySlot {
    /// KVM's number of the slot.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// The pages that it shows to the guest.
    pub fn pages(&self) -> Range<u64> {
        self.first_page..self.first_page + self.pages
    }
}

impl GuestRam {
    /// Makes the memory of a guest: one region for each address and length in `layout`.
    ///
    /// Addresses ascend; addresses and lengths are multiples of the backing's page size.
    /// memfds are sealed against shrinking, so that whoever maps them is safe from `SIGBUS`.
    pub fn create(layout: &[(u64, u64)], backing: &Backing) -> Result<Self, RamError> {
        Self::map(backing::create(layout, backing)?)
    }

    /// Maps memory that another process made.
    ///
    /// Descriptors and regions may come from a stranger: they are checked to be shared memory
    /// of the stated page size, long enough, and not to overlap. A file that can be sealed
    /// against shrinking is sealed; see [`GuestRam::is_sealed`] for one that cannot.
    pub fn map(regions: Vec<(Region, OwnedFd)>) -> Result<Self, RamError> {
        check_layout(regions.iter().map(|(region, _)| region))?;
        let sealed = backing::check(&regions)?;
        let pages = regions.iter().map(|(region, _)| region.bytes / PAGE_SIZE).sum();
        let marks = Arc::new(PageSet::new(pages));
        let (mut mapped, mut shape, mut guest) = (Vec::new(), Vec::new(), Vec::new());
        let mut first_page = 0;
        for (index, (region, fd)) in regions.into_iter().enumerate() {
            let failed = |reason| RamError::Layout { index, reason };
            let file = Arc::new(File::from(fd));
            let mapping = map_region(index, &region, &file, Marks::new(Arc::clone(&marks), first_page))?;
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
        let (data, in_tables) = (KnownData::default(), MappedBlocks::new(pages));
        let writing = Writing::default();
        let guarded = Guarded::new(&mapped);
        let looks_on = AtomicBool::new(false);
        Ok(Self {
            guarded,
            memory,
            regions: shape,
            mapped,
            marks,
            data,
            in_tables,
            writing,
            sealed,
            looks_on,
        })
    }

    /// The memory as the rust-vmm crates know it. What is written through it is noted in
    /// [`Marks`], and found by every tracker.
    pub fn memory(&self) -> &GuestMemoryMmap<Marks> {
        &self.memory
    }

    /// The regions, in order of page number.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The descriptors behind the regions, in the same order.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.mapped.iter().map(|mapped| mapped.file.as_fd()).collect()
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.mapped.last().map_or(0, |mapped| mapped.pages.end)
    }

    /// Whether no descriptor can be made shorter. Where this is false (files on tmpfs or
    /// hugetlbfs), whoever else has the file can take pages away, and touching them then
    /// raises `SIGBUS`: see [`contain_faults`] and [`GuestRam::intact`].
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Where `pages` lie in this process, in order; pages that do not exist are left out.
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

    /// The page at a guest physical address.
    pub fn page_of(&self, guest_address: u64) -> Option<u64> {
        let index = self.regions.partition_point(|region| region.address <= guest_address).checked_sub(1)?;
        let offset = guest_address - self.regions[index].address;
        (offset < self.regions[index].bytes).then(|| self.mapped[index].pages.start + offset / PAGE_SIZE)
    }

    /// The guest physical address of a page.
    pub fn address_of(&self, page: u64) -> Option<u64> {
        let index = self.region_of(page)?;
        Some(self.regions[index].address + (page - self.mapped[index].pages.start) * PAGE_SIZE)
    }

    /// Which of the [`regions`](Self::regions) a page lies in.
    pub fn region_of(&self, page: u64) -> Option<usize> {
        let index = self.mapped.partition_point(|mapped| mapped.pages.end <= page);
        (index < self.mapped.len()).then_some(index)
    }

    /// `pages`, grown to whole pages of the regions that they begin and end in.
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

    /// Copies what a page holds, while the guest may be writing it; whether there is such a page.
    pub fn copy_page(&self, page: u64, into: &mut [u8; PAGE_SIZE as usize]) -> bool {
        page.checked_add(1).is_some_and(|end| self.copy_pages(page..end, into))
    }

    /// Copies what `pages` hold, while the guest may be writing them: each byte is read once. Nothing is
    /// copied unless there are such pages, and `into` is as long as they.
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

    /// Makes `pages` zero and gives back what they took (`FALLOC_FL_PUNCH_HOLE`). Of a 2 MiB
    /// page that is covered in part the kernel zeroes that part.
    pub fn punch(&self, pages: Range<u64>) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for (index, piece) in self.pieces(pages) {
            let (file, offset) = self.file_range(index, &piece);
            let bytes = (piece.end - piece.start) * PAGE_SIZE;
            rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, flags, offset, bytes))?;
            self.data.forget(&piece);
            self.in_tables.forget(&piece);
        }
        Ok(())
    }

    /// Takes `pages` from the guest, as a VMM does for its balloon: they are zero from now on, and its tracker
    /// finds that.
    ///
    /// Not while the guest is stunned by protection, where its own tracker rests, nor while some of its memory
    /// is still to come by post-copy: the balloon has to wait then.
    pub fn discard(&self, pages: Range<u64>) -> io::Result<()> {
        // Holes stay as they are, and are not to be found.
        let held = self.extents_now(pages)?;
        for extent in held {
            self.punch(extent.clone())?;
            // Afterwards, as with writes.
            self.marks.insert_range(extent);
        }
        Ok(())
    }

    /// Takes memory for `pages` and maps it for writing (`MADV_POPULATE_WRITE`), so that the
    /// first write to them costs nothing more. What the pages hold stays.
    pub fn prepare(&self, pages: Range<u64>) -> io::Result<()> {
        self.populate(pages, Advice::LinuxPopulateWrite)
    }

    /// Maps `pages` (`MADV_POPULATE_READ`), for reading and writing since the mapping is shared.
    ///
    /// Of pages that are there already the kernel maps 16 at a time, as it never does for writing: a
    /// tenth of the time that [`prepare`](Self::prepare) takes. Memory is taken for others among them, but where
    /// nothing is there at all nothing is done: taking a page as it is written costs less.
    /// What was mapped this way before is passed over, and so is what is mapped as soon by a fault or
    /// two: fewer pages than those 16, and huge pages, of which moreover nobody can tell whether they
    /// are there.
    pub fn map_pages(&self, pages: Range<u64>) -> io::Result<()> {
        for (index, piece) in self.pieces(pages) {
            let unmapped = self.in_tables.unmapped(&piece);
            let many = unmapped.end - unmapped.start >= mapped::BLOCK_PAGES;
            if many && !backing::is_huge(&self.regions[index]) && self.first_data(&unmapped)?.is_some() {
                self.populate(unmapped.clone(), Advice::LinuxPopulateRead)?;
                self.in_tables.note(&unmapped);
            }
        }
        Ok(())
    }

    fn populate(&self, pages: Range<u64>, advice: Advice) -> io::Result<()> {
        for slice in self.slices(pages) {
            // SAFETY: the slice lies within a mapping of ours; populating changes no contents.
            let populate = || unsafe { rustix::mm::madvise(slice.ptr.cast(), slice.len, advice) };
            rustix::io::retry_on_intr(populate)?;
        }
        Ok(())
    }

    /// Shows the memory to a virtual machine: a slot for each region, numbered from 0
    /// (`KVM_SET_USER_MEMORY_REGION`), with `flags` of KVM.
    ///
    /// # Safety
    ///
    /// The memory must outlive the virtual machine, which writes it from now on.
    pub unsafe fn register(&self, vm: &VmFd, flags: u32) -> Result<Vec<MemorySlot>, RamError> {
        let mut slots = Vec::new();
        for mapped in &self.mapped {
            let mut first_page = mapped.pages.start;
            while first_page < mapped.pages.end {
                let pages = SLOT_PAGES.min(mapped.pages.end - first_page);
                slots.push(MemorySlot { slot: slots.len() as u32, first_page, pages, flags });
                first_page += pages;
            }
        }
        for slot in &slots {
            self.set_slot(vm, slot, slot.flags).map_err(|source| RamError::Kernel {
                index: self.region_of(slot.first_page).unwrap_or(0),
                doing: "KVM_SET_USER_MEMORY_REGION",
                source,
            })?;
        }
        Ok(slots)
    }

    /// Sets a slot of [`GuestRam::register`], anew or with other flags.
    pub(crate) fn set_slot(&self, vm: &VmFd, slot: &MemorySlot, flags: u32) -> io::Result<()> {
        let (Some(address), Some(host)) = (
            self.address_of(slot.first_page),
            self.slices(slot.pages()).next().filter(|host| host.len as u64 == slot.pages * PAGE_SIZE),
        ) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags,
            guest_phys_addr: address,
            memory_size: slot.pages * PAGE_SIZE,
            userspace_addr: host.ptr as u64,
        };
        // SAFETY: the range lies within a mapping of ours, and who made the slot through
        // `register` promised that the mapping outlives the virtual machine.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    /// What was written through [`GuestRam::memory`] and not yet drained.
    pub(crate) fn marks(&self) -> &PageSet {
        &self.marks
    }

    /// What of `pages` lies in each region.
    pub(crate) fn pieces(&self, pages: Range<u64>) -> impl Iterator<Item = (usize, Range<u64>)> + '_ {
        let from = self.mapped.partition_point(|mapped| mapped.pages.end <= pages.start);
        self.mapped.iter().enumerate().skip(from).map_while(move |(index, mapped)| {
            let piece = pages.start.max(mapped.pages.start)..pages.end.min(mapped.pages.end);
            (!piece.is_empty()).then_some((index, piece))
        })
    }

    /// The file behind region `index`, and where `piece` begins in it.
    fn file_range(&self, index: usize, piece: &Range<u64>) -> (&File, u64) {
        let mapped = &self.mapped[index];
        let offset = self.regions[index].offset + (piece.start - mapped.pages.start) * PAGE_SIZE;
        (&mapped.file, offset)
    }
}

fn map_region(
    index: usize,
    region: &Region,
    file: &Arc<File>,
    marks: Marks,
) -> Result<Arc<MmapRegion<Marks>>, RamError> {
    let bytes = usize::try_from(region.bytes)
        .map_err(|_| RamError::Layout { index, reason: "it does not fit into this process" })?;
    // Huge pages are reserved when they are mapped: too few must be an error here, not a
    // SIGBUS later. Small pages are taken as they are touched.
    let reserve = if backing::is_huge(region) { MapFlags::empty() } else { MapFlags::NORESERVE };
    let mapping = MmapRegionBuilder::new_with_bitmap(bytes, marks)
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), region.offset))
        .with_mmap_prot((ProtFlags::READ | ProtFlags::WRITE).bits() as i32)
        .with_mmap_flags((MapFlags::SHARED | reserve).bits() as i32)
        .with_hugetlbfs(backing::is_huge(region))
        .build()
        .map_err(|error| RamError::Kernel {
            index,
            doing: "mapping it",
            source: match error {
                vm_memory::mmap::MmapRegionError::Mmap(source) => source,
                other => io::Error::other(other),
            },
        })?;
    Ok(Arc::new(mapping))
}

/// Regions must be aligned, in ascending order and apart.
fn check_layout<'a>(regions: impl ExactSizeIterator<Item = &'a Region>) -> Result<(), RamError> {
    if regions.len() == 0 || regions.len() > MAX_REGIONS {
        return Err(RamError::Regions { found: regions.len(), limit: MAX_REGIONS });
    }
    let (mut free_from, mut total) = (0, 0);
    for (index, region) in regions.enumerate() {
        let page = u64::from(region.page_bytes);
        let fits = |value: u64| page != 0 && value.is_multiple_of(page);
        let reason = if page != PAGE_SIZE && page != backing::HUGE_PAGE {
            "its page size must be 4 KiB or 2 MiB"
        } else if region.bytes == 0 || !fits(region.bytes) {
            "its length must be a multiple of its page size, and not 0"
        } else if region.bytes > MAX_RAM_BYTES - total {
            "the guest's memory would be larger than 64 TiB"
        } else if !fits(region.address) || region.address > 1 << 52 {
            "its address must be a multiple of its page size below 2^52"
        } else if region.address < free_from {
            "it must begin where the one before it ends, or later"
        } else if !fits(region.offset) || region.offset > 1 << 62 {
            "its file offset must be a multiple of its page size below 2^62"
        } else {
            free_from = region.address + region.bytes;
            total += region.bytes;
            continue;
        };
        return Err(RamError::Layout { index, reason });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
