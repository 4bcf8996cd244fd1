//! Tracking QEMU's writes from outside, through the descriptors that its shim hands over.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use memlane_kvm::dirty::{ForeignTracker, TrackError};
use memlane_kvm::ram::GuestRam;
use memlane_kvm::userfault::{Userfault, WRITE_PROTECT_ASYNC};
use memlane_protocol::PageSet;

use super::inspect::MemoryFile;
use crate::guest::shim::Handles;
use crate::guest::{DriverError, Harvest};

/// Tracks until it is dropped, which closes the userfaultfd and so lifts all protection.
pub struct Tracking {
    /// Works on threads of its own: a large guest's page tables take long to walk.
    tracker: Arc<Mutex<ForeignTracker>>,
    harvested: Arc<PageSet>,
}

impl Tracking {
    /// Begins to track writes to `files`, which are the regions of `ram`. Nothing is armed yet.
    pub fn start(ram: Arc<GuestRam>, files: &[MemoryFile], handles: Handles) -> Result<Self, String> {
        let Handles { userfault, pagemap, maps } = handles;
        let mappings =
            mappings(&File::from(maps)).map_err(|error| format!("cannot read its mappings: {error}"))?;
        let addresses = files.iter().map(|file| place(&mappings, file)).collect::<Result<_, _>>()?;
        let userfault =
            Userfault::from_fd(userfault, WRITE_PROTECT_ASYNC).map_err(|error| error.to_string())?;
        let harvested = Arc::new(PageSet::new(ram.pages()));
        let tracker = ForeignTracker::new(ram, addresses, userfault, File::from(pagemap));
        let tracker = tracker.map_err(|error| error.to_string())?;
        Ok(Self { tracker: Arc::new(Mutex::new(tracker)), harvested })
    }

    /// See [`Driver::arm`](crate::guest::Driver::arm).
    pub async fn arm(&self, pages: Range<u64>) -> Result<Vec<Range<u64>>, DriverError> {
        self.work("arm", move |tracker, _| tracker.arm(pages)).await
    }

    /// See [`Driver::harvest`](crate::guest::Driver::harvest).
    pub async fn harvest(&self, into: &PageSet) -> Result<Harvest, DriverError> {
        // Into a set of its own first: whoever asked may give up waiting, and what was found must
        // not be lost with it.
        let found = self.work("harvest", |tracker, harvested| tracker.harvest(harvested)).await?;
        let new = self.harvested.drain_into(0..self.harvested.pages(), into);
        Ok(Harvest { new, holes: found.holes })
    }

    async fn work<T: Send + 'static>(
        &self,
        request: &'static str,
        work: impl FnOnce(&mut ForeignTracker, &PageSet) -> Result<T, TrackError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let (tracker, harvested) = (self.tracker.clone(), self.harvested.clone());
        let work = move || {
            let mut tracker = tracker.lock().unwrap_or_else(PoisonError::into_inner);
            work(&mut tracker, &harvested)
        };
        let done = tokio::task::spawn_blocking(work).await.expect("tracking does not panic");
        done.map_err(|error| DriverError::Failed { request, reason: error.to_string() })
    }
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
    Some(Mapping { addresses: hex(start)?..hex(end)?, shared, offset, device, inode })
}

/// Where a file lies in the process: once, shared, and in one piece. The kernel may tell one mapping in
/// several lines, where its parts have different properties.
fn place(mappings: &[Mapping], file: &MemoryFile) -> Result<u64, String> {
    let of_file = |mapping: &&Mapping| (mapping.device, mapping.inode) == (file.device, file.inode);
    let mut parts = mappings.iter().filter(of_file).peekable();
    let first = parts.peek().ok_or("it does not map the file that is its memory; was the file replaced?")?;
    let (start, mut next) = (first.addresses.start, 0);
    for part in parts {
        let follows = part.addresses.start == start + next && part.offset == next;
        if !follows {
            return Err("it maps its memory twice, so that not all writes would be seen".into());
        }
        if !part.shared {
            return Err("it maps its memory privately; start it with share=on".into());
        }
        next = part.addresses.end - start;
    }
    if next < file.bytes {
        return Err(format!("it maps {next} of the {} bytes of its memory", file.bytes));
    }
    Ok(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: MemoryFile = MemoryFile { device: 0x1a, inode: 77, bytes: 0x3000 };

    fn placed(lines: &[&str]) -> Result<u64, String> {
        let mappings: Vec<_> = lines.iter().map(|line| parse(line).unwrap()).collect();
        place(&mappings, &FILE)
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
        let again = "7f0000004000-7f0000007000 rw-s 00000000 00:1a 77 /dev/shm/a";
        assert!(placed(&[whole, again]).unwrap_err().contains("twice"));
        let private = "7f0000000000-7f0000003000 rw-p 00000000 00:1a 77 /dev/shm/a";
        assert!(placed(&[private]).unwrap_err().contains("share=on"));
        assert!(placed(&[other]).unwrap_err().contains("replaced"));
    }

    #[test]
    fn lines_that_are_none_are_left_out() {
        for line in ["", "nonsense", "1-2 rw-p 0", "1-g rw-p 0 0:0 0"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
