//! Runs of pages in a set, and claims on them.

use std::ops::{Deref, Range};
use std::sync::atomic::AtomicU64;

use super::PageSet;
use super::bits::{WORD, below, first_ones, low_ones};

impl<W: Deref<Target = [AtomicU64]>> PageSet<W> {
    /// Returns the first run of pages at or after `from`, of at most `most` pages.
    pub fn next_run(&self, from: u64, most: u64) -> Option<Range<u64>> {
        self.run_within(from..self.pages, most)
    }

    /// Returns the first run within `range`, or the part of it that lies there. What lies beyond is not looked at.
    pub fn next_run_within(&self, range: Range<u64>) -> Option<Range<u64>> {
        let range = range.start..range.end.min(self.pages);
        self.run_within(range.clone(), range.end.saturating_sub(range.start)).filter(|run| !run.is_empty())
    }

    fn run_within(&self, Range { start: from, end: beyond }: Range<u64>, most: u64) -> Option<Range<u64>> {
        let marked = self.marked_words(from..beyond);
        let (word, bits) =
            marked.map(|word| (word, self.load(word) & !below(from, word))).find(|(_, bits)| *bits != 0)?;
        let start = bits.trailing_zeros();
        let first = word * WORD + u64::from(start);
        let limit = first.saturating_add(most.max(1)).min(beyond);
        // Of this word, what was seen at the first look: its bits may have been taken since.
        let mut end = first + u64::from((bits >> start).trailing_ones());
        while end.is_multiple_of(WORD) && end < limit {
            let ones = u64::from(self.load(end / WORD).trailing_ones());
            end += ones;
            if ones == 0 {
                break;
            }
        }
        (first < limit).then(|| first..end.min(limit))
    }

    /// Returns the runs of the set in order, each as long as it can be.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(from, u64::MAX)?;
            from = run.end;
            Some(run)
        })
    }

    /// Moves a run of at most `most` pages at or after `from` from this set to `in_flight`, and returns it. Pages that are
    /// in flight already are passed over.
    ///
    /// Any number of threads may claim at once: a page is given to one of them, and to none while it is in flight. The
    /// in-flight bit is set first and acts as the page's lock.
    pub fn claim<V: Deref<Target = [AtomicU64]>>(
        &self,
        in_flight: &PageSet<V>,
        from: u64,
        most: u64,
    ) -> Option<Range<u64>> {
        for word in self.marked_words(from..self.pages) {
            loop {
                let free = self.load(word) & !in_flight.load(word) & !below(from, word);
                let Some(wanted) = first_ones(free, most) else { break };
                let won = self.lock_and_take(in_flight, word, wanted);
                if won == 0 {
                    continue; // another claimant was quicker; look again
                }
                let Some(first_run) = first_ones(won, most) else { continue };
                self.give_back(in_flight, word, won & !first_run);
                let first = word * WORD + u64::from(first_run.trailing_zeros());
                let mut end = first + u64::from(first_run.count_ones());
                // Grow into the words that follow while the run goes on.
                while end.is_multiple_of(WORD) && end - first < most && end < self.pages {
                    let word = end / WORD;
                    let free = self.load(word) & !in_flight.load(word);
                    let ones = u64::from(free.trailing_ones()).min(most - (end - first));
                    if ones == 0 {
                        break;
                    }
                    let won = self.lock_and_take(in_flight, word, low_ones(ones));
                    let kept = u64::from(won.trailing_ones());
                    self.give_back(in_flight, word, won & !low_ones(kept));
                    end += kept;
                    if kept < ones {
                        break;
                    }
                }
                return Some(first..end);
            }
        }
        None
    }

    /// Locks `wanted` in `in_flight` and removes it here, and returns the bits for which both succeeded.
    fn lock_and_take<V: Deref<Target = [AtomicU64]>>(
        &self,
        in_flight: &PageSet<V>,
        word: u64,
        wanted: u64,
    ) -> u64 {
        let locked = in_flight.add(word, wanted);
        let got = self.take(word, locked);
        if locked & !got != 0 {
            in_flight.take(word, locked & !got);
        }
        got
    }

    fn give_back<V: Deref<Target = [AtomicU64]>>(&self, in_flight: &PageSet<V>, word: u64, bits: u64) {
        if bits != 0 {
            self.add(word, bits);
            in_flight.take(word, bits);
        }
    }
}
