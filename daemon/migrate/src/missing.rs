//! This module tells the other host which pages are missing at the destination. It does so by words of a bitmap, since
//! what was written last may lie in single pages, and much of this happens in the guest's pause.

use std::ops::Range;

use memlane_lane::SendState;
use memlane_protocol::wire::control::{MAX_WORDS, Missing};
use memlane_protocol::{PAGE_SIZE, PageSet};

/// A word covers this many pages.
const WORD: u64 = 64;
/// Up to this many words of zero are sent along; after more of them a new message begins.
const GAP: u64 = 8;

/// Returns the pages of `set` as messages, at least one. The last one says that it is the last.
pub(crate) fn tell(set: &PageSet) -> Vec<Missing> {
    let mut messages: Vec<Missing> = Vec::new();
    for (word, bits) in set.words(0..set.pages()) {
        match messages.last_mut() {
            Some(last) if fits(last, word) => {
                last.words.resize((word - last.first / WORD) as usize, 0);
                last.words.push(bits);
            }
            _ => messages.push(Missing { first: word * WORD, words: vec![bits], last: false }),
        }
    }
    match messages.last_mut() {
        Some(last) => last.last = true,
        None => messages.push(Missing { last: true, ..Missing::default() }),
    }
    messages
}

/// The other host named a page as missing that the guest does not have.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the other host says that page {page} of a guest of {pages} pages is missing")]
pub(crate) struct NoSuchPage {
    /// This is the number of the page.
    pub page: u64,
    /// The guest has this many pages, counted from 0.
    pub pages: u64,
}

/// Returns the pages that a message names.
///
/// # Errors
///
/// Fails if a guest of `pages` pages does not have them all.
pub(crate) fn heard(missing: &Missing, pages: u64) -> Result<Vec<Range<u64>>, NoSuchPage> {
    check(missing, pages)?;
    Ok(missing.runs().collect())
}

/// Has lanes send the pages that a message names.
///
/// # Errors
///
/// Fails, and has nothing sent, if the guest does not have them all.
pub(crate) fn add(missing: &Missing, outbound: &SendState) -> Result<(), NoSuchPage> {
    let ram = &outbound.ram;
    if ram.regions().iter().any(|region| u64::from(region.page_bytes) != PAGE_SIZE) {
        let runs = heard(missing, ram.pages())?;
        runs.into_iter().for_each(|run| outbound.add(ram.whole(run)));
        return Ok(());
    }
    check(missing, ram.pages())?;
    for (word, bits) in (missing.first / WORD..).zip(&missing.words) {
        outbound.dirty.insert_word(word, *bits);
    }
    Ok(())
}

/// Checks that a guest of `pages` pages has all pages that a message names.
fn check(missing: &Missing, pages: u64) -> Result<(), NoSuchPage> {
    let last =
        missing.words.iter().rposition(|bits| *bits != 0).map(|index| (index as u64, missing.words[index]));
    let end = last.map_or(0, |(index, bits)| {
        let word = (missing.first / WORD).saturating_add(index);
        word.saturating_mul(WORD).saturating_add(WORD - u64::from(bits.leading_zeros()))
    });
    if end <= pages {
        return Ok(());
    }
    Err(NoSuchPage { page: end - 1, pages })
}

/// Tells whether a word may be added to a message.
fn fits(message: &Missing, word: u64) -> bool {
    let first = message.first / WORD;
    let end = first + message.words.len() as u64;
    word < end + GAP && word - first < MAX_WORDS as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_told_is_heard(
            runs in prop::collection::vec((0u64..10_000_000, 1u64..3000), 0..30),
        ) {
            let set = PageSet::new(10_003_000);
            for (first, count) in runs {
                set.insert_range(first..first + count);
            }
            let messages = tell(&set);
            let heard_of = PageSet::new(set.pages());
            for (index, message) in messages.iter().enumerate() {
                prop_assert!(message.words.len() <= MAX_WORDS);
                prop_assert_eq!(message.last, index + 1 == messages.len());
                for run in heard(message, set.pages()).unwrap() {
                    prop_assert_eq!(heard_of.insert_range(run.clone()), run.end - run.start);
                }
            }
            prop_assert!(set.runs().eq(heard_of.runs()));
        }
    }

    #[test]
    fn nothing_is_told_too_and_pages_beyond_the_last_are_refused() {
        assert_eq!(tell(&PageSet::new(100)), [Missing { first: 0, words: vec![], last: true }]);
        let missing = Missing { first: 64, words: vec![1 << 36], last: true };
        assert_eq!(heard(&missing, 100), Err(NoSuchPage { page: 100, pages: 100 }));
        let runs = heard(&missing, 101).unwrap();
        assert!(runs.len() == 1 && runs[0] == (100..101), "{runs:?}");
    }
}
