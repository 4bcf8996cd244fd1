//! Words of bits, as the levels of a set consist of.

/// The number of bits in a word, and of words under one word of the level above.
pub(super) const WORD: u64 = 64;

/// Returns the bits of `word` that stand for pages before `page`.
pub(super) fn below(page: u64, word: u64) -> u64 {
    low_ones(page.saturating_sub(word * WORD).min(WORD))
}

/// Returns a word with the lowest `count` bits set.
pub(super) fn low_ones(count: u64) -> u64 {
    if count >= WORD { u64::MAX } else { (1 << count) - 1 }
}

/// Returns the lowest run of ones in `bits`, cut to `most` ones.
pub(super) fn first_ones(bits: u64, most: u64) -> Option<u64> {
    if bits == 0 || most == 0 {
        return None;
    }
    let start = u64::from(bits.trailing_zeros());
    let ones = u64::from((bits >> start).trailing_ones()).min(most);
    Some(low_ones(ones) << start)
}
