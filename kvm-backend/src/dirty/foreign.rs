//! [`ForeignTracker`]: the page tables of another process, over userfaultfd write protection.
//!
//! The other process makes a userfaultfd, opens its own `/proc/self/pagemap`, and hands both over.
//! Only what its memory's files hold as data is ever protected: page tables of holes would cost
//! memory, and a page that comes into being later is found because it is not protected.

mod pass;

use std::fs::File;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use memlane_protocol::{PAGE_SIZE, PageSet};
use rustix::io::Errno;

use self::pass::Pass;
use super::TrackError;
use super::punches::Punches;
use super::scan::{HUGE_PAGE, PIECE_PAGES, PagemapScan, Query};
use crate::ram::GuestRam;
use crate::userfault::{Faults, Userfault};

/// Finds the pages that another process writes, without its help.
///
/// Dropping it lifts all protection, as the death of this process does.
pub struct ForeignTracker {
    ram: Arc<GuestRam>,
    places: Vec<Place>,
    pagemap: PagemapScan,
    punches: Punches,
    /// Open while tracking is on.
    userfault: Option<Userfault>,
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

/// Where a region lies.
struct Place {
    pages: Range<u64>,
    /// Of its first byte in the other process.
    address: u64,
    huge: bool,
}

impl ForeignTracker {
    /// Begins to track. Nothing is armed yet.
    ///
    /// `addresses` are those of each region's first byte in the process that made `userfault` (with
    /// [`WRITE_PROTECT_ASYNC`](crate::userfault::WRITE_PROTECT_ASYNC)) and opened `pagemap`.
    /// Fails if there is no mapping of that length, or the process has ended.
    pub fn new(
        ram: Arc<GuestRam>,
        addresses: Vec<u64>,
        userfault: Userfault,
        pagemap: File,
    ) -> Result<Self, TrackError> {
        let punches = Punches::new(&ram);
        let pages = ram.pages();
        let places = places(&ram, &addresses)
            .ok_or_else(|| TrackError::kernel("finding the guest's memory in its VMM")(Errno::INVAL))?;
        for place in &places {
            userfault.register(place.addresses(&place.pages), Faults::WriteProtect).map_err(
                TrackError::kernel("registering the VMM's memory for write protection (UFFDIO_REGISTER)"),
            )?;
        }
        let tracker = Self {
            ram,
            places,
            pagemap: PagemapScan::new(pagemap),
            punches,
            userfault: Some(userfault),
            told: PageSet::new(pages),
            blank: PageSet::new(pages),
        };
        tracker.check_mapped()?;
        Ok(tracker)
    }

    /// Protects what the guest's memory holds of `pages` as data, and returns that: it is to be
    /// copied. What comes into being from now on, or was armed or reported before, is left to
    /// [`harvest`](Self::harvest).
    pub fn arm(&mut self, pages: Range<u64>) -> Result<Vec<Range<u64>>, TrackError> {
        let limit = self.ram.pages();
        if pages.start > pages.end || pages.end > limit {
            return Err(TrackError::Range { pages, limit });
        }
        let mut armed = Vec::new();
        for extent in self.data(pages)? {
            for (told, part) in split(&self.told, self.grow(extent)) {
                if !told {
                    self.protect(&part)?;
                    self.told.insert_range(part.clone());
                    armed.push(part);
                }
            }
        }
        Ok(armed)
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
        self.ram.look_anew();
        let mut found = Harvest::default();
        for place in &self.places {
            found = Pass::new(self, place, into, found).run(punched)?;
        }
        self.check_mapped()?;
        Ok(found)
    }

    /// Ends tracking: the VMM writes at full speed again. Does nothing if it has ended.
    pub fn stop(&mut self) {
        if let Some(userfault) = self.userfault.take() {
            for place in &self.places {
                // Closing the last descriptor does the same: this is for copies that the VMM kept.
                let _ = userfault.unregister(place.addresses(&place.pages));
            }
        }
    }

    /// Protects `pages`, which lie in one region.
    fn protect(&self, pages: &Range<u64>) -> Result<(), TrackError> {
        let userfault = self.userfault.as_ref().ok_or(TrackError::NotStarted)?;
        let mut rest = pages.clone();
        while let Some(index) = self.ram.region_of(rest.start).filter(|_| !rest.is_empty()) {
            let place = &self.places[index];
            let end = rest.end.min(place.pages.end).min(rest.start + PIECE_PAGES);
            userfault.write_protect(place.addresses(&(rest.start..end)), true).map_err(|error| {
                match Errno::from_io_error(&error) {
                    Some(Errno::SRCH | Errno::NOENT) => TrackError::Gone,
                    _ => TrackError::kernel("protecting the VMM's memory (UFFDIO_WRITEPROTECT)")(error),
                }
            })?;
            rest.start = end;
        }
        Ok(())
    }

    fn data(&self, pages: Range<u64>) -> Result<Vec<Range<u64>>, TrackError> {
        self.ram.data_extents(pages).map_err(TrackError::kernel("looking for data in the guest's memory"))
    }

    /// `extent`, grown to whole pages of the regions that it begins and ends in.
    fn grow(&self, extent: Range<u64>) -> Range<u64> {
        let place = |page| self.ram.region_of(page).map(|index| &self.places[index]);
        let start = place(extent.start)
            .map_or(extent.start, |place| extent.start - (extent.start - place.pages.start) % place.unit());
        let end = place(extent.end - 1).map_or(extent.end, |place| {
            place.pages.start + (extent.end - place.pages.start).next_multiple_of(place.unit())
        });
        start..end
    }

    /// Whether the memory is still there to be scanned. A scan says nothing of what is not mapped:
    /// of a process that has ended it would report that nothing was written.
    fn check_mapped(&self) -> Result<(), TrackError> {
        for place in &self.places {
            let (first, last) = (place.pages.start, place.pages.end - 1);
            for page in [first, last] {
                let mut mapped = false;
                self.pagemap.scan(place.addresses(&(page..page + 1)), Query::ALL, |_| {
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

impl Place {
    /// 4 KiB pages in a page of the region's own size.
    fn unit(&self) -> u64 {
        if self.huge { HUGE_PAGE / PAGE_SIZE } else { 1 }
    }

    /// Addresses of `pages` of this region in the other process.
    fn addresses(&self, pages: &Range<u64>) -> Range<u64> {
        let address = |page: u64| self.address + (page - self.pages.start) * PAGE_SIZE;
        address(pages.start)..address(pages.end)
    }

    /// The pages at `addresses` there, as far as they belong to this region.
    fn pages(&self, addresses: &Range<u64>) -> Range<u64> {
        let page = |address: u64| {
            let page = self.pages.start + address.saturating_sub(self.address) / PAGE_SIZE;
            page.min(self.pages.end)
        };
        page(addresses.start)..page(addresses.end)
    }
}

/// Where each region lies, if it can lie there.
fn places(ram: &GuestRam, addresses: &[u64]) -> Option<Vec<Place>> {
    if addresses.len() != ram.regions().len() {
        return None;
    }
    let regions = ram.pieces(0..ram.pages()).zip(ram.regions()).zip(addresses);
    regions
        .map(|(((_, pages), region), &address)| {
            address.checked_add(region.bytes)?;
            let fits = address.is_multiple_of(region.page_bytes.into());
            fits.then_some(Place { pages, address, huge: u64::from(region.page_bytes) != PAGE_SIZE })
        })
        .collect()
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
