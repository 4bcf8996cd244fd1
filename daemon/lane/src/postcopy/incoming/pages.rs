//! The states of missing pages: missing, being placed, and placed.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memlane_protocol::PageSet;

/// The pages of a guest. Each is in one of these states:
///
/// - *missing*: an access to the page waits, and the page is requested;
/// - *being placed*: one thread alone places the page, and wakes the accesses that wait for it;
/// - *present*: the page was placed, or it is a hole, and an access to it finds zeros.
///
/// A page is claimed, and so is not missing any more, before it is placed. So each page is placed at most once, no matter
/// how often and by how many lanes it comes. If a missing page turns out to be in memory already, another program has
/// written to it.
///
/// States change under the lock. System calls that take long are made without it.
pub(super) struct Pages {
    missing: PageSet,
    placing: PageSet,
    /// Accesses wait for these pages.
    awaited: PageSet,
    /// Accesses have waited since this time, by the first page of the region's own page. This lock protects all states.
    waiting: Mutex<HashMap<u64, Instant>>,
}

/// The action that an access needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// The page is not missing: it is a hole, or was placed before the access was read.
    Present,
    /// The page must be requested.
    Request,
    /// The page is being placed, which wakes the access.
    BeingPlaced,
    /// An earlier access waits for the same page.
    Known,
}

impl Pages {
    /// Makes the states of a guest with so many pages, of which none is missing.
    pub(super) fn new(pages: u64) -> Self {
        let set = || PageSet::new(pages);
        Self { missing: set(), placing: set(), awaited: set(), waiting: Mutex::default() }
    }

    /// Makes these pages missing.
    pub(super) fn add(&self, pages: Range<u64>) {
        let _states = self.lock();
        self.missing.insert_range(pages);
    }

    /// Returns the pages that are missing and not being placed. Other threads may remove pages meanwhile.
    pub(super) fn missing(&self) -> &PageSet {
        &self.missing
    }

    /// Returns whether this page is missing and no thread has begun to place it. Takes the lock, so the result is exact.
    pub(super) fn is_missing(&self, page: u64) -> bool {
        let _states = self.lock();
        self.missing.contains(page)
    }

    /// Returns all pages that are not placed yet, including those that are being placed: that may fail.
    pub(super) fn unplaced(&self) -> PageSet {
        let _states = self.lock();
        let all = PageSet::new(self.missing.pages());
        self.missing.runs().chain(self.placing.runs()).for_each(|run| {
            all.insert_range(run);
        });
        all
    }

    /// Claims the first run of missing pages within `pages`, which the caller then places.
    pub(super) fn claim(&self, pages: Range<u64>) -> Option<Range<u64>> {
        let _states = self.lock();
        let run = self.missing.next_run_within(pages)?;
        self.placing.insert_range(run.clone());
        self.missing.remove_range(run.clone());
        Some(run)
    }

    /// Notes that [claimed](Self::claim) pages are placed. Returns how long each access waited for them.
    pub(super) fn placed(&self, pages: Range<u64>) -> Vec<Duration> {
        let mut waiting = self.lock();
        self.placing.remove_range(pages.clone());
        self.answer(&mut waiting, &pages)
    }

    /// Makes [claimed](Self::claim) pages missing again that could not be placed. Accesses to them are forgotten: the
    /// caller wakes them, and the kernel then reports them again.
    pub(super) fn give_back(&self, pages: Range<u64>) {
        let mut waiting = self.lock();
        self.missing.insert_range(pages.clone());
        self.placing.remove_range(pages.clone());
        self.answer(&mut waiting, &pages);
    }

    /// Leaves pages as holes. Returns how many of them were missing and are holes from now on, and claims those that an
    /// access waits for, which the caller then places.
    pub(super) fn leave(&self, pages: Range<u64>) -> (u64, Vec<Range<u64>>) {
        let _states = self.lock();
        let (mut left, mut waited_for) = (0, Vec::new());
        let mut rest = pages;
        while let Some(run) = self.missing.next_run_within(rest.clone()) {
            rest.start = run.end;
            let mut awaited = run.clone();
            while let Some(waited) = self.awaited.next_run_within(awaited.clone()) {
                awaited.start = waited.end;
                self.placing.insert_range(waited.clone());
                self.missing.remove_range(waited.clone());
                waited_for.push(waited);
            }
            left += self.missing.remove_range(run);
        }
        (left, waited_for)
    }

    /// Notes that an access waits for `unit`, which is one page of the region's own size.
    pub(super) fn access(&self, unit: &Range<u64>) -> Access {
        let mut waiting = self.lock();
        let missing = self.missing.contains(unit.start);
        if !missing && !self.placing.contains(unit.start) {
            return Access::Present;
        }
        if self.awaited.insert_range(unit.clone()) == 0 {
            return Access::Known;
        }
        waiting.insert(unit.start, Instant::now());
        if missing { Access::Request } else { Access::BeingPlaced }
    }

    /// Returns the pages that accesses wait for, each once.
    pub(super) fn awaited(&self) -> Vec<u64> {
        self.lock().keys().copied().collect()
    }

    /// Forgets the accesses that wait for these pages. Returns how long each of them waited.
    fn answer(&self, waiting: &mut HashMap<u64, Instant>, pages: &Range<u64>) -> Vec<Duration> {
        if self.awaited.next_run_within(pages.clone()).is_none() {
            return Vec::new();
        }
        self.awaited.remove_range(pages.clone());
        waiting.extract_if(|page, _| pages.contains(page)).map(|(_, since)| since.elapsed()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Instant>> {
        // No code panics while the states are half changed.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
