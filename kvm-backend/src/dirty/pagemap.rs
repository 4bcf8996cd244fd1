//! [`PagemapTracker`]: page tables, over userfaultfd write protection.
//!
//! The guest's mapping is registered for asynchronous write protection: a write to a protected
//! page lifts the protection and goes on. `PAGEMAP_SCAN` (`Documentation/admin-guide/mm/pagemap.rst`)
//! tells the pages that are no longer protected, and protects them again in the same step.
//! It sees all writers of this process: vCPUs, threads, and the kernel on their behalf.
//!
//! Only where the guest's files hold data is memory protected, page table by page table: protecting a hole
//! makes page tables for it, 2 GiB of them for each TiB. What comes into being elsewhere is found in the
//! files, as whatever they hold there was not there when it was looked for last.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use memlane_protocol::wire::machine::TrackerKind;
use memlane_protocol::{PAGE_SIZE, PageSet};

use super::scan::{PIECE_PAGES, PagemapScan, Pieces, Query};
use super::{Armed, DirtyTracker, TrackError};
use crate::ram::GuestRam;
use crate::shared::SharedWords;
use crate::userfault::{Faults, Userfault, UserfaultError, WRITE_PROTECT_ASYNC};

/// Pages under one page table.
const TABLE_PAGES: u64 = 512;
const LOOKING: &str = "looking for data in the guest's memory";

/// Finds dirty pages by `PAGEMAP_SCAN`, in the process that runs the guest.
pub struct PagemapTracker {
    ram: Arc<GuestRam>,
    pagemap: PagemapScan,
    armed: Armed,
    /// What of that is protected unless it was written since; the rest held no data when it was looked at.
    guarded: Armed,
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
        let (armed, guarded) = (Armed::new(ram.pages()), Armed::new(ram.pages()));
        Ok(Self { ram, pagemap: PagemapScan::new(pagemap), armed, guarded, userfault: None })
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

    /// Protects the page tables of `pages`, none of which is guarded, whose pages hold data; returns these pages.
    fn guard(&mut self, pages: Range<u64>) -> Result<Vec<Range<u64>>, TrackError> {
        let userfault = self.userfault.as_ref().ok_or(TrackError::NotStarted)?;
        let tables = self.ram.data_blocks(pages, TABLE_PAGES).map_err(TrackError::kernel(LOOKING))?;
        for table in &tables {
            let mut from = table.start;
            while from < table.end {
                let part = from..table.end.min(from + PIECE_PAGES);
                userfault
                    .write_protect(self.addresses(&part), true)
                    .map_err(TrackError::kernel("protecting pages (UFFDIO_WRITEPROTECT)"))?;
                from = part.end;
                self.guarded.add(part);
            }
        }
        Ok(tables)
    }

    /// Guards what has come into being in `pages`, which were armed and not guarded, and adds it to `into`.
    fn harvest_fresh(&mut self, pages: Range<u64>, into: &PageSet<SharedWords>) -> Result<u64, TrackError> {
        let (mut new, end) = (0, pages.end);
        for table in self.guard(pages)? {
            // Looked at after it was protected: whatever comes later is found written. What follows the last
            // one may be data for long, and the other way of looking walks to the end of that.
            let data =
                if table.end < end { self.ram.data_extents(table) } else { self.ram.extents_now(table) };
            let data = data.map_err(TrackError::kernel(LOOKING))?;
            new += data.into_iter().map(|extent| into.insert_range(extent)).sum::<u64>();
        }
        Ok(new)
    }

    /// Protects the written ones of the guarded pages `run` again and adds them to `into`.
    fn harvest_run(&self, run: &Range<u64>, into: &PageSet<SharedWords>) -> Result<u64, TrackError> {
        let addresses = self.addresses(run);
        let page = |address: u64| {
            run.start + (address.clamp(addresses.start, addresses.end) - addresses.start) / PAGE_SIZE
        };
        let mut new = 0;
        let mut take = |piece: Range<u64>| {
            self.pagemap.protect(piece, Query::WRITTEN, |found| {
                new += into.insert_range(page(found.addresses.start)..page(found.addresses.end));
            })
        };
        let mut pieces = Pieces::default();
        self.pagemap.scan(addresses.clone(), Query::WRITTEN, |found| {
            pieces.add(found.addresses).map_or(Ok(()), &mut take)
        })?;
        pieces.end().map_or(Ok(()), take)?;
        Ok(new)
    }
}

impl DirtyTracker for PagemapTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::Pagemap
    }

    fn start(&mut self) -> Result<(), TrackError> {
        if self.userfault.is_none() {
            self.armed.clear();
            self.guarded.clear();
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
        if self.userfault.is_none() {
            return Err(TrackError::NotStarted);
        }
        for run in self.armed.missing(pages)? {
            let pieces: Vec<_> = self.ram.pieces(run).collect();
            for (index, piece) in pieces {
                // What was grown into may be armed already, and is then armed whole.
                for missing in self.armed.missing(self.grow(index, &piece))? {
                    self.guard(missing.clone())?;
                    self.armed.add(missing);
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
        let ram = self.ram.clone();
        for (_, piece) in ram.pieces(0..ram.pages()) {
            let armed: Vec<_> = self.armed.runs(piece).collect();
            for run in armed {
                let fresh = self.guarded.missing(run.clone())?;
                for guarded in self.guarded.runs(run) {
                    new += self.harvest_run(&guarded, into)?;
                }
                for pages in fresh {
                    new += self.harvest_fresh(pages, into)?;
                }
            }
        }
        Ok(new)
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        if let Some(userfault) = self.userfault.take() {
            self.armed.clear();
            self.guarded.clear();
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
            UserfaultError::Features { .. } | UserfaultError::Kind => "use the dirty log or ring of KVM",
        },
        source: std::io::Error::other(error),
    })
}
