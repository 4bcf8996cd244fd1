//! A guest's memory as its VMM's process sees it, through what that process hands over.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use memlane_kvm::ram::GuestRam;
use memlane_kvm::vmm_mapping::VmmMapping;
use rustix::fs::{Mode, OFlags, PROC_SUPER_MAGIC};
use rustix::io::Errno;

/// What userfaultfds are made with.
pub const DEVICE: &str = "/dev/userfaultfd";

/// Enough to track a VMM's memory from here, to hold up its writes, or to provide it.
#[derive(Debug)]
pub struct VmmMemory {
    /// A userfaultfd of the process, on which nothing was done yet (`UFFDIO_API` is due first).
    pub userfault: OwnedFd,
    /// `/proc/PID/pagemap`.
    pub pagemap: File,
    /// Where the guest's memory lies in the process.
    pub memory: Arc<VmmMapping>,
    /// The VMM may take memory from its guest while it runs, as a balloon does.
    pub punches: bool,
}

/// What a process hands over: a VMM, or the shim in one.
#[derive(Debug)]
pub struct Handles {
    /// See [`VmmMemory::userfault`]. Closing it lifts all protection, unless a copy is kept.
    pub userfault: OwnedFd,
    /// `/proc/PID/pagemap`.
    pub pagemap: OwnedFd,
    /// `/proc/PID/maps`.
    pub maps: OwnedFd,
}

/// Opens the device, to lend it to a process that may not do so itself.
pub fn open_device() -> Result<OwnedFd, Errno> {
    rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

impl Handles {
    /// The three descriptors, if they are what they should be: reading anything else could keep the
    /// daemon waiting.
    pub fn take(descriptors: Vec<OwnedFd>) -> Result<Self, String> {
        let count = descriptors.len();
        let Ok([userfault, pagemap, maps]) = <[OwnedFd; 3]>::try_from(descriptors) else {
            return Err(format!("{count} descriptors came instead of 3"));
        };
        let is_proc =
            |fd: &OwnedFd| rustix::fs::fstatfs(fd).is_ok_and(|found| found.f_type == PROC_SUPER_MAGIC);
        let fits = name_of(&userfault)? == "anon_inode:[userfaultfd]"
            && (is_proc(&pagemap) && file_name(&name_of(&pagemap)?) == "pagemap")
            && (is_proc(&maps) && file_name(&name_of(&maps)?) == "maps");
        if !fits {
            return Err("its descriptors are not a userfaultfd, a pagemap and maps, in this order".into());
        }
        Ok(Self { userfault, pagemap, maps })
    }

    /// Finds where the process maps the files behind `ram`; `punches` as in [`VmmMemory`].
    pub fn find(self, ram: &Arc<GuestRam>, punches: bool) -> Result<VmmMemory, String> {
        let Self { userfault, pagemap, maps } = self;
        let mappings =
            mappings(&File::from(maps)).map_err(|error| format!("cannot read its mappings: {error}"))?;
        let mut addresses = Vec::new();
        for (region, fd) in ram.regions().iter().zip(ram.descriptors()) {
            let stat = rustix::fs::fstat(fd)
                .map_err(|error| format!("cannot look at the file behind its memory: {error}"))?;
            let bytes = region.offset..region.offset + region.bytes;
            addresses.push(place(&mappings, &Part { device: stat.st_dev, inode: stat.st_ino, bytes })?);
        }
        let memory = VmmMapping::new(ram.clone(), &addresses)
            .ok_or("it maps its memory where pages of that size cannot lie")?;
        Ok(VmmMemory { userfault, pagemap: pagemap.into(), memory: Arc::new(memory), punches })
    }
}

/// What the kernel calls an open file.
pub(super) fn name_of(fd: impl AsFd) -> Result<String, String> {
    let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    let name = std::fs::read_link(&link).map_err(|error| format!("cannot read {link}: {error}"))?;
    Ok(name.to_string_lossy().into_owned())
}

fn file_name(path: &str) -> &str {
    Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// The part of a file that is a region of memory.
struct Part {
    /// Device and inode number, as in `/proc/PID/maps`.
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

fn mappings(file: &File) -> std::io::Result<Vec<Mapping>> {
    let lines = BufReader::new(file).lines();
    lines.filter_map(|line| line.map(|line| parse(&line)).transpose()).collect()
}

/// Reads a line; `None` if it is none.
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
    /// The bytes of the file that it shows.
    fn bytes(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.addresses.end - self.addresses.start)
    }
}

/// Where a part of a file lies in the process: once, shared, and in one piece. The kernel may tell one
/// mapping in several lines, where its parts have different properties.
fn place(mappings: &[Mapping], part: &Part) -> Result<u64, String> {
    let shows = |mapping: &&Mapping| {
        let bytes = mapping.bytes();
        (mapping.device, mapping.inode) == (part.device, part.inode)
            && bytes.start < part.bytes.end
            && bytes.end > part.bytes.start
    };
    let mut found = mappings.iter().filter(shows).peekable();
    let first = found.peek().ok_or("it does not map the file that is its memory; was the file replaced?")?;
    let (first_byte, first_address) = (first.offset, first.addresses.start);
    let mut next = first_byte;
    for mapping in found {
        let distance = mapping.addresses.start.checked_sub(first_address);
        let follows = mapping.offset == next && distance == next.checked_sub(first_byte);
        if !follows {
            return Err("it maps its memory twice, so that not all writes would be seen".into());
        }
        if !mapping.shared {
            return Err("it maps its memory privately; start it with share=on".into());
        }
        next = mapping.bytes().end;
    }
    let missing = part.bytes.end.saturating_sub(next) + first_byte.saturating_sub(part.bytes.start);
    if missing > 0 {
        let bytes = part.bytes.end - part.bytes.start;
        return Err(format!("it maps {} of the {bytes} bytes of its memory", bytes - missing));
    }
    Ok(first_address.saturating_add(part.bytes.start - first_byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed_part(lines: &[&str], bytes: Range<u64>) -> Result<u64, String> {
        let mappings: Vec<_> = lines.iter().map(|line| parse(line).unwrap()).collect();
        place(&mappings, &Part { device: 0x1a, inode: 77, bytes })
    }

    fn placed(lines: &[&str]) -> Result<u64, String> {
        placed_part(lines, 0..0x3000)
    }

    #[test]
    fn finds_memory_that_is_mapped_once_in_whatever_parts() {
        let other = "400000-401000 r-xp 00000000 fe:00 12   /usr/bin/qemu";
        let whole = "7f0000000000-7f0000003000 rw-s 00000000 00:1a 77  /dev/shm/a b";
        assert_eq!(placed(&[other, whole]), Ok(0x7f00_0000_0000));
        let begin = "7f0000000000-7f0000001000 rw-s 00000000 00:1a 77 /dev/shm/a";
        let end = "7f0000001000-7f0000003000 rw-s 00001000 00:1a 77 /dev/shm/a";
        assert_eq!(placed(&[begin, other, end]), Ok(0x7f00_0000_0000));
        assert!(placed(&[begin]).unwrap_err().contains("4096 of the 12288"));
        assert!(placed(&[end]).unwrap_err().contains("8192 of the 12288"));
        let again = "7f0000004000-7f0000007000 rw-s 00000000 00:1a 77 /dev/shm/a";
        assert!(placed(&[whole, again]).unwrap_err().contains("twice"));
        let private = "7f0000000000-7f0000003000 rw-p 00000000 00:1a 77 /dev/shm/a";
        assert!(placed(&[private]).unwrap_err().contains("share=on"));
        assert!(placed(&[other]).unwrap_err().contains("replaced"));
    }

    #[test]
    fn finds_regions_that_share_a_file() {
        let low = "7f0000000000-7f0000001000 rw-s 00000000 00:1a 77 /dev/shm/a";
        let high = "7e0000000000-7e0000002000 rw-s 00001000 00:1a 77 /dev/shm/a";
        assert_eq!(placed_part(&[high, low], 0..0x1000), Ok(0x7f00_0000_0000));
        assert_eq!(placed_part(&[high, low], 0x1000..0x3000), Ok(0x7e00_0000_0000));
        // The kernel may have made one of two that lie side by side.
        let both = "7f0000000000-7f0000003000 rw-s 00000000 00:1a 77 /dev/shm/a";
        assert_eq!(placed_part(&[both], 0x1000..0x3000), Ok(0x7f00_0000_1000));
        assert!(placed_part(&[both, high], 0x1000..0x3000).unwrap_err().contains("twice"));
        assert!(placed_part(&[low, high], 0..0x3000).unwrap_err().contains("twice"));
    }

    #[test]
    fn lines_that_are_none_are_left_out() {
        for line in ["", "nonsense", "1-2 rw-p 0", "1-g rw-p 0 0:0 0"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
