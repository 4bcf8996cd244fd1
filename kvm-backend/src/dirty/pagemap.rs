//! [`PagemapTracker`]: page tables, over userfaultfd write protection.
//!
//! The guest's mapping is registered for asynchronous write protection: a write to a protected page lifts the
//! protection and goes on. `PAGEMAP_SCAN` (`Documentation/admin-guide/mm/pagemap.rst`) returns the pages that are
//! no longer protected, and protects them again in the same step. It sees all writers of this process: vCPUs,
//! threads, and the kernel on their behalf.
//!
//! Memory is protected only where the guest's files hold data, page table by page table: protecting a hole makes
//! page tables for it, 2 GiB of them for each TiB. Data that appears elsewhere is found in the files, since
//! whatever they hold there was not there at the last look.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use memlane_protocol::wire::machine::TrackerKind;
use memlane_protocol::{PAGE_SIZE, PageSet};

use super::scan::{PIECE_PAGES, PagemapScan, Pieces, Query};
use super::{DirtyTracker, ProtectedPages, TrackError};
use crate::ram::GuestRam;
use crate::shared::SharedWords;
use crate::userfault::{Faults, Userfault, UserfaultError, WRITE_PROTECT_ASYNC};

/// The number of pages that one page table maps.
const TABLE_PAGES: u64 = 512;
/// What was being done when the kernel refused to look for data.
const SEEKING: &str = "find the data in the guest's memory files (SEEK_DATA)";

/// Asks the kernel for a page of this process by `PAGEMAP_SCAN`, which every process may do for itself.
///
/// # Errors
///
/// [`TrackError::Kernel`] where the kernel has no `PAGEMAP_SCAN` (before Linux 6.7).
pub fn try_scan() -> Result<(), TrackError> {
    let pagemap = File::open("/proc/self/pagemap").map_err(TrackError::kernel("open /proc/self/pagemap"))?;
    let here = 0u8;
    let page = (&raw const here) as u64 / PAGE_SIZE * PAGE_SIZE;
    PagemapScan::new(pagemap).scan(page..page + PAGE_SIZE, Query::ALL_MAPPED, |_| Ok(()))
}

/// Finds dirty pages by `PAGEMAP_SCAN`, in the process that runs the guest.
pub struct PagemapTracker {
    ram: Arc<GuestRam>,
    pagemap: PagemapScan,
    /// The pages that the tracker reports on: all that it was asked to write-protect, holes among them.
    tracked: ProtectedPages,
    /// Those of them that are protected unless they were written since. The others held no data at the last look.
    protected: ProtectedPages,
    /// The userfaultfd, which is open while tracking is on.
    userfault: Option<Userfault>,
}

impl PagemapTracker {
    /// Returns a tracker for the guest whose memory is written through `ram` in this process.
    ///
    /// # Errors
    ///
    /// [`TrackError::Unavailable`] where the kernel (before Linux 6.7) or the process's rights (to
    /// `/dev/userfaultfd`) do not suffice; the message says what to do.
    pub fn new(ram: Arc<GuestRam>) -> Result<Self, TrackError> {
        let pagemap =
            File::open("/proc/self/pagemap").map_err(TrackError::kernel("open /proc/self/pagemap"))?;
        open_userfault()?;
        let (tracked, protected) = (ProtectedPages::new(ram.pages()), ProtectedPages::new(ram.pages()));
        Ok(Self { ram, pagemap: PagemapScan::new(pagemap), tracked, protected, userfault: None })
    }

    /// Returns `pages`, which lie in one region, grown to whole pages of the region's own size.
    fn grow(&self, index: usize, pages: &Range<u64>) -> Range<u64> {
        let region = &self.ram.regions()[index];
        let unit = u64::from(region.page_bytes) / PAGE_SIZE;
        // A region consists of such pages, so that growing cannot leave it.
        let first = self.ram.page_of(region.address).unwrap_or(0);
        let down = (pages.start - first) / unit * unit;
        let up = (pages.end - first).next_multiple_of(unit);
        first + down..first + up
    }

    /// Returns the addresses of `pages`, which lie in one region.
    fn addresses(&self, pages: &Range<u64>) -> Range<u64> {
        let start = self.ram.slices(pages.clone()).next().map_or(0, |slice| slice.ptr as u64);
        start..start + (pages.end - pages.start) * PAGE_SIZE
    }

    /// Protects, whole page table by page table, those of `pages` that hold data, and returns what it protected.
    /// None of `pages` may be protected already.
    fn protect_data(&mut self, pages: Range<u64>) -> Result<Vec<Range<u64>>, TrackError> {
        let userfault = self.userfault.as_ref().ok_or(TrackError::NotStarted)?;
        let tables = self.ram.data_blocks(pages, TABLE_PAGES).map_err(TrackError::kernel(SEEKING))?;
        for table in &tables {
            let mut from = table.start;
            while from < table.end {
                let part = from..table.end.min(from + PIECE_PAGES);
                userfault
                    .write_protect(self.addresses(&part), true)
                    .map_err(TrackError::kernel("write-protect the guest's memory (UFFDIO_WRITEPROTECT)"))?;
                from = part.end;
                self.protected.add(part);
            }
        }
        Ok(tables)
    }

    /// Protects the data that has appeared in `pages`, which are tracked and not protected, and adds it to `into`.
    fn harvest_new_data(
        &mut self,
        pages: Range<u64>,
        into: &PageSet<SharedWords>,
    ) -> Result<u64, TrackError> {
        let (mut new, end) = (0, pages.end);
        for table in self.protect_data(pages)? {
            // The files are asked after the protection: what appears later is found written. What follows the
            // last table may be data for long, and `data_extents` would walk to the end of that.
            let data = if table.end < end {
                self.ram.data_extents(table)
            } else {
                self.ram.data_extents_uncached(table)
            };
            let data = data.map_err(TrackError::kernel(SEEKING))?;
            new += data.into_iter().map(|extent| into.insert_range(extent)).sum::<u64>();
        }
        Ok(new)
    }

    /// Protects those pages of the protected `run` again that were written, and adds them to `into`.
    fn harvest_written(&self, run: &Range<u64>, into: &PageSet<SharedWords>) -> Result<u64, TrackError> {
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
            self.tracked.clear();
            self.protected.clear();
            self.ram.dirty_bitmap().clear();
            let userfault = open_userfault()?;
            // Closing it on an early return undoes what is registered by then.
            for (_, piece) in self.ram.pieces(0..self.ram.pages()) {
                userfault.register(self.addresses(&piece), Faults::WriteProtect).map_err(
                    TrackError::kernel("register the guest's memory for write protection (UFFDIO_REGISTER)"),
                )?;
            }
            self.userfault = Some(userfault);
        }
        Ok(())
    }

    fn write_protect(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        if self.userfault.is_none() {
            return Err(TrackError::NotStarted);
        }
        for run in self.tracked.missing(pages)? {
            let pieces: Vec<_> = self.ram.pieces(run).collect();
            for (index, piece) in pieces {
                // The pages that it grew by may be tracked already; then all pages of their size are.
                for missing in self.tracked.missing(self.grow(index, &piece))? {
                    self.protect_data(missing.clone())?;
                    self.tracked.add(missing);
                }
            }
        }
        Ok(())
    }

    fn write_protected_pages(&self) -> u64 {
        self.tracked.count()
    }

    fn harvest(&mut self, into: &PageSet<SharedWords>) -> Result<u64, TrackError> {
        if self.userfault.is_none() {
            return Err(TrackError::NotStarted);
        }
        let mut new = self.tracked.drain(self.ram.dirty_bitmap(), into);
        let ram = self.ram.clone();
        for (_, piece) in ram.pieces(0..ram.pages()) {
            let tracked: Vec<_> = self.tracked.runs(piece).collect();
            for run in tracked {
                let unprotected = self.protected.missing(run.clone())?;
                for protected in self.protected.runs(run) {
                    new += self.harvest_written(&protected, into)?;
                }
                for pages in unprotected {
                    new += self.harvest_new_data(pages, into)?;
                }
            }
        }
        Ok(new)
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        if let Some(userfault) = self.userfault.take() {
            self.tracked.clear();
            self.protected.clear();
            for (_, piece) in self.ram.pieces(0..self.ram.pages()) {
                userfault.unregister(self.addresses(&piece)).map_err(TrackError::kernel(
                    "lift the write protection of the guest's memory (UFFDIO_UNREGISTER)",
                ))?;
            }
        }
        Ok(())
    }
}

fn open_userfault() -> Result<Userfault, TrackError> {
    Userfault::open(WRITE_PROTECT_ASYNC).map_err(|error| TrackError::Unavailable {
        what: "asynchronous write protection by userfaultfd",
        advice: match error {
            UserfaultError::Permission => "grant it, or use KVM's dirty log or dirty ring",
            UserfaultError::Features { .. } | UserfaultError::Kind => "use KVM's dirty log or dirty ring",
        },
        source: std::io::Error::other(error),
    })
}
