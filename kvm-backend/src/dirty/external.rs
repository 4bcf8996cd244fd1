//! [`ExternalTracker`]: the page tables of another process, over userfaultfd write protection.
//!
//! The other process makes a userfaultfd, opens its own `/proc/self/pagemap`, and hands both over. Only what the
//! memory's files hold as data is ever protected: page tables of holes would cost memory, and a page that appears
//! later is found because it is not protected. So where writes wait ([`WriteProtection::Sync`]), the first write
//! to a hole does not wait.

mod pass;

use std::fs::File;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use memlane_protocol::{PAGE_SIZE, PageSet};

use self::pass::Pass;
use super::TrackError;
use super::hole_watch::HoleWatch;
use super::scan::{PIECE_PAGES, PagemapScan, Query};
use crate::userfault::{Faults, Userfault, is_gone};
use crate::vmm_mapping::VmmMapping;

/// What was being done when the kernel refused to look for data.
const SEEKING: &str = "find the data in the guest's memory files (SEEK_DATA)";

/// Finds the pages that another process, a guest's VMM, writes, without its help.
///
/// Dropping the tracker lifts all protection, as the death of this process does.
pub struct ExternalTracker {
    memory: Arc<VmmMapping>,
    mode: WriteProtection,
    pagemap: PagemapScan,
    holes: HoleWatch,
    /// The userfaultfd, which is open while tracking is on.
    userfault: Option<Arc<Userfault>>,
    /// The pages that were write-protected for the first time or reported. They are protected unless they were
    /// written since.
    reported: PageSet,
    /// Those of them that were zero or a hole when they were last reported.
    zero: PageSet,
}

/// What a harvest of a tracker found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Harvest {
    /// The number of pages that were not in the set before.
    pub new: u64,
    /// Whether pages are among them that are holes in the guest's memory: reading a hole would allocate memory for
    /// it again.
    pub holes: bool,
}

/// What becomes of writes to protected pages, as the features of the userfaultfd decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteProtection {
    /// The kernel resolves the write: it lifts the protection, and the write goes on. The userfaultfd has
    /// [`WRITE_PROTECT_ASYNC`](crate::userfault::WRITE_PROTECT_ASYNC).
    Async,
    /// The write waits, and [`Userfault::read`] reports it, until the protection of the page is lifted by
    /// [`Userfault::write_protect`]. The userfaultfd has [`WRITE_PROTECT`](crate::userfault::WRITE_PROTECT).
    Sync,
}

impl ExternalTracker {
    /// Begins to track. No page is write-protected yet.
    ///
    /// `memory` lies in the process that made `userfault` and opened `pagemap` as its `/proc/self/pagemap`; `mode`
    /// must match the features of `userfault`.
    ///
    /// # Errors
    ///
    /// [`TrackError::Gone`] if the memory is not mapped there or the process has ended, and what the kernel refused.
    pub fn new(
        memory: Arc<VmmMapping>,
        userfault: Arc<Userfault>,
        pagemap: File,
        mode: WriteProtection,
    ) -> Result<Self, TrackError> {
        let holes = HoleWatch::new(memory.ram());
        let pages = memory.ram().pages();
        for (addresses, _) in memory.pieces(0..pages) {
            userfault.register(addresses, Faults::WriteProtect).map_err(TrackError::kernel(
                "register the VMM's memory for write protection (UFFDIO_REGISTER)",
            ))?;
        }
        let tracker = Self {
            memory,
            mode,
            pagemap: PagemapScan::new(pagemap),
            holes,
            userfault: Some(userfault),
            reported: PageSet::new(pages),
            zero: PageSet::new(pages),
        };
        tracker.check_mapped()?;
        Ok(tracker)
    }

    /// Returns the tracker without its watch for holes, for a VMM that takes no memory from its guest while the
    /// guest runs (as a balloon does).
    pub fn without_hole_watch(mut self) -> Self {
        self.holes = HoleWatch::Disabled;
        self
    }

    /// Write-protects those of `pages` that hold data, and returns them: they are to be copied. Data that appears
    /// from now on, and pages that were write-protected or reported before, are left to
    /// [`harvest`](Self::harvest).
    ///
    /// # Errors
    ///
    /// [`TrackError::Range`] for pages that the guest does not have, [`TrackError::Gone`] if the process has ended, and
    /// what the kernel refused.
    pub fn write_protect(&mut self, pages: Range<u64>) -> Result<Vec<Range<u64>>, TrackError> {
        let limit = self.memory.ram().pages();
        if pages.start > pages.end || pages.end > limit {
            return Err(TrackError::Range { pages, limit });
        }
        let mut protected = Vec::new();
        for extent in self.data(pages)? {
            for (reported, part) in split(&self.reported, self.memory.whole(extent)) {
                if !reported {
                    self.protect(&part)?;
                    self.reported.insert_range(part.clone());
                    protected.push(part);
                }
            }
        }
        Ok(protected)
    }

    /// Write-protects all of the guest's memory that holds data. Nothing needs to be copied for that, as long as
    /// another tracker reports what is written up to the end of this call.
    ///
    /// It is faster than [`write_protect`](Self::write_protect), as it does not spare holes in page tables that
    /// are there anyway.
    ///
    /// # Errors
    ///
    /// [`TrackError::Gone`] if the process has ended, and what the kernel refused.
    pub fn write_protect_all(&mut self) -> Result<(), TrackError> {
        let memory = self.memory.clone();
        for region in memory.regions() {
            let mut rest = region.pages();
            let mut run = rest.start..rest.start;
            while let Some(data) = self.first_data(&rest)? {
                let table = region.table_of(data);
                if table.start > run.end {
                    self.protect_and_note(std::mem::replace(&mut run, table.clone()))?;
                }
                run.end = table.end;
                rest.start = table.end;
            }
            self.protect_and_note(run)?;
        }
        Ok(())
    }

    /// Adds the pages that were written since they were write-protected, appeared, or were last harvested to
    /// `into`; also the pages that were emptied meanwhile.
    ///
    /// Each page is protected again before it appears in `into`, so that no write after that is missed.
    ///
    /// # Errors
    ///
    /// [`TrackError::Gone`] if the process has ended, and what the kernel refused. After any error pages may have been
    /// protected and not reported: stop the tracker, and count every page as written.
    pub fn harvest<S>(&mut self, into: &PageSet<S>) -> Result<Harvest, TrackError>
    where
        S: Deref<Target = [AtomicU64]>,
    {
        // The watch is asked first: a hole that this harvest does not see is noticed by the next one.
        let may_have_holes = self.holes.may_have_changed();
        if self.userfault.is_none() {
            return Err(TrackError::NotStarted);
        }
        self.memory.ram().forget_data_extents();
        let mut found = Harvest::default();
        for region in self.memory.regions() {
            found = Pass::new(self, region, into, found).run(may_have_holes)?;
        }
        self.check_mapped()?;
        Ok(found)
    }

    /// Ends tracking: the VMM writes at full speed again. The call does nothing if tracking has ended.
    pub fn stop(&mut self) {
        // To close it may wait for the kernel: here, and not where the last of this is dropped.
        self.holes = HoleWatch::Disabled;
        if let Some(userfault) = self.userfault.take() {
            for (addresses, _) in self.memory.pieces(0..self.memory.ram().pages()) {
                // Closing the last descriptor does the same; this is for copies in other processes.
                let _ = userfault.unregister(addresses);
            }
        }
    }

    /// Write-protects `pages`, whatever they hold.
    fn protect(&self, pages: &Range<u64>) -> Result<(), TrackError> {
        let userfault = self.userfault.as_ref().ok_or(TrackError::NotStarted)?;
        for (addresses, _) in self.memory.pieces(pages.clone()) {
            let mut from = addresses.start;
            while from < addresses.end {
                let end = addresses.end.min(from + PIECE_PAGES * PAGE_SIZE);
                userfault.write_protect(from..end, true).map_err(|error| match is_gone(&error) {
                    true => TrackError::Gone,
                    false => {
                        TrackError::kernel("write-protect the VMM's memory (UFFDIO_WRITEPROTECT)")(error)
                    }
                })?;
                from = end;
            }
        }
        Ok(())
    }

    /// Write-protects `pages`, and counts them as reported.
    fn protect_and_note(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        self.protect(&pages)?;
        self.reported.insert_range(pages);
        Ok(())
    }

    /// Returns the first of `pages`, which lie in one region, that holds data.
    fn first_data(&self, pages: &Range<u64>) -> Result<Option<u64>, TrackError> {
        let first = self.memory.ram().first_data(pages);
        first.map_err(TrackError::kernel(SEEKING))
    }

    /// Returns the runs of `pages` that hold data.
    fn data(&self, pages: Range<u64>) -> Result<Vec<Range<u64>>, TrackError> {
        let extents = self.memory.ram().data_extents(pages);
        extents.map_err(TrackError::kernel(SEEKING))
    }

    /// Checks that the memory is still mapped. A scan returns nothing for what is not mapped, so that for a
    /// process that has ended it would find that nothing was written.
    fn check_mapped(&self) -> Result<(), TrackError> {
        for region in self.memory.regions() {
            let pages = region.pages();
            for page in [pages.start, pages.end - 1] {
                let mut mapped = false;
                self.pagemap.scan(region.addresses(&(page..page + 1)), self.mode.all_pages(), |_| {
                    mapped = true;
                    Ok(())
                })?;
                if !mapped {
                    return Err(TrackError::Gone);
                }
            }
        }
        Ok(())
    }
}

impl Drop for ExternalTracker {
    fn drop(&mut self) {
        self.stop();
    }
}

impl WriteProtection {
    /// Returns the query that finds all pages that can be protected.
    fn all_pages(self) -> Query {
        match self {
            Self::Async => Query::ALL,
            Self::Sync => Query::ALL_MAPPED,
        }
    }
}

/// Returns the parts of `pages` in order, and whether each is in `set`.
fn split(set: &PageSet, pages: Range<u64>) -> impl Iterator<Item = (bool, Range<u64>)> + '_ {
    let mut from = pages.start;
    std::iter::from_fn(move || {
        if from >= pages.end {
            return None;
        }
        let run = set.next_run(from, pages.end - from).unwrap_or(pages.end..pages.end);
        let within = run.start == from;
        let part = from..if within { run.end } else { run.start.min(pages.end) };
        from = part.end;
        Some((within, part))
    })
}
