//! The contents that the guest writes: a function of page, generation and position, so that any page can be checked at
//! any time.
//!
//! A [`CheckedRegion`] is written page after page, round and round. Which generation a page has follows from the number of
//! pages written so far alone, which lives in a register or on a stack far from the region: a page that was left
//! behind in a move, or that came from an earlier round of it, cannot agree with it.

/// The size of a page, in bytes.
pub(crate) const PAGE_BYTES: u64 = 4096;

const WORDS: usize = PAGE_BYTES as usize / size_of::<u64>();

/// A word that is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    /// The number of the page, counted over all regions.
    pub page: u64,
    /// The index of the word in the page.
    pub word: usize,
    /// The value that the word should have.
    pub expected: u64,
    /// The value that the word has.
    pub found: u64,
}

/// Pages that one checker writes and checks.
#[derive(Debug)]
pub(crate) struct CheckedRegion {
    memory: &'static mut [u64],
    /// The number of the first page, counted over all regions.
    first: u64,
    /// The number of pages written since the first round.
    written: u64,
}

impl CheckedRegion {
    /// Writes the first round over `memory`, which consists of whole pages. The first page has the number `first`.
    pub(crate) fn fill(memory: &'static mut [u64], first: u64) -> Self {
        assert!(!memory.is_empty() && memory.len().is_multiple_of(WORDS), "whole pages");
        let mut region = Self { memory, first, written: 0 };
        for page in 0..region.pages() {
            region.write(page, 0);
        }
        region
    }

    /// Returns the number of pages in the region.
    pub(crate) fn pages(&self) -> u64 {
        (self.memory.len() / WORDS) as u64
    }

    /// Checks the page whose turn it is, writes it anew, and checks another one anywhere.
    pub(crate) fn step(&mut self) -> [Result<(), Mismatch>; 2] {
        let next = self.written % self.pages();
        let due = self.check(next);
        self.write(next, self.generation(next) + 1);
        self.written += 1;
        [due, self.check(mix(self.written) % self.pages())]
    }

    /// Compares page `page` of this region with what was written there last.
    pub(crate) fn check(&self, page: u64) -> Result<(), Mismatch> {
        let seed = seed(self.first + page, self.generation(page));
        for (word, place) in self.page(page).enumerate() {
            // SAFETY: a word of our own memory. Volatile, since a move replaces it under the program's feet.
            let found = unsafe { (&raw const self.memory[place]).read_volatile() };
            let expected = value(seed, word);
            if found != expected {
                return Err(Mismatch { page: self.first + page, word, expected, found });
            }
        }
        Ok(())
    }

    fn write(&mut self, page: u64, generation: u64) {
        let seed = seed(self.first + page, generation);
        for (word, place) in self.page(page).enumerate() {
            // SAFETY: a word of our own memory; volatile for the same reason as in `check`.
            unsafe { (&raw mut self.memory[place]).write_volatile(value(seed, word)) };
        }
    }

    /// Returns how often the page was written since the first round.
    fn generation(&self, page: u64) -> u64 {
        let again = page < self.written % self.pages();
        self.written / self.pages() + u64::from(again)
    }

    fn page(&self, page: u64) -> std::ops::Range<usize> {
        let start = page as usize * WORDS;
        start..start + WORDS
    }
}

fn seed(page: u64, generation: u64) -> u64 {
    mix(mix(page) ^ generation)
}

fn value(seed: u64, word: usize) -> u64 {
    seed.wrapping_add((word as u64).wrapping_mul(GOLDEN))
}

/// 2^64 over the golden ratio, as in splitmix64.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of splitmix64 (Steele, Lea and Flood, 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(GOLDEN);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(pages: usize) -> CheckedRegion {
        CheckedRegion::fill(vec![0; pages * WORDS].leak(), 100)
    }

    fn all(region: &CheckedRegion) -> Vec<Mismatch> {
        (0..region.pages()).filter_map(|page| region.check(page).err()).collect()
    }

    #[test]
    fn memory_that_nobody_touches_passes() {
        let mut region = region(7);
        for _ in 0..50 {
            assert_eq!(region.step(), [Ok(()), Ok(())]);
            assert_eq!(all(&region), []);
        }
    }

    #[test]
    fn a_single_bit_is_found() {
        let region = region(4);
        region.memory[2 * WORDS + 511] ^= 1 << 63;
        let [found] = all(&region)[..] else { panic!("one page is wrong") };
        assert_eq!((found.page, found.word, found.expected ^ found.found), (102, 511, 1 << 63));
    }

    #[test]
    fn a_page_of_an_earlier_round_is_found() {
        let mut region = region(4);
        let old = region.memory[..WORDS].to_vec();
        let _ = region.step();
        region.memory[..WORDS].copy_from_slice(&old);
        assert_eq!(all(&region).len(), 1);
    }

    #[test]
    fn pages_that_changed_places_and_zeroes_are_found() {
        let region = region(4);
        let (low, high) = region.memory.split_at_mut(WORDS);
        low.swap_with_slice(&mut high[..WORDS]);
        assert_eq!(all(&region).len(), 2);
        region.memory[3 * WORDS..].fill(0);
        assert_eq!(all(&region).len(), 3);
    }
}
