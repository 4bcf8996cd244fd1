//! Post-copy: the pages that are missing at the destination, and the progress of fetching them.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::wire::error::WireError;
use crate::wire::reader::{Reader, count, put};

/// The largest number of words in one [`Missing`], which stand for 16 GiB of memory.
pub const MAX_WORDS: usize = 64 << 10;

/// The number of bits in a word.
const WORD: u64 = 64;

/// A part of the set of missing pages. A page that no message names is not missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// The page of the first word's lowest bit, which is a multiple of 64.
    pub first: u64,
    /// One bit for each page, which is set if the page is missing.
    pub words: Vec<u64>,
    /// Whether this message is the last part of the set.
    pub last: bool,
}

/// The progress of fetching, as the destination sees it. Times are in nanoseconds.
///
/// A page fault takes from the moment that the destination sees it until its page was placed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchReport {
    /// The number of pages that are still missing.
    pub remaining_pages: u64,
    /// The number of page faults: accesses to missing pages that had to wait.
    pub faults: u64,
    /// The median time that a page fault took.
    pub fault_p50_nanoseconds: u64,
    /// The time that 99 of 100 page faults did not exceed.
    pub fault_p99_nanoseconds: u64,
    /// The longest time that a page fault took.
    pub fault_max_nanoseconds: u64,
    /// The number of pages that came because a page fault waited for them.
    pub pages_fetched: u64,
    /// The number of pages that came without being asked for.
    pub pages_streamed: u64,
    /// The time since the guest began to run with pages missing.
    pub nanoseconds: u64,
}

impl Missing {
    /// Returns the runs of missing pages in order.
    pub fn runs(&self) -> impl Iterator<Item = std::ops::Range<u64>> + '_ {
        (0..).zip(&self.words).flat_map(|(index, &word)| {
            let (first, mut bits) = (self.first.saturating_add(index * WORD), word);
            std::iter::from_fn(move || {
                if bits == 0 {
                    return None;
                }
                let start = u64::from(bits.trailing_zeros());
                let length = u64::from((bits >> start).trailing_ones());
                bits &= !(u64::MAX >> (WORD - length) << start);
                let start = first.saturating_add(start);
                Some(start..start.saturating_add(length))
            })
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let words = U32::new(count(self.words.len(), u32::MAX));
        put(out, &RawMissing { first: self.first.into(), words, last: u32::from(self.last).into() });
        for word in &self.words {
            put(out, &U64::new(*word));
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let raw: &RawMissing = reader.take("missing pages")?;
        let (first, last) = (raw.first.get(), raw.last.get() != 0);
        if !first.is_multiple_of(WORD) {
            return Err(WireError::Value { what: "the first of the missing pages", found: first });
        }
        let words =
            reader.list::<U64>("count of words of missing pages", raw.words.get().into(), MAX_WORDS)?;
        Ok(Self { first, words: words.iter().map(|word| word.get()).collect(), last })
    }
}

impl FetchReport {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        put(
            out,
            &RawFetchReport {
                remaining_pages: self.remaining_pages.into(),
                faults: self.faults.into(),
                fault_p50_nanoseconds: self.fault_p50_nanoseconds.into(),
                fault_p99_nanoseconds: self.fault_p99_nanoseconds.into(),
                fault_max_nanoseconds: self.fault_max_nanoseconds.into(),
                pages_fetched: self.pages_fetched.into(),
                pages_streamed: self.pages_streamed.into(),
                nanoseconds: self.nanoseconds.into(),
            },
        );
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let raw: &RawFetchReport = reader.take("report about fetching")?;
        Ok(Self {
            remaining_pages: raw.remaining_pages.get(),
            faults: raw.faults.get(),
            fault_p50_nanoseconds: raw.fault_p50_nanoseconds.get(),
            fault_p99_nanoseconds: raw.fault_p99_nanoseconds.get(),
            fault_max_nanoseconds: raw.fault_max_nanoseconds.get(),
            pages_fetched: raw.pages_fetched.get(),
            pages_streamed: raw.pages_streamed.get(),
            nanoseconds: raw.nanoseconds.get(),
        })
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawMissing {
    first: U64,
    words: U32,
    last: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawFetchReport {
    remaining_pages: U64,
    faults: U64,
    fault_p50_nanoseconds: U64,
    fault_p99_nanoseconds: U64,
    fault_max_nanoseconds: U64,
    pages_fetched: U64,
    pages_streamed: U64,
    nanoseconds: U64,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_are_the_bits(first in 0..1000u64, words in prop::collection::vec(any::<u64>(), 0..6)) {
            let missing = Missing { first: first * WORD, words, last: true };
            let found: Vec<u64> = missing.runs().flatten().collect();
            let bits = |(index, word): (usize, &u64)| {
                let word = *word;
                (0..WORD).filter(move |bit| word >> bit & 1 == 1).map(move |bit| index as u64 * WORD + bit)
            };
            let expected: Vec<u64> =
                missing.words.iter().enumerate().flat_map(bits).map(|page| missing.first + page).collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_set_at_the_end_of_all_numbers_does_no_harm() {
        let missing = Missing { first: u64::MAX - 63, words: vec![u64::MAX; 3], last: true };
        assert!(missing.runs().all(|run| run.start >= u64::MAX - 63));
    }
}
