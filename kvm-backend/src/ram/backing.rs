//! What backs guest memory: memfds, or files on tmpfs or hugetlbfs.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use linux_raw_sys::general::{HUGETLBFS_MAGIC, TMPFS_MAGIC};
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::machine::Region;
use rustix::fs::{FileType, MemfdFlags, Mode, OFlags, SealFlags, Stat};
use rustix::io::Errno;

use super::layout::{HUGE_PAGE, check_layout, is_huge};
use crate::error::RamError;

/// What backs the memory of a new guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Each region is a memfd of 4 KiB pages.
    Memfd,
    /// Each region is a memfd of 2 MiB pages; the system must have enough free ones
    /// (`/proc/sys/vm/nr_hugepages`).
    HugeMemfd,
    /// The path is a directory, in which each region gets an unnamed file, or a file, in which the regions lie one
    /// after another. It lies on tmpfs (4 KiB pages) or hugetlbfs (2 MiB pages). A file that exists keeps what it
    /// holds and is made long enough.
    File(PathBuf),
}

/// Makes a region and its descriptor for each piece of `layout`.
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
                doing: "duplicate its descriptor",
                source,
            })?,
            (Backing::File(directory), None) => {
                let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
                rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)
                    .map_err(failed("make an unnamed file (O_TMPFILE)"))?
            }
            (_, None) => memfd(is_huge(&region)).map_err(failed("make its memfd (memfd_create)"))?,
        };
        let end = region.offset + region.bytes;
        if size(fd.as_fd()).map_err(failed("read its file's length (fstat)"))? < end {
            rustix::fs::ftruncate(&fd, end).map_err(failed("make its file long enough (ftruncate)"))?;
        }
        made.push((region, fd));
    }
    Ok(made)
}

/// Checks descriptors that may come from a process that is not trusted, and seals them where that can be done.
/// Returns whether all files are sealed against shrinking.
pub(super) fn check(regions: &[(Region, OwnedFd)]) -> Result<bool, RamError> {
    let mut sealed = true;
    let mut places: Vec<(u64, u64, u64, u64)> = Vec::new();
    for (index, (region, fd)) in regions.iter().enumerate() {
        let failed = |doing| move |error: Errno| RamError::Kernel { index, doing, source: error.into() };
        let stat = rustix::fs::fstat(fd).map_err(failed("read its file's status (fstat)"))?;
        check_kind(index, region, fd.as_fd(), &stat)?;
        // The file is sealed before it is measured, so that what is measured stays.
        sealed &= seal(fd.as_fd()).map_err(failed("seal its file against shrinking (F_ADD_SEALS)"))?;
        let (begin, end) = (region.offset, region.offset + region.bytes);
        let found = size(fd.as_fd()).map_err(failed("read its file's length (fstat)"))?;
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

/// Checks that the descriptor is a regular file in memory with pages of the stated size.
fn check_kind(index: usize, region: &Region, fd: BorrowedFd<'_>, stat: &Stat) -> Result<(), RamError> {
    let wanted = if is_huge(region) { "hugetlbfs with 2 MiB pages" } else { "tmpfs" };
    let wrong = |found: String| Err(RamError::Kind { index, found, wanted });
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind != FileType::RegularFile {
        return wrong(format!("no regular file ({kind:?})"));
    }
    // pwrite(2) would append what is written to such a file, whatever the offset.
    if rustix::fs::fcntl_getfl(fd).is_ok_and(|flags| flags.contains(OFlags::APPEND)) {
        return wrong("opened for appending (O_APPEND)".into());
    }
    let system = rustix::fs::fstatfs(fd).map_err(|error| RamError::Kernel {
        index,
        doing: "read its file system's type (fstatfs)",
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

/// Seals a file against shrinking where it can be sealed, and returns whether it is sealed.
///
/// Only a memfd can be sealed. A file on tmpfs looks like a memfd whose set of seals was closed.
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
        // Its owner closed the set of seals in between.
        Err(Errno::PERM) => Ok(false),
        other => other.map(|()| true),
    }
}

/// Makes a memfd for guest memory.
fn memfd(huge: bool) -> Result<OwnedFd, Errno> {
    let pages = if huge { MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { MemfdFlags::empty() };
    rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | pages)
}

/// Returns the page size of the file system at `path`, and the file unless `path` is a directory.
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
        // A size that no region may have is refused later, with the layout.
        HUGETLBFS_MAGIC => u32::try_from(system.f_bsize).map_or(0, u64::from),
        _ => PAGE_SIZE,
    };
    Ok((page_bytes, is_file.then_some(fd)))
}

/// Returns the length of a file in bytes.
fn size(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    Ok(u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0))
}
