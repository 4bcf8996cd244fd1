//! What becomes of missing pages: from missing over being placed to there.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memlane_protocol::PageSet;

/// The pages that are missing, each in one of these states:
///
/// - *missing*: whoever touches it waits, and it is asked for;
/// - *being placed*: one thread alone is at it, and whoever waits is let go when it has done so;
/// - neither: it was placed, or it is a hole, and whoever touches it finds zeros.
///
/// A page is claimed, and so is not missing any more, before it is placed. So each page is placed at most
/// once, however often it comes and by however many lanes; and one that is there though it is missing was
/// brought into being by somebody else.
///
/// States change under the lock. What takes long is done without it.
pub struct Pages {
    missing: PageSet,
    placing: PageSet,
    /// Pages that an access waits for.
    wanted: PageSet,
    /// Since when, in own pages of the region. Its lock is that of all states.
    waiting: Mutex<HashMap<u64, Instant>>,
}

/// What is to be done about an access that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The page is not missing: it is a hole, or was placed while the access was told of.
    There,
    /// It is to be asked for.
    Ask,
    /// It is being placed, and that lets whoever waits go.
    Coming,
    /// It was heard of before.
    Known,
}

impl Pages {
    /// Of a guest of so many pages, of which none is missing.
    pub fn new(pages: u64) -> Self {
        let set = || PageSet::new(pages);
        Self { missing: set(), placing: set(), wanted: set(), waiting: Mutex::default() }
    }

    /// These are missing.
    pub fn add(&self, pages: Range<u64>) {
        let _states = self.lock();
        self.missing.insert_range(pages);
    }

    /// The pages that are missing and that nobody is placing. They become fewer while one looks.
    pub fn missing(&self) -> &PageSet {
        &self.missing
    }

    /// Whether nobody has begun to place this page, which is missing. Exact, unlike a look at the set.
    pub fn is_missing(&self, page: u64) -> bool {
        let _states = self.lock();
        self.missing.contains(page)
    }

    /// All that has not been placed: what is being placed may yet fail, and be missing again.
    pub fn unplaced(&self) -> PageSet {
        let _states = self.lock();
        let all = PageSet::new(self.missing.pages());
        self.missing.runs().chain(self.placing.runs()).for_each(|run| {
            all.insert_range(run);
        });
        all
    }

    /// Takes the first run of missing pages within `pages` for the caller to place.
    pub fn claim(&self, pages: Range<u64>) -> Option<Range<u64>> {
        let _states = self.lock();
        let run = self.missing.next_run_within(pages)?;
        self.placing.insert_range(run.clone());
        self.missing.remove_range(run.clone());
        Some(run)
    }

    /// Pages that were [claimed](Self::claim) are in place. Returns how long accesses waited for them.
    pub fn placed(&self, pages: Range<u64>) -> Vec<Duration> {
        let mut waiting = self.lock();
        self.placing.remove_range(pages.clone());
        self.answer(&mut waiting, &pages)
    }

    /// Pages that were [claimed](Self::claim) could not be placed, and are missing again. Nothing is known of
    /// accesses to them any more: let go of by the caller, these are told of anew.
    pub fn give_back(&self, pages: Range<u64>) {
        let mut waiting = self.lock();
        self.missing.insert_range(pages.clone());
        self.placing.remove_range(pages.clone());
        self.answer(&mut waiting, &pages);
    }

    /// These pages are holes. Returns how many of them were missing and stay holes from now on, and takes those
    /// that an access waits for, for the caller to place.
    pub fn leave(&self, pages: Range<u64>) -> (u64, Vec<Range<u64>>) {
        let _states = self.lock();
        let (mut left, mut waited_for) = (0, Vec::new());
        let mut rest = pages;
        while let Some(run) = self.missing.next_run_within(rest.clone()) {
            rest.start = run.end;
            let mut wanted = run.clone();
            while let Some(waited) = self.wanted.next_run_within(wanted.clone()) {
                wanted.start = waited.end;
                self.placing.insert_range(waited.clone());
                self.missing.remove_range(waited.clone());
                waited_for.push(waited);
            }
            left += self.missing.remove_range(run);
        }
        (left, waited_for)
    }

    /// An access to these pages, one of the region's own, waits.
    pub fn access(&self, unit: &Range<u64>) -> Access {
        let mut waiting = self.lock();
        let missing = self.missing.contains(unit.start);
        if !missing && !self.placing.contains(unit.start) {
            return Access::There;
        }
        if self.wanted.insert_range(unit.clone()) == 0 {
            return Access::Known;
        }
        waiting.insert(unit.start, Instant::now());
        if missing { Access::Ask } else { Access::Coming }
    }

    /// Pages that are waited for, each once.
    pub fn wanted(&self) -> Vec<u64> {
        self.lock().keys().copied().collect()
    }

    /// Nobody waits for these pages any more; returns how long that was.
    fn answer(&self, waiting: &mut HashMap<u64, Instant>, pages: &Range<u64>) -> Vec<Duration> {
        if self.wanted.next_run_within(pages.clone()).is_none() {
            return Vec::new();
        }
        self.wanted.remove_range(pages.clone());
        waiting.extract_if(|page, _| pages.contains(page)).map(|(_, since)| since.elapsed()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Instant>> {
        // All of it is whole whenever somebody may panic.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
