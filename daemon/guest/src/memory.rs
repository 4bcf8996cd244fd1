//! This module finds a guest's memory as its VMM's process sees it, through descriptors that the process hands over.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use memlane_kvm::ram::GuestRam;
use memlane_kvm::vmm_mapping::VmmMapping;
use rustix::fs::{Mode, OFlags, PROC_SUPER_MAGIC};
use rustix::io::Errno;

/// This device makes userfaultfds.
pub(crate) const DEVICE: &str = "/dev/userfaultfd";

/// With these descriptors the daemon can track what a VMM writes, hold its writes up, or provide missing pages.
#[derive(Debug)]
pub struct VmmMemory {
    /// This is a userfaultfd of the process. Unless the process had kept it, nothing was done on it yet (`UFFDIO_API` is
    /// due first).
    pub userfault: OwnedFd,
    /// This is `/proc/PID/pagemap`.
    pub pagemap: File,
    /// This is where the guest's memory lies in the process.
    pub memory: Arc<VmmMapping>,
    /// If this is true, the VMM may take memory from its guest while it runs, as a balloon does.
    pub punches: bool,
}

/// A VMM, or the shim in one, hands over these descriptors of its process.
#[derive(Debug)]
pub(crate) struct Handles {
    /// This becomes [`VmmMemory::userfault`]. Closing it lifts all protection, unless a copy is kept.
    pub userfault: OwnedFd,
    /// This is `/proc/PID/pagemap`.
    pub pagemap: OwnedFd,
    /// This is `/proc/PID/maps`.
    pub maps: OwnedFd,
}

/// The descriptors that a process handed over do not give access to the memory of its guest. The texts call the process
/// "it".
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// Not exactly three descriptors came.
    #[error("{0} descriptors came instead of 3")]
    Count(usize),
    /// The descriptors are of other kinds than they should be.
    #[error("its descriptors are not a userfaultfd, a pagemap and maps, in this order")]
    Descriptors,
    /// The kernel does not tell what a descriptor is.
    #[error("cannot read {link}: {source}")]
    Name {
        /// This is the link in `/proc` that names it.
        link: String,
        /// This is what the kernel said.
        source: io::Error,
    },
    /// The list of the process's mappings cannot be read.
    #[error("cannot read its mappings: {0}")]
    Mappings(io::Error),
    /// The kernel does not tell which file is the guest's memory.
    #[error("cannot look at the file behind its memory: {0}")]
    File(Errno),
    /// The process maps the memory at an address that does not suit the size of its pages.
    #[error("it maps its memory where pages of that size cannot lie")]
    Unaligned,
    /// The process does not map the file at all.
    #[error("it does not map the file that is its memory; was the file replaced?")]
    NotMapped,
    /// The process maps the file more than once.
    #[error("it maps its memory twice, so that not all writes would be seen")]
    Twice,
    /// The process maps the file privately, so that the daemon does not see what it writes.
    #[error("it maps its memory privately; start it with share=on")]
    Private,
    /// The process maps only a part of the file.
    #[error("it maps {mapped} of the {bytes} bytes of its memory")]
    Part {
        /// This many bytes are mapped.
        mapped: u64,
        /// This many bytes should be.
        bytes: u64,
    },
}

/// Opens `/dev/userfaultfd`, to lend it to a process that may not open it itself.
///
/// # Errors
///
/// Fails if the kernel has no such device, or if the daemon may not open it.
pub(crate) fn open_device() -> Result<OwnedFd, Errno> {
    rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

impl Handles {
    /// Takes the three descriptors that a process has sent.
    ///
    /// # Errors
    ///
    /// Fails if they are not what they should be: reading anything else could keep the daemon waiting.
    pub(crate) fn take(descriptors: Vec<OwnedFd>) -> Result<Self, MemoryError> {
        let count = descriptors.len();
        let [userfault, pagemap, maps] =
            <[OwnedFd; 3]>::try_from(descriptors).map_err(|_| MemoryError::Count(count))?;
        let is_proc =
            |fd: &OwnedFd| rustix::fs::fstatfs(fd).is_ok_and(|found| found.f_type == PROC_SUPER_MAGIC);
        let fits = name_of(&userfault)? == "anon_inode:[userfaultfd]"
            && (is_proc(&pagemap) && file_name(&name_of(&pagemap)?) == "pagemap")
            && (is_proc(&maps) && file_name(&name_of(&maps)?) == "maps");
        if !fits {
            return Err(MemoryError::Descriptors);
        }
        Ok(Self { userfault, pagemap, maps })
    }

    /// Finds where the process maps the files behind `ram`. `punches` is what [`VmmMemory::punches`] becomes.
    ///
    /// # Errors
    ///
    /// Fails if the process does not map all of it, once, shared and in one piece for each region.
    pub(crate) fn find(self, ram: &Arc<GuestRam>, punches: bool) -> Result<VmmMemory, MemoryError> {
        let Self { userfault, pagemap, maps } = self;
        let mappings = mappings(&File::from(maps)).map_err(MemoryError::Mappings)?;
        let mut addresses = Vec::new();
        for (region, fd) in ram.regions().iter().zip(ram.descriptors()) {
            let stat = rustix::fs::fstat(fd).map_err(MemoryError::File)?;
            let bytes = region.offset..region.offset + region.bytes;
            addresses.push(place(&mappings, &Part { device: stat.st_dev, inode: stat.st_ino, bytes })?);
        }
        let memory = VmmMapping::new(ram.clone(), &addresses).ok_or(MemoryError::Unaligned)?;
        Ok(VmmMemory { userfault, pagemap: pagemap.into(), memory: Arc::new(memory), punches })
    }
}

/// Asks the kernel what it calls an open file.
pub(super) fn name_of(fd: impl AsFd) -> Result<String, MemoryError> {
    let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    match std::fs::read_link(&link) {
        Ok(name) => Ok(name.to_string_lossy().into_owned()),
        Err(source) => Err(MemoryError::Name { link, source }),
    }
}

fn file_name(path: &str) -> &str {
    Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// A region of memory is this part of a file.
struct Part {
    /// These are the device and the inode number, as in `/proc/PID/maps`.
    device: u64,
    inode: u64,
    bytes: Range<u64>,
}

/// A line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    addresses: Range<u64>,
    shared: bool,
    offset: u64,
    device: u64,
    inode: u64,
}

fn mappings(file: &File) -> io::Result<Vec<Mapping>> {
    let lines = BufReader::new(file).lines();
    lines.filter_map(|line| line.map(|line| parse(&line)).transpose()).collect()
}

/// Reads a line. Returns `None` if it is no line of that file.
fn parse(line: &str) -> Option<Mapping> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let shared = fields.next()?.ends_with('s');
    let offset = hex(fields.next()?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = rustix::fs::makedev(hex(major)? as u32, hex(minor)? as u32);
    let inode = fields.next()?.parse().ok()?;
    let addresses = hex(start)?..hex(end)?;
    (addresses.start < addresses.end).then_some(Mapping { addresses, shared, offset, device, inode })
}

impl Mapping {
    /// Returns the bytes of the file that it shows.
    fn bytes(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.addresses.end - self.addresses.start)
    }
}

/// Finds the address at which the process maps a part of a file: once, shared, and in one piece. The kernel may list
/// one mapping in several lines, where its parts have different properties.
fn place(mappings: &[Mapping], part: &Part) -> Result<u64, MemoryError> {
    let shows = |mapping: &&Mapping| {
        let bytes = mapping.bytes();
        (mapping.device, mapping.inode) == (part.device, part.inode)
            && bytes.start < part.bytes.end
            && bytes.end > part.bytes.start
    };
    let mut found = mappings.iter().filter(shows).peekable();
    let first = found.peek().ok_or(MemoryError::NotMapped)?;
    let (first_byte, first_address) = (first.offset, first.addresses.start);
    let mut next = first_byte;
    for mapping in found {
        let distance = mapping.addresses.start.checked_sub(first_address);
        let follows = mapping.offset == next && distance == next.checked_sub(first_byte);
        if !follows {
            return Err(MemoryError::Twice);
        }
        if !mapping.shared {
            return Err(MemoryError::Private);
        }
        next = mapping.bytes().end;
    }
    let missing = part.bytes.end.saturating_sub(next) + first_byte.saturating_sub(part.bytes.start);
    if missing > 0 {
        let bytes = part.bytes.end - part.bytes.start;
        return Err(MemoryError::Part { mapped: bytes - missing, bytes });
    }
    Ok(first_address.saturating_add(part.bytes.start - first_byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed_part(lines: &[&str], bytes: Range<u64>) -> Result<u64, MemoryError> {
        let mappings: Vec<_> = lines.iter().map(|line| parse(line).unwrap()).collect();
        place(&mappings, &Part { device: 0x1a, inode: 77, bytes })
    }

    fn placed(lines: &[&str]) -> Result<u64, MemoryError> {
        placed_part(lines, 0..0x3000)
    }

    #[test]
    fn finds_memory_that_is_mapped_once_in_whatever_parts() {
        let other = "400000-401000 r-xp 00000000 fe:00 12   /usr/bin/qemu";
        let whole = "7f0000000000-7f0000003000 rw-s 00000000 00:1a 77  /dev/shm/a b";
        assert_eq!(placed(&[other, whole]).unwrap(), 0x7f00_0000_0000);
        let begin = "7f0000000000-7f0000001000 rw-s 00000000 00:1a 77 /dev/shm/a";
        let end = "7f0000001000-7f0000003000 rw-s 00001000 00:1a 77 /dev/shm/a";
        assert_eq!(placed(&[begin, other, end]).unwrap(), 0x7f00_0000_0000);
        assert!(placed(&[begin]).unwrap_err().to_string().contains("4096 of the 12288"));
        assert!(placed(&[end]).unwrap_err().to_string().contains("8192 of the 12288"));
        let again = "7f0000004000-7f0000007000 rw-s 00000000 00:1a 77 /dev/shm/a";
        assert!(placed(&[whole, again]).unwrap_err().to_string().contains("twice"));
        let private = "7f0000000000-7f0000003000 rw-p 00000000 00:1a 77 /dev/shm/a";
        assert!(placed(&[private]).unwrap_err().to_string().contains("share=on"));
        assert!(placed(&[other]).unwrap_err().to_string().contains("replaced"));
    }

    #[test]
    fn finds_regions_that_share_a_file() {
        let low = "7f0000000000-7f0000001000 rw-s 00000000 00:1a 77 /dev/shm/a";
        let high = "7e0000000000-7e0000002000 rw-s 00001000 00:1a 77 /dev/shm/a";
        assert_eq!(placed_part(&[high, low], 0..0x1000).unwrap(), 0x7f00_0000_0000);
        assert_eq!(placed_part(&[high, low], 0x1000..0x3000).unwrap(), 0x7e00_0000_0000);
        // The kernel may have made one of two that lie side by side.
        let both = "7f0000000000-7f0000003000 rw-s 00000000 00:1a 77 /dev/shm/a";
        assert_eq!(placed_part(&[both], 0x1000..0x3000).unwrap(), 0x7f00_0000_1000);
        assert!(placed_part(&[both, high], 0x1000..0x3000).unwrap_err().to_string().contains("twice"));
        assert!(placed_part(&[low, high], 0..0x3000).unwrap_err().to_string().contains("twice"));
    }

    #[test]
    fn lines_that_are_none_are_left_out() {
        for line in ["", "nonsense", "1-2 rw-p 0", "1-g rw-p 0 0:0 0"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
