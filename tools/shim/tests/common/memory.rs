//! The memory of a program, watched from outside through what its shim handed over.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use memlane_kvm::userfault::{Faults, Userfault, WRITE_PROTECT_ASYNC};
use tempfile::NamedTempFile;

use super::Handles;

/// Bytes of a page.
const PAGE_BYTES: u64 = 4096;

/// Bit of `/proc/PID/pagemap`: write-protected by userfaultfd.
const PROTECTED: u64 = 1 << 57;

/// A file on tmpfs that a program maps.
pub(crate) struct RamFile(NamedTempFile);

/// Where a program maps the file.
pub(crate) struct Memory {
    userfault: Option<OwnedFd>,
    pagemap: File,
    addresses: Range<u64>,
}

impl RamFile {
    pub(crate) fn new(pages: u64) -> Self {
        let file = tempfile::Builder::new().prefix("memlane-shim-").tempfile_in("/dev/shm").unwrap();
        file.as_file().set_len(pages * PAGE_BYTES).unwrap();
        Self(file)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Memory {
    /// Finds the mapping of `file`.
    pub(crate) fn find(mut handles: Handles, file: &RamFile) -> Self {
        let mut maps = String::new();
        handles.maps.read_to_string(&mut maps).unwrap();
        let path = file.path().to_str().unwrap();
        let line = maps.lines().find(|line| line.ends_with(path)).expect("the file is mapped");
        let (start, rest) = line.split_once('-').unwrap();
        let (end, _) = rest.split_once(' ').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        let Handles { userfault, pagemap, .. } = handles;
        Self { userfault: Some(userfault), pagemap, addresses: number(start)..number(end) }
    }

    /// The same, seen by a `pagemap` of the observer's own, without any descriptor of the program.
    pub(crate) fn without_userfault(self, pagemap: File) -> Self {
        Self { userfault: None, pagemap, ..self }
    }

    /// Protects all of it; the protection lasts as long as what is returned.
    pub(crate) fn protect(&self) -> Userfault {
        let fd = self.userfault.as_ref().unwrap().try_clone().unwrap();
        let userfault = Userfault::from_fd(fd, WRITE_PROTECT_ASYNC).unwrap();
        userfault.register(self.addresses.clone(), Faults::WriteProtect).unwrap();
        userfault.write_protect(self.addresses.clone(), true).unwrap();
        userfault
    }

    /// Pages written since they were protected.
    pub(crate) fn written(&self) -> BTreeSet<u64> {
        let pages = (self.addresses.end - self.addresses.start) / PAGE_BYTES;
        let mut entries = vec![0; pages as usize * 8];
        self.pagemap.read_exact_at(&mut entries, self.addresses.start / PAGE_BYTES * 8).unwrap();
        let entries = entries.chunks_exact(8).map(|entry| u64::from_ne_bytes(entry.try_into().unwrap()));
        let written = entries.enumerate().filter(|(_, entry)| entry & PROTECTED == 0);
        written.map(|(page, _)| page as u64).collect()
    }
}
