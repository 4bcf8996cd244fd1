//! [`Pass`]: one harvest of one region of a VMM's memory.
//!
//! # Which pages are reported
//!
//! Three things are known about each page: its entry in the page table ([`State`]), whether the file holds data or
//! a hole there, and what was reported about it before: nothing, data, or that it is zero (zeros or a hole).
//!
//! - *Written*: the page is reported.
//! - *Unknown*, data: the entry was dropped with what it knew, or the page appeared through another mapping. The
//!   page is reported.
//! - *Unknown*, hole: the page was taken from the file. It is reported if it was ever reported before; the
//!   destination knows nothing of other holes.
//! - *Vacant* or *clean*, and not reported as zero: the page is as it was, unless a hole was punched there: the
//!   kernel keeps the protection, even if the page is then read and so is present again, as zeros. So after a hole
//!   was punched anywhere, all these pages are looked at, and holes and zeros are reported.
//! - *Vacant* or *clean*, and reported as zero: the page was not written since, so that it still is zero.
//!
//! Each page is protected before the file or the page is looked at, and looked at before it is reported: whatever
//! happens later lifts the protection, or is another hole.

use std::ops::{Deref, Range};
use std::sync::atomic::AtomicU64;

use memlane_protocol::{PAGE_SIZE, PageSet};

use super::{ExternalTracker, Harvest, WriteProtection, split};
use crate::dirty::TrackError;
use crate::dirty::scan::{Found, Pieces, Query, State};
use crate::ram::{GuestRam, is_zero};
use crate::vmm_mapping::RegionMapping;

/// One harvest's pass through one region.
pub(super) struct Pass<'a, S> {
    tracker: &'a ExternalTracker,
    region: &'a RegionMapping,
    into: &'a PageSet<S>,
    found: Harvest,
    pieces: Pieces,
    /// The written pages of the piece that is being put together.
    seen: Vec<Range<u64>>,
}

impl<'a, S: Deref<Target = [AtomicU64]>> Pass<'a, S> {
    /// Returns a pass through `region` that adds what it finds to `into` and `found`.
    pub(super) fn new(
        tracker: &'a ExternalTracker,
        region: &'a RegionMapping,
        into: &'a PageSet<S>,
        found: Harvest,
    ) -> Self {
        Self { tracker, region, into, found, pieces: Pieces::default(), seen: Vec::new() }
    }

    /// Goes through the region. `may_have_holes` says that holes may have been punched into the file since the last
    /// harvest.
    pub(super) fn run(mut self, may_have_holes: bool) -> Result<Harvest, TrackError> {
        let addresses = self.region.addresses(&self.region.pages());
        let tracker = self.tracker;
        let query = if may_have_holes { tracker.mode.all_pages() } else { Query::NOT_CLEAN };
        tracker.pagemap.scan(addresses, query, |Found { addresses, state }| {
            let pages = self.region.pages_at(&addresses);
            match state {
                State::Written if tracker.mode == WriteProtection::Sync => self.take_exactly(pages),
                State::Written => {
                    if let Some(piece) = self.pieces.add(addresses) {
                        self.take(piece)?;
                    }
                    self.seen.push(pages);
                    Ok(())
                }
                State::Unknown => self.take_unknown(pages),
                State::Vacant if may_have_holes => self.take_holes(pages),
                State::Clean if may_have_holes => self.take_zeros(pages),
                State::Vacant | State::Clean => Ok(()),
            }
        })?;
        if let Some(last) = self.pieces.end() {
            self.take(last)?;
        }
        Ok(self.found)
    }

    /// Protects the pages of `piece` that were written, and reports them.
    fn take(&mut self, piece: Range<u64>) -> Result<(), TrackError> {
        let mut unknown = Vec::new();
        let tracker = self.tracker;
        tracker.pagemap.protect(piece, Query::WRITTEN_WITH_STATE, |found| {
            let pages = self.region.pages_at(&found.addresses);
            match found.state {
                State::Unknown => unknown.push(pages),
                _ => self.report(pages),
            }
        })?;
        // The entry of a page that was seen may have been dropped before it could be protected.
        for pages in std::mem::take(&mut self.seen) {
            self.report(pages);
        }
        unknown.into_iter().try_for_each(|pages| self.take_unknown(pages))
    }

    /// Protects exactly `pages`, which were found written, and reports them. Where the kernel cannot find written
    /// pages and protect them in one step, no other page may be protected with them: a write to it since the scan
    /// would be lost.
    fn take_exactly(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        self.tracker.protect(&pages)?;
        self.report(pages);
        Ok(())
    }

    /// Reports those of `pages`, about which the page table knows nothing, that hold data or were reported before.
    fn take_unknown(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        let tracker = self.tracker;
        for (reported, part) in split(&tracker.reported, pages) {
            if reported {
                tracker.protect(&part)?;
            }
            let mut hole_from = part.start;
            for extent in tracker.data(part.clone())? {
                if reported {
                    self.report_hole(hole_from..extent.start);
                } else {
                    tracker.protect(&extent)?;
                }
                hole_from = extent.end;
                self.report(extent);
            }
            if reported {
                self.report_hole(hole_from..part.end);
            }
        }
        Ok(())
    }

    /// Reports those of the protected `pages` that are holes or zero now.
    fn take_holes(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        for part in self.reported_as_data(pages) {
            let mut hole_from = part.start;
            for extent in self.tracker.data(part.clone())? {
                self.report_hole(hole_from..extent.start);
                hole_from = extent.end;
                self.take_zeros(extent)?;
            }
            self.report_hole(hole_from..part.end);
        }
        Ok(())
    }

    /// Reports those of the protected `pages`, which hold memory, that are zero now.
    fn take_zeros(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        let ram = self.tracker.memory.ram();
        let unit = self.region.unit();
        for part in self.reported_as_data(pages) {
            if unit > 1 {
                // A page that was taken away comes back here. If the pool of huge pages is used up, that is an
                // error here, and would be a signal when the page is read.
                ram.populate_write(part.clone()).map_err(TrackError::kernel(
                    "allocate a huge page to see whether the guest's was taken away (is the pool of huge pages used up?)",
                ))?;
            }
            for first in part.step_by(unit as usize) {
                let pages = first..first + unit;
                if all_zero(ram, pages.clone()) {
                    self.tracker.zero.insert_range(pages.clone());
                    self.found.new += self.into.insert_range(pages);
                }
            }
        }
        ram.intact().map_err(TrackError::kernel("look for zeros in the guest's memory"))
    }

    /// Returns those of the protected `pages` that were reported, and not as zero.
    fn reported_as_data(&self, pages: Range<u64>) -> Vec<Range<u64>> {
        let reported = split(&self.tracker.reported, pages).filter(|(reported, _)| *reported);
        reported
            .flat_map(|(_, part)| split(&self.tracker.zero, part))
            .filter(|(zero, _)| !zero)
            .map(|(_, part)| part)
            .collect()
    }

    /// Adds pages that may hold data.
    fn report(&mut self, pages: Range<u64>) {
        self.tracker.reported.insert_range(pages.clone());
        self.tracker.zero.remove_range(pages.clone());
        self.found.new += self.into.insert_range(pages);
    }

    /// Adds pages that are a hole.
    fn report_hole(&mut self, pages: Range<u64>) {
        if !pages.is_empty() {
            self.tracker.zero.insert_range(pages.clone());
            self.found.new += self.into.insert_range(pages);
            self.found.holes = true;
        }
    }
}

/// Returns whether all of `pages` are zero.
fn all_zero(ram: &GuestRam, pages: Range<u64>) -> bool {
    ram.slices(pages).all(|slice| {
        (0..slice.len).step_by(PAGE_SIZE as usize).all(|offset| {
            // SAFETY: inside the slice, which is mapped as long as `ram` lives.
            unsafe { is_zero(slice.ptr.add(offset)) }
        })
    })
}
