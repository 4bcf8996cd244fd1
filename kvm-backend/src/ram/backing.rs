//! What guest memory is made of: memfds, or files on tmpfs or hugetlbfs.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use linux_raw_sys::general::{HUGETLBFS_MAGIC, TMPFS_MAGIC};
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::machine::Region;
use rustix::fs::{FileType, MemfdFlags, Mode, OFlags, SealFlags, Stat};
use rustix::io::Errno;

use super::{RamError, check_layout};

/// The only size of huge page that guest memory may have.
pub(super) const HUGE_PAGE: u64 = 2 << 20;

/// Where the memory of a new guest comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A memfd of 4 KiB pages for each region.
    Memfd,
    /// A memfd of 2 MiB pages for each region; the system must have free ones
    /// (`/proc/sys/vm/nr_hugepages`).
    HugeMemfd,
    /// A directory, in which each region gets an unnamed file, or a file, in which the regions
    /// lie one after another; on tmpfs (4 KiB pages) or hugetlbfs (2 MiB pages). A file that
    /// exists keeps what it holds and is made long enough.
    File(PathBuf),
}

/// Whether a region has 2 MiB pages.
pub(super) fn is_huge(region: &Region) -> bool {
    u64::from(region.page_bytes) == HUGE_PAGE
}

/// A region and a descriptor for each piece of `layout`.
pub(super) fn create(layout: &[(u64, u64)], backing: &Backing) -> Result<Vec<(Region, OwnedFd)>, RamError> {
    let (page_bytes, shared) = match backing {
        Backing::Memfd => (PAGE_SIZE, None),
        Backing::HugeMemfd => (HUGE_PAGE, None),
        Backing::File(path) => {
            let (page_bytes, file) = open(path)?;
            (page_bytes, file)
        }
    };
    let mut end_of_file = 0u64;
    let mut regions = Vec::new();
    for &(address, bytes) in layout {
        let offset = if shared.is_some() { end_of_file } else { 0 };
        end_of_file = offset.saturating_add(bytes);
        regions.push(Region { address, bytes, page_bytes: page_bytes as u32, offset });
    }
    check_layout(regions.iter())?;
    let mut made = Vec::new();
    for (index, region) in regions.into_iter().enumerate() {
        let failed = |doing| move |error: Errno| RamError::Kernel { index, doing, source: error.into() };
        let fd = match (backing, &shared) {
            (_, Some(file)) => file.try_clone().map_err(|source| RamError::Kernel {
                index,
                doing: "duplicating its descriptor",
                source,
            })?,
            (Backing::File(directory), None) => {
                let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
                rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)
                    .map_err(failed("making an unnamed file (O_TMPFILE)"))?
            }
            (_, None) => memfd(is_huge(&region)).map_err(failed("memfd_create"))?,
        };
        let end = region.offset + region.bytes;
        if size(fd.as_fd()).map_err(failed("reading its length"))? < end {
            rustix::fs::ftruncate(&fd, end).map_err(failed("setting its length"))?;
        }
        made.push((region, fd));
    }
    Ok(made)
}

/// Checks descriptors that may come from a stranger; returns whether none can be made shorter.
pub(super) fn check(regions: &[(Region, OwnedFd)]) -> Result<bool, RamError> {
    let mut sealed = true;
    let mut places: Vec<(u64, u64, u64, u64)> = Vec::new();
    for (index, (region, fd)) in regions.iter().enumerate() {
        let failed = |doing| move |error: Errno| RamError::Kernel { index, doing, source: error.into() };
        let stat = rustix::fs::fstat(fd).map_err(failed("reading its file's status"))?;
        check_kind(index, region, fd.as_fd(), &stat)?;
        // Sealed before measured: what is measured then stays.
        sealed &= seal(fd.as_fd()).map_err(failed("sealing it against shrinking"))?;
        let (begin, end) = (region.offset, region.offset + region.bytes);
        let found = size(fd.as_fd()).map_err(failed("reading its length"))?;
        if found < end {
            return Err(RamError::Short { index, found, needed: end });
        }
        let place = (stat.st_dev, stat.st_ino, begin, end);
        let aliases = |other: &(u64, u64, u64, u64)| {
            (other.0, other.1) == (place.0, place.1) && other.2 < end && begin < other.3
        };
        if let Some(other) = places.iter().position(aliases) {
            return Err(RamError::Aliased(other, index));
        }
        places.push(place);
    }
    Ok(sealed)
}

/// The descriptor must be a regular file in memory with pages of the stated size.
fn check_kind(index: usize, region: &Region, fd: BorrowedFd<'_>, stat: &Stat) -> Result<(), RamError> {
    let wanted = if is_huge(region) { "hugetlbfs with 2 MiB pages" } else { "tmpfs" };
    let wrong = |found: String| Err(RamError::Kind { index, found, wanted });
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind != FileType::RegularFile {
        return wrong(format!("no regular file ({kind:?})"));
    }
    // What is written to it would not go where it belongs (pwrite(2)).
    if rustix::fs::fcntl_getfl(fd).is_ok_and(|flags| flags.contains(OFlags::APPEND)) {
        return wrong("opened for appending (O_APPEND)".into());
    }
    let system = rustix::fs::fstatfs(fd).map_err(|error| RamError::Kernel {
        index,
        doing: "asking for its file system",
        source: error.into(),
    })?;
    match (system.f_type as u32, system.f_bsize as u64) {
        (TMPFS_MAGIC, _) if !is_huge(region) => Ok(()),
        (HUGETLBFS_MAGIC, HUGE_PAGE) if is_huge(region) => Ok(()),
        (TMPFS_MAGIC, _) => wrong("on tmpfs".into()),
        (HUGETLBFS_MAGIC, page) => wrong(format!("on hugetlbfs with pages of {} KiB", page >> 10)),
        (other, _) => wrong(format!("on a file system of type {other:#x}")),
    }
}

/// Seals against shrinking where the file can be sealed; returns whether it is.
///
/// Only a memfd can be. A file on tmpfs looks like a memfd whose seals were closed.
fn seal(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let seals = match rustix::fs::fcntl_get_seals(fd) {
        Ok(seals) => seals,
        Err(Errno::INVAL) => return Ok(false),
        Err(error) => return Err(error),
    };
    if seals.contains(SealFlags::SHRINK) {
        return Ok(true);
    }
    if seals.contains(SealFlags::SEAL) {
        return Ok(false);
    }
    match rustix::fs::fcntl_add_seals(fd, SealFlags::SHRINK) {
        // Its owner was quicker to close its seals.
        Err(Errno::PERM) => Ok(false),
        other => other.map(|()| true),
    }
}

fn memfd(huge: bool) -> Result<OwnedFd, Errno> {
    let pages = if huge { MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { MemfdFlags::empty() };
    rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | pages)
}

/// The page size of the file system at `path`, and the file where it is no directory.
fn open(path: &Path) -> Result<(u64, Option<OwnedFd>), RamError> {
    let failed = |error: Errno| RamError::Open { path: path.to_owned(), source: error.into() };
    let directory = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let (fd, is_file) = match rustix::fs::open(path, directory, Mode::empty()) {
        Ok(fd) => (fd, false),
        Err(Errno::NOTDIR | Errno::NOENT) => {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            (rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?, true)
        }
        Err(error) => return Err(failed(error)),
    };
    let system = rustix::fs::fstatfs(&fd).map_err(failed)?;
    let page_bytes = match system.f_type as u32 {
        // A size that no region may have is refused with the layout.
        HUGETLBFS_MAGIC => u32::try_from(system.f_bsize).map_or(0, u64::from),
        _ => PAGE_SIZE,
    };
    Ok((page_bytes, is_file.then_some(fd)))
}

fn size(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    Ok(u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0))
}
