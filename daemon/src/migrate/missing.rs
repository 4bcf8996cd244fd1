//! Telling the other host which pages are missing at the destination.

use std::ops::Range;

use memlane_protocol::PageSet;
use memlane_protocol::wire::control::{MAX_WORDS, Missing};

/// Pages under one word.
const WORD: u64 = 64;
/// Words of nothing that are sent along rather than begun anew after.
const GAP: u64 = 8;

/// The pages of `set` as messages, of which the last one says so; at least one.
pub fn tell(set: &PageSet) -> Vec<Missing> {
    let mut messages: Vec<Missing> = Vec::new();
    for run in set.runs() {
        for word in run.start / WORD..run.end.div_ceil(WORD) {
            let bits = bits_of(&run, word);
            match messages.last_mut() {
                Some(last) if fits(last, word) => {
                    let index = (word - last.first / WORD) as usize;
                    if index >= last.words.len() {
                        last.words.resize(index + 1, 0);
                    }
                    last.words[index] |= bits;
                }
                _ => messages.push(Missing { first: word * WORD, words: vec![bits], last: false }),
            }
        }
    }
    match messages.last_mut() {
        Some(last) => last.last = true,
        None => messages.push(Missing { last: true, ..Missing::default() }),
    }
    messages
}

/// The pages that a message names, if a guest of `pages` pages has them all.
pub fn heard(missing: &Missing, pages: u64) -> Result<Vec<Range<u64>>, String> {
    let runs: Vec<_> = missing.runs().collect();
    match runs.last() {
        Some(last) if last.end > pages => Err(format!(
            "the other host says that page {} of a guest of {pages} pages is missing",
            last.end - 1
        )),
        _ => Ok(runs),
    }
}

/// Whether a word may be added to a message.
fn fits(message: &Missing, word: u64) -> bool {
    let first = message.first / WORD;
    let end = first + message.words.len() as u64;
    word < end + GAP && word - first < MAX_WORDS as u64
}

/// The bits of `word` that stand for pages of `run`.
fn bits_of(run: &Range<u64>, word: u64) -> u64 {
    let ones = |count: u64| if count >= WORD { u64::MAX } else { (1 << count) - 1 };
    let below = |page: u64| ones(page.saturating_sub(word * WORD).min(WORD));
    below(run.end) & !below(run.start)
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
        assert!(heard(&missing, 100).unwrap_err().contains("page 100 of a guest of 100"));
        let runs = heard(&missing, 101).unwrap();
        assert!(runs.len() == 1 && runs[0] == (100..101), "{runs:?}");
    }
}
