//! The bits of a set, and the two levels of summary above them.

use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicU64, Ordering};

use super::PageSet;
use super::bits::{WORD, below, low_ones};

impl<W: Deref<Target = [AtomicU64]>> PageSet<W> {
    /// Sets `mask` in `word`, and returns the bits that are new.
    pub(super) fn add(&self, word: u64, mask: u64) -> u64 {
        let old = self.leaf(word).fetch_or(mask, Ordering::SeqCst);
        self.mark(word);
        mask & !old
    }

    /// Clears `mask` in `word` and, if that empties the word, its mark. Returns the bits that were set.
    pub(super) fn take(&self, word: u64, mask: u64) -> u64 {
        let old = self.leaf(word).fetch_and(!mask, Ordering::SeqCst);
        // Bits that came since are a reason to leave the mark.
        if old & !mask == 0 && self.leaf(word).load(Ordering::SeqCst) == 0 {
            self.unmark(word);
        }
        old & mask & self.valid(word)
    }

    /// Marks `word` in the summary, and that in the top.
    ///
    /// Marks are set from the bottom up, after the bits, and a thread that clears a mark looks once more at what is under
    /// it. One of the two threads sees what the other has written, because all of this is sequentially consistent. A mark
    /// that is there already is not written again, so that threads do not take the cache line from each other.
    fn mark(&self, word: u64) {
        set(self.summary(word));
        set(self.top(word / WORD));
    }

    /// Clears the mark of `word`, which was empty. Bits that come meanwhile are hidden until the mark is back.
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

    /// Returns the bits of a word, without those beyond the last page.
    pub(super) fn load(&self, word: u64) -> u64 {
        self.leaf(word).load(Ordering::Acquire) & self.valid(word)
    }

    pub(super) fn leaf(&self, word: u64) -> &AtomicU64 {
        &self.words[word as usize]
    }

    /// Returns the mark of `word`: a word of the summary, and its bit there.
    fn summary(&self, word: u64) -> (&AtomicU64, u64) {
        (&self.words[(self.leaves() + word / WORD) as usize], 1 << (word % WORD))
    }

    /// Returns the mark of word `group` of the summary: a word of the top, and its bit there.
    fn top(&self, group: u64) -> (&AtomicU64, u64) {
        let tops = self.leaves() + self.leaves().div_ceil(WORD);
        (&self.words[(tops + group / WORD) as usize], 1 << (group % WORD))
    }

    pub(super) fn leaves(&self) -> u64 {
        self.pages.div_ceil(WORD)
    }

    /// Returns the bits of `word` that stand for pages of this set.
    fn valid(&self, word: u64) -> u64 {
        low_ones((self.pages - word * WORD).min(WORD))
    }

    pub(super) fn mask_in(&self, word: u64, range: &Range<u64>) -> u64 {
        self.valid(word) & !below(range.start, word) & below(range.end, word)
    }

    /// Returns the words and masks that cover `range`, cut to the set.
    pub(super) fn masks(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64)> + '_ {
        let range = range.start..range.end.min(self.pages);
        let words = if range.is_empty() { 0..0 } else { range.start / WORD..range.end.div_ceil(WORD) };
        words.map(move |word| (word, self.mask_in(word, &range)))
    }

    /// Returns the marked words that overlap `range`, in order.
    pub(super) fn marked_words(&self, range: Range<u64>) -> impl Iterator<Item = u64> + '_ {
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

    /// Returns the first word from `word` on whose summary is marked in the top, or `end` or more if there is none before
    /// `end`.
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
