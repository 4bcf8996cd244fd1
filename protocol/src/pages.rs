//! [`PageSet`] is a set of a guest's pages: a bitmap that many threads share, with two levels of summary.
//!
//! Pages are numbered densely over a guest's regions in order, so gaps in the guest's address
//! space cost nothing. A page is always 4 KiB here, whatever backs it.

mod bits;
mod levels;
mod runs;

use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::FromZeros;

use bits::WORD;

/// Bytes in a page, the unit of tracking and of transfer.
pub const PAGE_SIZE: u64 = 4096;

/// A set of pages. It has one bit for each page, above it a summary with one bit for each word of these, and above that
/// its top with one bit for each word of the summary.
///
/// A bit of a summary says that the word under it *may* hold something. A scan goes from the top down, so
/// that it reads 200 KB for an empty set over 24 TiB, and otherwise its cost depends on what the set holds. So does the
/// memory that the set takes, because words that were never written take none.
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

/// [`PageSet::over`] was given too few words for the pages.
#[derive(Debug, thiserror::Error)]
#[error("a set of {pages} pages needs {needed} words, and the mapping holds {found}")]
pub struct TooFewWords {
    /// The number of pages that the set is to range over.
    pub pages: u64,
    /// The number of words that they need.
    pub needed: usize,
    /// The number of words that there are.
    pub found: usize,
}

impl PageSet {
    /// Returns an empty set over `pages` pages. Memory is taken as it is touched.
    pub fn new(pages: u64) -> Self {
        let words = <[AtomicU64]>::new_box_zeroed_with_elems(Self::words_needed(pages))
            .expect("a bitmap of the guest's pages fits into the address space");
        Self { pages, words }
    }

    /// Returns how many 64-bit words a set over `pages` pages takes: the bits, their summary and its top, one after another.
    pub fn words_needed(pages: u64) -> usize {
        let leaves = pages.div_ceil(WORD);
        let groups = leaves.div_ceil(WORD);
        (leaves + groups + groups.div_ceil(WORD)) as usize
    }
}

impl<W: Deref<Target = [AtomicU64]>> PageSet<W> {
    /// Returns a set that lives in `words`, as they are.
    ///
    /// # Errors
    ///
    /// Returns an error if there are fewer than [`PageSet::words_needed`] words.
    pub fn over(pages: u64, words: W) -> Result<Self, TooFewWords> {
        let needed = PageSet::words_needed(pages);
        match words.len() {
            found if found < needed => Err(TooFewWords { pages, needed, found }),
            _ => Ok(Self { pages, words }),
        }
    }

    /// Returns how many pages the set ranges over (not how many it holds).
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Tells whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.leaf(page / WORD).load(Ordering::Acquire) >> (page % WORD) & 1 == 1
    }

    /// Adds `page`, and returns whether it is new. A page beyond the set is ignored.
    pub fn insert(&self, page: u64) -> bool {
        self.insert_range(page..page.saturating_add(1)) == 1
    }

    /// Adds the pages of `range` that exist, and returns how many are new.
    pub fn insert_range(&self, range: Range<u64>) -> u64 {
        let mut new = 0;
        for (word, mask) in self.masks(range) {
            new += u64::from(self.add(word, mask).count_ones());
        }
        new
    }

    /// Adds the pages that `bits` marks, of which bit 0 is page `64 * word`. Returns how many are new.
    pub fn insert_word(&self, word: u64, bits: u64) -> u64 {
        u64::from(self.insert_bits(word, bits).count_ones())
    }

    /// Adds pages as [`insert_word`](Self::insert_word) does, and returns the bits of the new pages.
    pub fn insert_bits(&self, word: u64, bits: u64) -> u64 {
        let (first, end) = (word.saturating_mul(WORD), word.saturating_add(1).saturating_mul(WORD));
        match self.masks(first..end).next() {
            Some((word, mask)) if bits & mask != 0 => self.add(word, bits & mask),
            _ => 0,
        }
    }

    /// Removes the pages that `bits` marks, as [`insert_word`](Self::insert_word) adds them.
    pub fn remove_word(&self, word: u64, bits: u64) {
        if word < self.leaves() {
            self.take(word, bits);
        }
    }

    /// Returns what the set holds in `range`, in order. Each item is the number of a word and its bits, of which bit 0 is
    /// page `64 * number`.
    pub fn words(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64)> + '_ {
        let words = self.marked_words(range.clone());
        let masked = words.map(move |word| (word, self.load(word) & self.mask_in(word, &range)));
        masked.filter(|(_, bits)| *bits != 0)
    }

    /// Removes the pages of `range`, and returns how many there were. It looks at every word of the range.
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

    /// Returns how many pages the set holds.
    pub fn count(&self) -> u64 {
        self.marked_words(0..self.pages).map(|word| u64::from(self.load(word).count_ones())).sum()
    }

    /// Tells whether the set holds nothing.
    ///
    /// The answer is exact while no thread removes pages. A page that is added while another thread empties what lies
    /// under the same word of the summary may be missed until that thread has corrected the summary. A caller that must
    /// not miss it makes sure that no thread removes pages.
    pub fn is_empty(&self) -> bool {
        self.marked_words(0..self.pages).all(|word| self.load(word) == 0)
    }

    /// Moves what the set holds in `range` into `into`, and returns how many pages were new there.
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
}

#[cfg(test)]
mod tests;
