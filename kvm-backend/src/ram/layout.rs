//! Which layouts a guest's memory may have, and the mapping of one region.

use std::fs::File;
use std::io;
use std::sync::Arc;

use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::machine::{MAX_RAM_BYTES, MAX_REGIONS, Region};
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

use super::dirty_bitmap::DirtyBitmap;
use crate::error::RamError;

/// The only size of huge page that guest memory may have, in bytes.
pub(super) const HUGE_PAGE: u64 = 2 << 20;

/// Returns whether a region has 2 MiB pages.
pub(super) fn is_huge(region: &Region) -> bool {
    u64::from(region.page_bytes) == HUGE_PAGE
}

/// Checks that regions are aligned, in ascending order and apart.
///
/// # Errors
///
/// [`RamError::Regions`] and [`RamError::Layout`].
pub(super) fn check_layout<'a>(regions: impl ExactSizeIterator<Item = &'a Region>) -> Result<(), RamError> {
    if regions.len() == 0 || regions.len() > MAX_REGIONS {
        return Err(RamError::Regions { found: regions.len(), limit: MAX_REGIONS });
    }
    let (mut free_from, mut total) = (0, 0);
    for (index, region) in regions.enumerate() {
        let page = u64::from(region.page_bytes);
        let fits = |value: u64| page != 0 && value.is_multiple_of(page);
        let reason = if page != PAGE_SIZE && page != HUGE_PAGE {
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

/// Maps region `index`, which lies in `file`, for reading and writing. Writes through vm-memory set bits in
/// `dirty`.
///
/// # Errors
///
/// [`RamError::HugePages`] where huge pages are lacking, and [`RamError::Kernel`] if the kernel refuses for another reason.
pub(super) fn map_region(
    index: usize,
    region: &Region,
    file: &Arc<File>,
    dirty: DirtyBitmap,
) -> Result<Arc<MmapRegion<DirtyBitmap>>, RamError> {
    let bytes = usize::try_from(region.bytes)
        .map_err(|_| RamError::Layout { index, reason: "it does not fit into this process" })?;
    // Huge pages are reserved when they are mapped: too few must be an error here, not a
    // SIGBUS later. Small pages are taken as they are touched.
    let reserve = if is_huge(region) { MapFlags::empty() } else { MapFlags::NORESERVE };
    let mapping = MmapRegionBuilder::new_with_bitmap(bytes, dirty)
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), region.offset))
        .with_mmap_prot((ProtFlags::READ | ProtFlags::WRITE).bits() as i32)
        .with_mmap_flags((MapFlags::SHARED | reserve).bits() as i32)
        .with_hugetlbfs(is_huge(region))
        .build()
        .map_err(|error| {
            let source = match error {
                vm_memory::mmap::MmapRegionError::Mmap(source) => source,
                other => io::Error::other(other),
            };
            if is_huge(region) && source.raw_os_error() == Some(libc::ENOMEM) {
                let page_bytes = region.page_bytes;
                let pages = region.bytes / u64::from(page_bytes);
                return RamError::HugePages { index, pages, kib: page_bytes >> 10 };
            }
            RamError::Kernel { index, doing: "map it into this process (mmap)", source }
        })?;
    Ok(Arc::new(mapping))
}
