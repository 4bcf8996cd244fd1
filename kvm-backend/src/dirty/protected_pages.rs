//! [`ProtectedPages`]: the set of pages that a tracker has write-protected.

use std::collections::BTreeMap;
use std::ops::{Deref, Range};
use std::sync::atomic::AtomicU64;

use memlane_protocol::PageSet;

use super::TrackError;

const WORD: u64 = 64;

/// The set of pages that have been write-protected so far. Protecting a page twice would forget a write to it, and
/// a page that was never protected must not be reported: this set keeps a tracker from both.
///
/// The set is kept as runs, since it grows by long runs that touch: all memory of a guest is one, however large.
#[derive(Debug)]
pub(super) struct ProtectedPages {
    /// The end of each run by its beginning. No two runs touch.
    runs: BTreeMap<u64, u64>,
    pages: u64,
    count: u64,
}

impl ProtectedPages {
    /// Returns the empty set of a guest of `pages` pages.
    pub(super) fn new(pages: u64) -> Self {
        Self { runs: BTreeMap::new(), pages, count: 0 }
    }

    /// Returns how many pages are in the set.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Removes all pages.
    pub(super) fn clear(&mut self) {
        self.runs.clear();
        self.count = 0;
    }

    /// Returns the runs of `pages` that are not in the set.
    ///
    /// # Errors
    ///
    /// [`TrackError::Range`] for pages that the guest does not have.
    pub(super) fn missing(&self, pages: Range<u64>) -> Result<Vec<Range<u64>>, TrackError> {
        if pages.start > pages.end || pages.end > self.pages {
            return Err(TrackError::Range { pages, limit: self.pages });
        }
        let mut missing = Vec::new();
        let mut from = pages.start;
        for run in self.runs(pages.clone()) {
            if from < run.start {
                missing.push(from..run.start);
            }
            from = run.end;
        }
        if from < pages.end {
            missing.push(from..pages.end);
        }
        Ok(missing)
    }

    /// Adds pages; pages beyond the guest's last one are ignored.
    pub(super) fn add(&mut self, pages: Range<u64>) {
        let (mut start, mut end) = (pages.start, pages.end.min(self.pages));
        if start >= end {
            return;
        }
        // Runs that overlap or touch, from the last on, become one with it.
        while let Some((&first, &last)) = self.runs.range(..=end).next_back().filter(|run| *run.1 >= start) {
            self.runs.remove(&first);
            self.count -= last - first;
            (start, end) = (start.min(first), end.max(last));
        }
        self.runs.insert(start, end);
        self.count += end - start;
    }

    /// Returns the 64 pages from `page` on as bits, with bit 0 for `page`.
    pub(super) fn bits(&self, page: u64) -> u64 {
        let runs = self.runs(page..page.saturating_add(WORD));
        runs.map(|run| ones(run.end - run.start) << (run.start - page)).fold(0, |all, bits| all | bits)
    }

    /// Returns the runs of the set within `pages`, in order.
    pub(super) fn runs(&self, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let before = self.runs.range(..pages.start).next_back().map(|(_, end)| pages.start..*end);
        let later = self.runs.range(pages.start..pages.end.max(pages.start));
        let runs = before.into_iter().chain(later.map(|(start, end)| *start..*end));
        runs.map(move |run| run.start..run.end.min(pages.end)).filter(|run| !run.is_empty())
    }

    /// Moves the pages of `from` that are in this set to `into`, and drops the others. Returns how many were new in
    /// `into`.
    pub(super) fn drain<V, W>(&self, from: &PageSet<V>, into: &PageSet<W>) -> u64
    where
        V: Deref<Target = [AtomicU64]>,
        W: Deref<Target = [AtomicU64]>,
    {
        if self.count == self.pages {
            return from.drain_into(0..self.pages, into);
        }
        let (mut new, mut next) = (0, 0);
        while let Some(run) = from.next_run(next, u64::MAX) {
            next = run.end;
            from.remove_range(run.clone());
            for protected in self.runs(run) {
                new += into.insert_range(protected);
            }
        }
        new
    }
}

fn ones(count: u64) -> u64 {
    if count >= WORD { u64::MAX } else { (1 << count) - 1 }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(
            pages in 1u64..300,
            adds in prop::collection::vec((0u64..320, 0u64..100), 0..12),
            asked in (0u64..300, 0u64..300),
            written in prop::collection::vec(0u64..300, 0..80),
        ) {
            let mut protected = ProtectedPages::new(pages);
            let mut model = BTreeSet::new();
            for (first, len) in adds {
                protected.add(first..first + len);
                model.extend((first..first + len).filter(|page| *page < pages));
            }
            prop_assert_eq!(protected.count(), model.len() as u64);
            let all: BTreeSet<u64> = protected.runs(0..u64::MAX).flatten().collect();
            prop_assert_eq!(&all, &model);
            for page in 0..pages + 70 {
                let bits = (0..64).filter(|bit| model.contains(&(page + bit))).fold(0, |bits, bit| bits | 1 << bit);
                prop_assert_eq!(protected.bits(page), bits);
            }
            let asked = asked.0..asked.1;
            match protected.missing(asked.clone()) {
                Ok(missing) => {
                    let missing: Vec<u64> = missing.into_iter().flatten().collect();
                    let expected: Vec<u64> = asked.filter(|page| !model.contains(page)).collect();
                    prop_assert_eq!(missing, expected);
                }
                Err(_) => prop_assert!(asked.start > asked.end || asked.end > pages),
            }
            let (from, into) = (PageSet::new(pages), PageSet::new(pages));
            for page in &written {
                from.insert(*page);
            }
            let new = protected.drain(&from, &into);
            let drained: BTreeSet<u64> = into.runs().flatten().collect();
            let expected: BTreeSet<u64> = written.into_iter().filter(|page| model.contains(page)).collect();
            prop_assert_eq!(new, expected.len() as u64);
            prop_assert_eq!(drained, expected);
            prop_assert!(from.is_empty());
        }
    }
}
