//! [`Armed`]: which pages a tracker reports on.

use std::ops::{Deref, Range};
use std::sync::atomic::AtomicU64;

use memlane_protocol::PageSet;

use super::TrackError;

const WORD: u64 = 64;

/// The pages armed so far. Arming a page twice would forget a write to it, and a page that was
/// never armed must not be reported: this set keeps a tracker from both.
#[derive(Debug)]
pub(super) struct Armed {
    words: Vec<u64>,
    pages: u64,
    count: u64,
}

impl Armed {
    /// None of `pages` pages.
    pub(super) fn new(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(WORD) as usize], pages, count: 0 }
    }

    /// How many pages are armed.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn clear(&mut self) {
        self.words.fill(0);
        self.count = 0;
    }

    /// The runs of `pages` that are not armed yet.
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

    /// Adds pages; those beyond the last are ignored.
    pub(super) fn add(&mut self, pages: Range<u64>) {
        let end = pages.end.min(self.pages);
        let mut page = pages.start;
        while page < end {
            let bits = (WORD - page % WORD).min(end - page);
            let mask = ones(bits) << (page % WORD);
            let word = &mut self.words[(page / WORD) as usize];
            self.count += u64::from((mask & !*word).count_ones());
            *word |= mask;
            page += bits;
        }
    }

    /// The 64 pages from `page` on, bit 0 first.
    pub(super) fn bits(&self, page: u64) -> u64 {
        let word = |at: u64| self.words.get(at as usize).copied().unwrap_or(0);
        let (at, shift) = (page / WORD, page % WORD);
        match shift {
            0 => word(at),
            _ => word(at) >> shift | word(at + 1) << (WORD - shift),
        }
    }

    /// The armed runs within `pages`, in order.
    pub(super) fn runs(&self, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let end = pages.end.min(self.pages);
        let mut from = pages.start;
        std::iter::from_fn(move || {
            let first = self.find(from, end, true)?;
            from = self.find(first, end, false).unwrap_or(end);
            Some(first..from)
        })
    }

    /// Moves the pages of `from` that are armed into `into` and drops the rest; returns how
    /// many were new there.
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
            for armed in self.runs(run) {
                new += into.insert_range(armed);
            }
        }
        new
    }

    /// The first page in `from..end` that is armed, or not armed.
    fn find(&self, mut from: u64, end: u64, armed: bool) -> Option<u64> {
        while from < end {
            let word = self.words[(from / WORD) as usize];
            let wanted = (if armed { word } else { !word }) >> (from % WORD);
            if wanted != 0 {
                return Some(from + u64::from(wanted.trailing_zeros())).filter(|page| *page < end);
            }
            from = (from / WORD + 1) * WORD;
        }
        None
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
            marks in prop::collection::vec(0u64..300, 0..80),
        ) {
            let mut armed = Armed::new(pages);
            let mut model = BTreeSet::new();
            for (first, len) in adds {
                armed.add(first..first + len);
                model.extend((first..first + len).filter(|page| *page < pages));
            }
            prop_assert_eq!(armed.count(), model.len() as u64);
            let all: BTreeSet<u64> = armed.runs(0..u64::MAX).flatten().collect();
            prop_assert_eq!(&all, &model);
            for page in 0..pages + 70 {
                let bits = (0..64).filter(|bit| model.contains(&(page + bit))).fold(0, |bits, bit| bits | 1 << bit);
                prop_assert_eq!(armed.bits(page), bits);
            }
            let asked = asked.0..asked.1;
            match armed.missing(asked.clone()) {
                Ok(missing) => {
                    let missing: Vec<u64> = missing.into_iter().flatten().collect();
                    let expected: Vec<u64> = asked.filter(|page| !model.contains(page)).collect();
                    prop_assert_eq!(missing, expected);
                }
                Err(_) => prop_assert!(asked.start > asked.end || asked.end > pages),
            }
            let (from, into) = (PageSet::new(pages), PageSet::new(pages));
            for mark in &marks {
                from.insert(*mark);
            }
            let new = armed.drain(&from, &into);
            let drained: BTreeSet<u64> = into.runs().flatten().collect();
            let expected: BTreeSet<u64> = marks.into_iter().filter(|page| model.contains(page)).collect();
            prop_assert_eq!(new, expected.len() as u64);
            prop_assert_eq!(drained, expected);
            prop_assert!(from.is_empty());
        }
    }
}
