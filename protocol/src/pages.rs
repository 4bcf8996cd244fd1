//! [`PageSet`]: which pages of a guest, as a bitmap that many threads share, under two levels of summary.
//!
//! Pages are numbered densely over a guest's regions in order, so gaps in the guest's address
//! space cost nothing. A page is always 4 KiB here, whatever backs it.

use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::FromZeros;

/// Bytes in a page, the unit of tracking and of transfer.
pub const PAGE_SIZE: u64 = 4096;

/// Bits in a word, and words under one bit of the level above.
const WORD: u64 = 64;

/// A set of pages: one bit a page, above it a summary with one bit a word, and above that its top with one
/// bit a word of the summary.
///
/// A bit of a summary says that the word under it *may* hold something. A scan goes from the top down, so
/// that it reads 200 KB for the emptiest of sets over 24 TiB, and beyond that goes with what the set holds.
/// So does the memory that it takes: words that nobody has written stay untouched, and take none.
/// All operations take `&self` and may run on many threads at once.
///
/// The words may be the set's own, or a mapping shared with another process
/// ([`PageSet::over`]); whatever that process writes there, no page at or above
/// [`PageSet::pages`] is ever reported.
#[derive(Debug)]
pub struct PageSet<W = Box<[AtomicU64]>> {
    pages: u64,
    words: W,
}

/// The words handed to [`PageSet::over`] are too few for the pages.
#[derive(Debug, thiserror::Error)]
#[error("a set of {pages} pages needs {needed} words, and the mapping holds {found}")]
pub struct TooFewWords {
    /// Pages asked for.
    pub pages: u64,
    /// Words that they need.
    pub needed: usize,
    /// Words that there are.
    pub found: usize,
}

impl PageSet {
    /// An empty set over `pages` pages. Memory is taken as it is touched.
    pub fn new(pages: u64) -> Self {
        let words = <[AtomicU64]>::new_box_zeroed_with_elems(Self::words_needed(pages))
            .expect("a bitmap of the guest's pages fits into the address space");
        Self { pages, words }
    }

    /// 64-bit words that a set over `pages` pages takes: the bits, their summary, and its top, one after another.
    pub fn words_needed(pages: u64) -> usize {
        let leaves = pages.div_ceil(WORD);
        let groups = leaves.div_ceil(WORD);
        (leaves + groups + groups.div_ceil(WORD)) as usize
    }
}

impl<W: Deref<Target = [AtomicU64]>> PageSet<W> {
    /// A set that lives in `words`, as they are.
    pub fn over(pages: u64, words: W) -> Result<Self, TooFewWords> {
        let needed = PageSet::words_needed(pages);
        match words.len() {
            found if found < needed => Err(TooFewWords { pages, needed, found }),
            _ => Ok(Self { pages, words }),
        }
    }

    /// How many pages the set ranges over (not how many it holds).
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.leaf(page / WORD).load(Ordering::Acquire) >> (page % WORD) & 1 == 1
    }

    /// Adds `page`; true if it was not there before. Pages beyond the set are ignored.
    pub fn insert(&self, page: u64) -> bool {
        self.insert_range(page..page.saturating_add(1)) == 1
    }

    /// Adds the pages of `range` that exist; returns how many are new.
    pub fn insert_range(&self, range: Range<u64>) -> u64 {
        let mut new = 0;
        for (word, mask) in self.masks(range) {
            new += u64::from(self.add(word, mask).count_ones());
        }
        new
    }

    /// Adds the pages that `bits` marks: bit 0 is page `64 * word`. Returns how many are new.
    pub fn insert_word(&self, word: u64, bits: u64) -> u64 {
        u64::from(self.insert_bits(word, bits).count_ones())
    }

    /// As [`insert_word`](Self::insert_word); returns the bits of the pages that are new.
    pub fn insert_bits(&self, word: u64, bits: u64) -> u64 {
        let (first, end) = (word.saturating_mul(WORD), word.saturating_add(1).saturating_mul(WORD));
        match self.masks(first..end).next() {
            Some((word, mask)) if bits & mask != 0 => self.add(word, bits & mask),
            _ => 0,
        }
    }

    /// Takes out the pages that `bits` marks, as [`insert_word`](Self::insert_word) adds them.
    pub fn remove_word(&self, word: u64, bits: u64) {
        if word < self.leaves() {
            self.take(word, bits);
        }
    }

    /// What the set holds in `range`, in order: numbers of words, and their bits, of which bit 0 is page
    /// `64 * number`.
    pub fn words(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64)> + '_ {
        let words = self.marked_words(range.clone());
        let masked = words.map(move |word| (word, self.load(word) & self.mask_in(word, &range)));
        masked.filter(|(_, bits)| *bits != 0)
    }

    /// Takes the pages of `range` out; returns how many were there. It looks at every word of the range.
    pub fn remove_range(&self, range: Range<u64>) -> u64 {
        let mut gone = 0;
        for (word, mask) in self.masks(range) {
            // Words that hold nothing are not written, and so take no memory.
            if self.leaf(word).load(Ordering::Acquire) & mask != 0 {
                let old = self.leaf(word).fetch_and(!mask, Ordering::AcqRel);
                gone += u64::from((old & mask).count_ones());
            }
        }
        gone
    }

    /// Empties the set.
    pub fn clear(&self) {
        for word in self.marked_words(0..self.pages) {
            self.take(word, u64::MAX);
        }
    }

    /// How many pages the set holds.
    pub fn count(&self) -> u64 {
        self.marked_words(0..self.pages).map(|word| u64::from(self.load(word).count_ones())).sum()
    }

    /// Whether the set holds nothing.
    ///
    /// Exact while nobody takes pages out. A page that is added while another thread empties what
    /// lies under the same word of the summary may be missed until that thread has put the summary
    /// right again: who must not miss it makes sure that all who take are done.
    pub fn is_empty(&self) -> bool {
        self.marked_words(0..self.pages).all(|word| self.load(word) == 0)
    }

    /// Moves what the set holds in `range` into `into`; returns how many pages were new there.
    ///
    /// A page that is added to this set meanwhile is either moved too or stays: it is never lost.
    pub fn drain_into<V: Deref<Target = [AtomicU64]>>(&self, range: Range<u64>, into: &PageSet<V>) -> u64 {
        let mut new = 0;
        for word in self.marked_words(range.clone()) {
            let mask = self.mask_in(word, &range);
            let bits = self.take(word, mask);
            if bits != 0 {
                new += into.insert_word(word, bits);
            }
        }
        new
    }

    /// The first run of pages at or after `from`, of at most `most` pages.
    pub fn next_run(&self, from: u64, most: u64) -> Option<Range<u64>> {
        self.run_within(from..self.pages, most)
    }

    /// The first run within `range`, or the part of it that lies there. What lies beyond is not looked at.
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

    /// The runs of the set in order, each as long as it can be.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(from, u64::MAX)?;
            from = run.end;
            Some(run)
        })
    }

    /// Takes a run of at most `most` pages at or after `from` out of this set and puts it into
    /// `in_flight`, passing over pages that are in flight already.
    ///
    /// Safe against any number of claimants: a page is handed to one of them, and to none
    /// while it is in flight. The in-flight bit is taken first and acts as the page's lock.
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

    /// Locks `wanted` in `in_flight` and takes it from here; returns what was really got.
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

    /// Sets `mask` in `word`; returns the bits that are new.
    fn add(&self, word: u64, mask: u64) -> u64 {
        let old = self.leaf(word).fetch_or(mask, Ordering::SeqCst);
        self.mark(word);
        mask & !old
    }

    /// Clears `mask` in `word` and, if that empties it, what marks it; returns what was set.
    fn take(&self, word: u64, mask: u64) -> u64 {
        let old = self.leaf(word).fetch_and(!mask, Ordering::SeqCst);
        // Bits that came since are a reason to leave the mark.
        if old & !mask == 0 && self.leaf(word).load(Ordering::SeqCst) == 0 {
            self.unmark(word);
        }
        old & mask & self.valid(word)
    }

    /// Marks `word` in the summary, and that in the top.
    ///
    /// From the bottom up, and after the bits: whoever clears a mark looks once more at what is under it.
    /// One of the two sees what the other has written, as all of it is sequentially consistent. A mark that
    /// is there already is not written again, so that threads do not take the line from each other.
    fn mark(&self, word: u64) {
        set(self.summary(word));
        set(self.top(word / WORD));
    }

    /// Clears what marks `word`, which was empty. Bits that come meanwhile are hidden until the mark is back.
    fn unmark(&self, word: u64) {
        let (marks, bit) = self.summary(word);
        marks.fetch_and(!bit, Ordering::SeqCst);
        if self.leaf(word).load(Ordering::SeqCst) != 0 {
            // In the top too: another thread may have found the summary empty, and cleared that.
            return self.mark(word);
        }
        if marks.load(Ordering::SeqCst) == 0 {
            let (top, bit) = self.top(word / WORD);
            top.fetch_and(!bit, Ordering::SeqCst);
            if marks.load(Ordering::SeqCst) != 0 {
                set((top, bit));
            }
        }
    }

    /// The word's bits, without those beyond the last page.
    fn load(&self, word: u64) -> u64 {
        self.leaf(word).load(Ordering::Acquire) & self.valid(word)
    }

    fn leaf(&self, word: u64) -> &AtomicU64 {
        &self.words[word as usize]
    }

    /// What marks `word`: a word of the summary, and its bit there.
    fn summary(&self, word: u64) -> (&AtomicU64, u64) {
        (&self.words[(self.leaves() + word / WORD) as usize], 1 << (word % WORD))
    }

    /// What marks word `group` of the summary: a word of the top, and its bit there.
    fn top(&self, group: u64) -> (&AtomicU64, u64) {
        let tops = self.leaves() + self.leaves().div_ceil(WORD);
        (&self.words[(tops + group / WORD) as usize], 1 << (group % WORD))
    }

    fn leaves(&self) -> u64 {
        self.pages.div_ceil(WORD)
    }

    /// The bits of `word` that stand for pages of this set.
    fn valid(&self, word: u64) -> u64 {
        low_ones((self.pages - word * WORD).min(WORD))
    }

    fn mask_in(&self, word: u64, range: &Range<u64>) -> u64 {
        self.valid(word) & !below(range.start, word) & below(range.end, word)
    }

    /// Words and masks that cover `range`, cut to the set.
    fn masks(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64)> + '_ {
        let range = range.start..range.end.min(self.pages);
        let words = if range.is_empty() { 0..0 } else { range.start / WORD..range.end.div_ceil(WORD) };
        words.map(move |word| (word, self.mask_in(word, &range)))
    }

    /// Words that overlap `range` and that are marked, in order.
    fn marked_words(&self, range: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let end = range.end.min(self.pages).div_ceil(WORD);
        let mut word = self.marked_from(range.start / WORD, end);
        std::iter::from_fn(move || {
            while word < end {
                let marks = self.summary(word).0.load(Ordering::Acquire) >> (word % WORD);
                if marks == 0 {
                    word = self.marked_from((word / WORD + 1) * WORD, end);
                    continue;
                }
                word += u64::from(marks.trailing_zeros());
                if word >= end {
                    break;
                }
                word += 1;
                return Some(word - 1);
            }
            None
        })
    }

    /// The first word from `word` on whose summary the top marks; `end` or beyond if there is none before.
    fn marked_from(&self, word: u64, end: u64) -> u64 {
        let (mut group, groups) = (word / WORD, end.div_ceil(WORD));
        while group < groups {
            let marks = self.top(group).0.load(Ordering::Acquire) >> (group % WORD);
            if marks != 0 {
                return word.max((group + u64::from(marks.trailing_zeros())) * WORD);
            }
            group = (group / WORD + 1) * WORD;
        }
        end
    }
}

/// Sets a mark, if it is not set.
fn set((marks, bit): (&AtomicU64, u64)) {
    if marks.load(Ordering::SeqCst) & bit == 0 {
        marks.fetch_or(bit, Ordering::SeqCst);
    }
}

/// Bits of `word` that stand for pages before `page`.
fn below(page: u64, word: u64) -> u64 {
    low_ones(page.saturating_sub(word * WORD).min(WORD))
}

fn low_ones(count: u64) -> u64 {
    if count >= WORD { u64::MAX } else { (1 << count) - 1 }
}

/// The lowest run of ones in `bits`, cut to `most`.
fn first_ones(bits: u64, most: u64) -> Option<u64> {
    if bits == 0 || most == 0 {
        return None;
    }
    let start = u64::from(bits.trailing_zeros());
    let ones = u64::from((bits >> start).trailing_ones()).min(most);
    Some(low_ones(ones) << start)
}

#[cfg(test)]
mod tests;
