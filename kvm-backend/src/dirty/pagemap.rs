//! [`PagemapTracker`]: page tables, over userfaultfd write protection.
//!
//! The guest's mapping is registered for asynchronous write protection: a write to a protected
//! page lifts the protection and goes on. `PAGEMAP_SCAN` (`Documentation/admin-guide/mm/pagemap.rst`)
//! tells the pages that are no longer protected, and protects them again in the same step.
//! It sees all writers of this process: vCPUs, threads, and the kernel on their behalf.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use linux_raw_sys::general::{
    PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, page_region, pm_scan_arg,
};
use memlane_protocol::wire::machine::TrackerKind;
use memlane_protocol::{PAGE_SIZE, PageSet};
use rustix::io::Errno;
use rustix::ioctl::{ioctl, opcode};

use super::{Armed, DirtyTracker, TrackError};
use crate::ioctl::Answering;
use crate::ram::GuestRam;
use crate::shared::SharedWords;
use crate::userfault::{Faults, Userfault, UserfaultError, WRITE_PROTECT_ASYNC};

/// Pages protected in one call (4 MiB): KVM drops its own mappings of the whole range, and a
/// vCPU that faults there has to wait.
const PIECE_PAGES: u64 = 1024;

/// Written pages no further apart than this are protected again in one call. A call costs
/// about as much as KVM's mapping some tens of clean pages anew.
const MERGE_PAGES: u64 = 32;

/// Runs of pages that one scan can return.
const SCAN_RUNS: usize = 512;

/// Finds dirty pages by `PAGEMAP_SCAN`, in the process that runs the guest.
pub struct PagemapTracker {
    ram: Arc<GuestRam>,
    pagemap: File,
    armed: Armed,
    /// Open while tracking is on.
    userfault: Option<Userfault>,
}

impl PagemapTracker {
    /// A tracker for the guest whose memory is written through `ram` in this process.
    ///
    /// Fails where the kernel or the process's rights do not suffice (Linux 6.7,
    /// `/dev/userfaultfd`); the error says what to do.
    pub fn new(ram: Arc<GuestRam>) -> Result<Self, TrackError> {
        let pagemap =
            File::open("/proc/self/pagemap").map_err(TrackError::kernel("opening /proc/self/pagemap"))?;
        open_userfault()?;
        let armed = Armed::new(ram.pages());
        Ok(Self { ram, pagemap, armed, userfault: None })
    }

    /// `pages`, which lie in one region, grown to whole backing pages.
    fn grow(&self, index: usize, pages: &Range<u64>) -> Range<u64> {
        let region = &self.ram.regions()[index];
        let unit = u64::from(region.page_bytes) / PAGE_SIZE;
        // Regions hold whole backing pages, so that growing cannot leave the region.
        let first = self.ram.page_of(region.address).unwrap_or(0);
        let down = (pages.start - first) / unit * unit;
        let up = (pages.end - first).next_multiple_of(unit);
        first + down..first + up
    }

    /// Addresses of `pages`, which lie in one region.
    fn addresses(&self, pages: &Range<u64>) -> Range<u64> {
        let start = self.ram.slices(pages.clone()).next().map_or(0, |slice| slice.ptr as u64);
        start..start + (pages.end - pages.start) * PAGE_SIZE
    }

    /// Protects the written ones of the armed pages `run` again and adds them to `into`.
    fn harvest_run(&self, run: &Range<u64>, into: &PageSet<SharedWords>) -> Result<u64, TrackError> {
        let addresses = self.addresses(run);
        let page = |address: u64| {
            run.start + (address.clamp(addresses.start, addresses.end) - addresses.start) / PAGE_SIZE
        };
        let mut new = 0;
        // Protecting makes KVM drop its mappings of all that is scanned, clean pages too. So
        // look first, without protecting, and then protect around what was found.
        let mut merged: Option<Range<u64>> = None;
        self.scan(addresses.clone(), 0, |written| match &mut merged {
            Some(last)
                if written.start.saturating_sub(last.end) <= MERGE_PAGES * PAGE_SIZE
                    && written.end - last.start <= PIECE_PAGES * PAGE_SIZE =>
            {
                last.end = written.end;
                Ok(())
            }
            last => match last.replace(written) {
                Some(complete) => self.protect_written(complete, |found| {
                    new += into.insert_range(page(found.start)..page(found.end))
                }),
                None => Ok(()),
            },
        })?;
        if let Some(last) = merged {
            self.protect_written(last, |found| new += into.insert_range(page(found.start)..page(found.end)))?;
        }
        Ok(new)
    }

    /// Protects what is written in `addresses`; calls `found` with what was protected.
    fn protect_written(
        &self,
        addresses: Range<u64>,
        mut found: impl FnMut(Range<u64>),
    ) -> Result<(), TrackError> {
        let mut from = addresses.start;
        while from < addresses.end {
            let end = addresses.end.min(from.saturating_add(PIECE_PAGES * PAGE_SIZE));
            let flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC;
            self.scan(from..end, flags, |written| {
                found(written);
                Ok(())
            })?;
            from = end;
        }
        Ok(())
    }

    /// Calls `found` with each run of written pages in `addresses`, in order.
    fn scan(
        &self,
        addresses: Range<u64>,
        flags: u32,
        mut found: impl FnMut(Range<u64>) -> Result<(), TrackError>,
    ) -> Result<(), TrackError> {
        const SCAN: u32 = opcode::read_write::<pm_scan_arg>(b'f', 16);
        let mut runs = [page_region { start: 0, end: 0, categories: 0 }; SCAN_RUNS];
        let mut from = addresses.start;
        while from < addresses.end {
            let mut argument = pm_scan_arg {
                size: size_of::<pm_scan_arg>() as u64,
                flags: flags.into(),
                start: from,
                end: addresses.end,
                walk_end: 0,
                vec: runs.as_mut_ptr() as u64,
                vec_len: runs.len() as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: PAGE_IS_WRITTEN.into(),
                category_anyof_mask: 0,
                return_mask: PAGE_IS_WRITTEN.into(),
            };
            // SAFETY: the argument is of the ioctl's type, and `vec` has room for `vec_len` runs.
            let filled =
                match unsafe { ioctl(&self.pagemap, Answering::<SCAN>::new((&raw mut argument).cast())) } {
                    Ok(filled) => filled,
                    Err(Errno::INTR) => continue,
                    Err(error) => {
                        return Err(TrackError::kernel("scanning for written pages (PAGEMAP_SCAN)")(error));
                    }
                };
            for run in runs.iter().take(usize::try_from(filled).unwrap_or(0)) {
                found(run.start..run.end)?;
            }
            if argument.walk_end <= from {
                let stuck = std::io::Error::other("the scan stands still");
                return Err(TrackError::kernel("scanning for written pages (PAGEMAP_SCAN)")(stuck));
            }
            from = argument.walk_end;
        }
        Ok(())
    }
}

impl DirtyTracker for PagemapTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::Pagemap
    }

    fn start(&mut self) -> Result<(), TrackError> {
        if self.userfault.is_none() {
            self.armed.clear();
            self.ram.marks().clear();
            let userfault = open_userfault()?;
            // Closing it on an early return takes back what is registered by then.
            for (_, piece) in self.ram.pieces(0..self.ram.pages()) {
                userfault.register(self.addresses(&piece), Faults::WriteProtect).map_err(
                    TrackError::kernel("registering memory for write protection (UFFDIO_REGISTER)"),
                )?;
            }
            self.userfault = Some(userfault);
        }
        Ok(())
    }

    fn arm(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        let userfault = self.userfault.as_ref().ok_or(TrackError::NotStarted)?;
        for run in self.armed.missing(pages)? {
            for (index, piece) in self.ram.pieces(run) {
                let mut piece = self.grow(index, &piece);
                // What was grown into may be armed already, and is then armed whole.
                for missing in self.armed.missing(piece.clone())? {
                    piece = missing;
                    while !piece.is_empty() {
                        let end = piece.end.min(piece.start + PIECE_PAGES);
                        let part = piece.start..end;
                        userfault
                            .write_protect(self.addresses(&part), true)
                            .map_err(TrackError::kernel("protecting pages (UFFDIO_WRITEPROTECT)"))?;
                        self.armed.add(part);
                        piece.start = end;
                    }
                }
            }
        }
        Ok(())
    }

    fn armed(&self) -> u64 {
        self.armed.count()
    }

    fn harvest(&mut self, into: &PageSet<SharedWords>) -> Result<u64, TrackError> {
        if self.userfault.is_none() {
            return Err(TrackError::NotStarted);
        }
        let mut new = self.armed.drain(self.ram.marks(), into);
        for (_, piece) in self.ram.pieces(0..self.ram.pages()) {
            for run in self.armed.runs(piece) {
                new += self.harvest_run(&run, into)?;
            }
        }
        Ok(new)
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        if let Some(userfault) = self.userfault.take() {
            self.armed.clear();
            for (_, piece) in self.ram.pieces(0..self.ram.pages()) {
                userfault
                    .unregister(self.addresses(&piece))
                    .map_err(TrackError::kernel("lifting write protection (UFFDIO_UNREGISTER)"))?;
            }
        }
        Ok(())
    }
}

fn open_userfault() -> Result<Userfault, TrackError> {
    Userfault::open(WRITE_PROTECT_ASYNC).map_err(|error| TrackError::Unavailable {
        what: "asynchronous write protection by userfaultfd",
        advice: match error {
            UserfaultError::Permission => "grant it, or use the dirty log or ring of KVM",
            UserfaultError::Features { .. } => "use the dirty log or ring of KVM",
        },
        source: std::io::Error::other(error),
    })
}
