//! One harvest of one region.
//!
//! # What is told by what
//!
//! For each page there is its entry in the page table ([`State`]), what the file says (data or
//! hole), and what was reported before: nothing, something, or that it is `blank`, zeros or a hole.
//!
//! - *Written*: reported.
//! - *Unknown*, data: the entry was dropped with what it knew, or the page came into being
//!   elsewhere. Reported.
//! - *Unknown*, hole: was taken from the file. Reported if ever reported before; the destination
//!   never heard of the others.
//! - *Vacant* or *clean*, and not blank: as it was, unless somebody has punched a hole: the kernel
//!   keeps the protection, even if the page is then read and so is there again, as zeros. So after
//!   a punch all these pages are looked at, and the holes and zeros reported.
//! - *Vacant* or *clean*, and blank: was not written since, so that it is blank still.
//!
//! Each page is protected before the file or the page is looked at, and that before it is reported:
//! whatever happens later lifts the protection, or is another punch.

use std::ops::{Deref, Range};
use std::sync::atomic::AtomicU64;

use memlane_protocol::{PAGE_SIZE, PageSet};

use super::{ForeignTracker, Harvest, Writes, split};
use crate::dirty::TrackError;
use crate::dirty::scan::{Found, Pieces, Query, State};
use crate::foreign_ram::Place;
use crate::ram::{GuestRam, is_zero};

/// One harvest's way through one region.
pub(super) struct Pass<'a, S> {
    tracker: &'a ForeignTracker,
    place: &'a Place,
    into: &'a PageSet<S>,
    found: Harvest,
    pieces: Pieces,
    /// Pages of the piece that is being put together, as they were seen.
    seen: Vec<Range<u64>>,
}

impl<'a, S: Deref<Target = [AtomicU64]>> Pass<'a, S> {
    /// Adds what it finds to `into` and `found`.
    pub fn new(tracker: &'a ForeignTracker, place: &'a Place, into: &'a PageSet<S>, found: Harvest) -> Self {
        Self { tracker, place, into, found, pieces: Pieces::default(), seen: Vec::new() }
    }

    /// Goes through the region; `punched` if holes may have been made in the file.
    pub fn run(mut self, punched: bool) -> Result<Harvest, TrackError> {
        let addresses = self.place.addresses(&self.place.all());
        let tracker = self.tracker;
        let query = if punched { tracker.writes.all_pages() } else { Query::NOT_CLEAN };
        tracker.pagemap.scan(addresses, query, |Found { addresses, state }| {
            let pages = self.place.pages_at(&addresses);
            match state {
                State::Written if tracker.writes == Writes::Wait => self.take_exactly(pages),
                State::Written => {
                    if let Some(piece) = self.pieces.add(addresses) {
                        self.take(piece)?;
                    }
                    self.seen.push(pages);
                    Ok(())
                }
                State::Unknown => self.take_unknown(pages),
                State::Vacant if punched => self.take_punched(pages),
                State::Clean if punched => self.take_zeroed(pages),
                State::Vacant | State::Clean => Ok(()),
            }
        })?;
        if let Some(last) = self.pieces.end() {
            self.take(last)?;
        }
        Ok(self.found)
    }

    /// Protects what is written in `piece`, and reports it.
    fn take(&mut self, piece: Range<u64>) -> Result<(), TrackError> {
        let mut unknown = Vec::new();
        let tracker = self.tracker;
        tracker.pagemap.protect(piece, Query::WRITTEN_WITH_STATE, |found| {
            let pages = self.place.pages_at(&found.addresses);
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

    /// Protects `pages`, which were seen written, and reports them. Where the kernel cannot do so
    /// for what it finds written in the same step, no other page may be protected with them: one that
    /// was written since it was looked at would be lost.
    fn take_exactly(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        self.tracker.protect(&pages)?;
        self.report(pages);
        Ok(())
    }

    /// Pages of which the page table knows nothing.
    fn take_unknown(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        let tracker = self.tracker;
        for (told, part) in split(&tracker.told, pages) {
            if told {
                tracker.protect(&part)?;
            }
            let mut hole_from = part.start;
            for extent in tracker.data(part.clone())? {
                if told {
                    self.report_hole(hole_from..extent.start);
                } else {
                    tracker.protect(&extent)?;
                }
                hole_from = extent.end;
                self.report(extent);
            }
            if told {
                self.report_hole(hole_from..part.end);
            }
        }
        Ok(())
    }

    /// Reports those of the protected `pages` that are holes now, or zero.
    fn take_punched(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        for part in self.doubtful(pages) {
            let mut hole_from = part.start;
            for extent in self.tracker.data(part.clone())? {
                self.report_hole(hole_from..extent.start);
                hole_from = extent.end;
                self.take_zeroed(extent)?;
            }
            self.report_hole(hole_from..part.end);
        }
        Ok(())
    }

    /// Reports those of the protected `pages`, which hold memory, that are zero now.
    fn take_zeroed(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        let ram = self.tracker.memory.ram();
        let unit = self.place.unit();
        for part in self.doubtful(pages) {
            if unit > 1 {
                // One that was taken away comes back here or, if the pool of huge pages is used up,
                // is an error: to read it would then be a signal.
                ram.prepare(part.clone()).map_err(TrackError::kernel(
                    "taking a huge page to see whether the guest's was taken away (is the pool used up?)",
                ))?;
            }
            for first in part.step_by(unit as usize) {
                let pages = first..first + unit;
                if all_zero(ram, pages.clone()) {
                    self.tracker.blank.insert_range(pages.clone());
                    self.found.new += self.into.insert_range(pages);
                }
            }
        }
        ram.intact().map_err(TrackError::kernel("looking for zeros in the guest's memory"))
    }

    /// What of the protected `pages` was reported, and not as blank.
    fn doubtful(&self, pages: Range<u64>) -> Vec<Range<u64>> {
        let told = split(&self.tracker.told, pages).filter(|(told, _)| *told);
        told.flat_map(|(_, part)| split(&self.tracker.blank, part))
            .filter(|(blank, _)| !blank)
            .map(|(_, part)| part)
            .collect()
    }

    fn report(&mut self, pages: Range<u64>) {
        self.tracker.told.insert_range(pages.clone());
        self.tracker.blank.remove_range(pages.clone());
        self.found.new += self.into.insert_range(pages);
    }

    fn report_hole(&mut self, pages: Range<u64>) {
        if !pages.is_empty() {
            self.tracker.blank.insert_range(pages.clone());
            self.found.new += self.into.insert_range(pages);
            self.found.holes = true;
        }
    }
}

fn all_zero(ram: &GuestRam, pages: Range<u64>) -> bool {
    ram.slices(pages).all(|slice| {
        (0..slice.len).step_by(PAGE_SIZE as usize).all(|offset| {
            // SAFETY: inside the slice, which is mapped as long as `ram` lives.
            unsafe { is_zero(slice.ptr.add(offset)) }
        })
    })
}
