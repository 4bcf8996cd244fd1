//! [`ForeignTracker`]: the page tables of another process, over userfaultfd write protection.
//!
//! The other process makes a userfaultfd, opens its own `/proc/self/pagemap`, and hands both over.
//! Only what its memory's files hold as data is ever protected: page tables of holes would cost
//! memory, and a page that comes into being later is found because it is not protected. So where
//! writes wait ([`Writes::Wait`]), the first write to a hole does not.

mod pass;

use std::fs::File;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use memlane_protocol::{PAGE_SIZE, PageSet};

use self::pass::Pass;
use super::TrackError;
use super::punches::Punches;
use super::scan::{PIECE_PAGES, PagemapScan, Query};
use crate::foreign_ram::ForeignRam;
use crate::userfault::{Faults, Userfault, is_gone};

/// Finds the pages that another process writes, without its help.
///
/// Dropping it lifts all protection, as the death of this process does.
pub struct ForeignTracker {
    memory: Arc<ForeignRam>,
    writes: Writes,
    pagemap: PagemapScan,
    punches: Punches,
    /// Open while tracking is on.
    userfault: Option<Arc<Userfault>>,
    /// Pages that were armed or reported: protected, unless written since.
    told: PageSet,
    /// Those of them that were zero or a hole when they were last reported.
    blank: PageSet,
}

/// What a harvest found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Harvest {
    /// Pages that were not in the set before.
    pub new: u64,
    /// Pages are among them that are holes in the guest's memory: reading them would take
    /// memory for them again.
    pub holes: bool,
}

/// What becomes of writes to protected pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// They lift the protection and go on. The userfaultfd has
    /// [`WRITE_PROTECT_ASYNC`](crate::userfault::WRITE_PROTECT_ASYNC).
    GoOn,
    /// They wait, and are told by [`Userfault::read`], until somebody lifts the protection of the page
    /// ([`Userfault::write_protect`]). The userfaultfd has
    /// [`WRITE_PROTECT`](crate::userfault::WRITE_PROTECT).
    Wait,
}

impl ForeignTracker {
    /// Begins to track. Nothing is armed yet.
    ///
    /// `memory` lies in the process that made `userfault` and opened `pagemap`. Fails if it is not mapped
    /// there, or the process has ended.
    pub fn new(
        memory: Arc<ForeignRam>,
        userfault: Arc<Userfault>,
        pagemap: File,
        writes: Writes,
    ) -> Result<Self, TrackError> {
        let punches = Punches::new(memory.ram());
        let pages = memory.ram().pages();
        for (addresses, _) in memory.pieces(0..pages) {
            userfault.register(addresses, Faults::WriteProtect).map_err(TrackError::kernel(
                "registering the VMM's memory for write protection (UFFDIO_REGISTER)",
            ))?;
        }
        let tracker = Self {
            memory,
            writes,
            pagemap: PagemapScan::new(pagemap),
            punches,
            userfault: Some(userfault),
            told: PageSet::new(pages),
            blank: PageSet::new(pages),
        };
        tracker.check_mapped()?;
        Ok(tracker)
    }

    /// For a VMM that takes no memory from its guest while it runs: nobody looks for that.
    pub fn without_punches(mut self) -> Self {
        self.punches = Punches::none();
        self
    }

    /// Protects what the guest's memory holds of `pages` as data, and returns that: it is to be
    /// copied. What comes into being from now on, or was armed or reported before, is left to
    /// [`harvest`](Self::harvest).
    pub fn arm(&mut self, pages: Range<u64>) -> Result<Vec<Range<u64>>, TrackError> {
        let limit = self.memory.ram().pages();
        if pages.start > pages.end || pages.end > limit {
            return Err(TrackError::Range { pages, limit });
        }
        let mut armed = Vec::new();
        for extent in self.data(pages)? {
            for (told, part) in split(&self.told, self.memory.whole(extent)) {
                if !told {
                    self.protect(&part)?;
                    self.told.insert_range(part.clone());
                    armed.push(part);
                }
            }
        }
        Ok(armed)
    }

    /// Protects everything that the guest's memory holds as data, of which nothing is to be copied for
    /// that: another tracker reports what is written up to then.
    ///
    /// Faster than [`arm`](Self::arm), as it does not go around holes in page tables that are there anyway.
    pub fn arm_all(&mut self) -> Result<(), TrackError> {
        let memory = self.memory.clone();
        for place in memory.places() {
            let mut rest = place.all();
            let mut run = rest.start..rest.start;
            while let Some(data) = self.first_data(&rest)? {
                let table = place.table_of(data);
                if table.start > run.end {
                    self.arm_whole(std::mem::replace(&mut run, table.clone()))?;
                }
                run.end = table.end;
                rest.start = table.end;
            }
            self.arm_whole(run)?;
        }
        Ok(())
    }

    /// Adds the pages written since they were armed, came into being, or were last harvested to
    /// `into`; also those that were emptied meanwhile.
    ///
    /// Each page is protected again before it appears in `into`, so that no write after that is
    /// missed. On an error pages may have been protected and not reported: stop, and count every
    /// page as written. [`TrackError::Gone`] says that the process has ended.
    pub fn harvest<S>(&mut self, into: &PageSet<S>) -> Result<Harvest, TrackError>
    where
        S: Deref<Target = [AtomicU64]>,
    {
        // Heard first and looked at then: a punch that is not seen now is heard of next time.
        let punched = self.punches.any();
        if self.userfault.is_none() {
            return Err(TrackError::NotStarted);
        }
        self.memory.ram().look_anew();
        let mut found = Harvest::default();
        for place in self.memory.places() {
            found = Pass::new(self, place, into, found).run(punched)?;
        }
        self.check_mapped()?;
        Ok(found)
    }

    /// Ends tracking: the VMM writes at full speed again. Does nothing if it has ended.
    pub fn stop(&mut self) {
        if let Some(userfault) = self.userfault.take() {
            for (addresses, _) in self.memory.pieces(0..self.memory.ram().pages()) {
                // Closing the last descriptor does the same: this is for copies that others have.
                let _ = userfault.unregister(addresses);
            }
        }
    }

    fn protect(&self, pages: &Range<u64>) -> Result<(), TrackError> {
        let userfault = self.userfault.as_ref().ok_or(TrackError::NotStarted)?;
        for (addresses, _) in self.memory.pieces(pages.clone()) {
            let mut from = addresses.start;
            while from < addresses.end {
                let end = addresses.end.min(from + PIECE_PAGES * PAGE_SIZE);
                userfault.write_protect(from..end, true).map_err(|error| match is_gone(&error) {
                    true => TrackError::Gone,
                    false => TrackError::kernel("protecting the VMM's memory (UFFDIO_WRITEPROTECT)")(error),
                })?;
                from = end;
            }
        }
        Ok(())
    }

    /// Protects `pages`, and counts them as reported.
    fn arm_whole(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        self.protect(&pages)?;
        self.told.insert_range(pages);
        Ok(())
    }

    fn first_data(&self, pages: &Range<u64>) -> Result<Option<u64>, TrackError> {
        let first = self.memory.ram().first_data(pages);
        first.map_err(TrackError::kernel("looking for data in the guest's memory"))
    }

    fn data(&self, pages: Range<u64>) -> Result<Vec<Range<u64>>, TrackError> {
        let extents = self.memory.ram().data_extents(pages);
        extents.map_err(TrackError::kernel("looking for data in the guest's memory"))
    }

    /// Whether the memory is still there to be scanned. A scan says nothing of what is not mapped:
    /// of a process that has ended it would report that nothing was written.
    fn check_mapped(&self) -> Result<(), TrackError> {
        for place in self.memory.places() {
            let pages = place.all();
            for page in [pages.start, pages.end - 1] {
                let mut mapped = false;
                self.pagemap.scan(place.addresses(&(page..page + 1)), self.writes.all_pages(), |_| {
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

impl Drop for ForeignTracker {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Writes {
    /// Finds all pages that can be protected.
    fn all_pages(self) -> Query {
        match self {
            Self::GoOn => Query::ALL,
            Self::Wait => Query::ALL_MAPPED,
        }
    }
}

/// The parts of `pages` in order, and whether each is in `set`.
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
