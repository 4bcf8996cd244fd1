//! [`Fill`]: what the pages hold before the first step.

use std::str::FromStr;

use super::random::{mix, step};
use super::stepper::SLOTS;

/// The shares of the pages that start with different contents, in percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// The share of pages that are holes.
    pub zero: u8,
    /// The share of pages of random bytes, which cannot be compressed.
    pub random: u8,
    /// The share of pages that a compressor makes small.
    pub compressible: u8,
    /// The share of pages that LZ4 compresses to a third.
    pub mixed: u8,
}

impl Fill {
    /// Returns whether a page starts with zeros.
    pub fn is_zero(&self, seed: u64, page: u64) -> bool {
        self.draw(seed, page) < u64::from(self.zero)
    }

    /// Writes the contents that a page starts with.
    pub fn write(&self, seed: u64, page: u64, into: &mut [u64; SLOTS]) {
        let mut random = mix(seed ^ mix(!page)) | 1;
        let draw = self.draw(seed, page);
        let mut next = || {
            random = step(random);
            random
        };
        let (zero, random) = (u64::from(self.zero), u64::from(self.random));
        if draw < zero {
            into.fill(0);
        } else if draw < zero + random {
            into.fill_with(next);
        } else if draw < zero + random + u64::from(self.mixed) {
            // Like records: 14 bytes of each are its own, and the others those of the one before.
            for slots in into.chunks_mut(8) {
                let (short, long) = (next() >> 16, next());
                slots.copy_from_slice(&[short, page, 0, 0x2020_2020_2020_2020, page, long, seed, page]);
            }
        } else {
            let random = next();
            // Like a table: one line over and over, with a counter in it.
            for (line, slots) in into.chunks_mut(8).enumerate() {
                slots.copy_from_slice(&[random, page, line as u64, 0, 0, 0, 0x2020_2020_2020_2020, random]);
            }
        }
    }

    /// Draws a number from 0 to 99 for a page. Neighbours mostly get the same number, as in the memory of real guests;
    /// one area in eight is a patchwork of single pages.
    fn draw(&self, seed: u64, page: u64) -> u64 {
        const AREA_PAGES: u64 = 64;
        let area = mix(seed.wrapping_add(mix(!(page / AREA_PAGES))));
        match area % 8 {
            0 => mix(seed.wrapping_add(mix(page))) % 100,
            _ => (area >> 32) % 100,
        }
    }
}

impl FromStr for Fill {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut fill = Self { zero: 0, random: 0, compressible: 0, mixed: 0 };
        for share in text.split(',') {
            let parsed = share.split_once('=').and_then(|(name, value)| {
                let percent = value.parse::<u8>().ok().filter(|percent| *percent <= 100)?;
                match name {
                    "zero" => fill.zero = percent,
                    "random" => fill.random = percent,
                    "compressible" => fill.compressible = percent,
                    "mixed" => fill.mixed = percent,
                    _ => return None,
                }
                Some(())
            });
            if parsed.is_none() {
                return Err(format!("{share:?} is no share; write zero=50,random=30,compressible=20"));
            }
        }
        match [fill.zero, fill.random, fill.compressible, fill.mixed].into_iter().map(u32::from).sum::<u32>()
        {
            100 => Ok(fill),
            sum => Err(format!("the shares add up to {sum} percent, and must make 100")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILL: Fill = Fill { zero: 50, random: 30, compressible: 20, mixed: 0 };

    #[test]
    fn pages_start_as_the_shares_say() {
        let fill = FILL;
        let mut page = [0; SLOTS];
        let (mut zero, mut random) = (0, 0);
        for number in 0..100_000 {
            fill.write(7, number, &mut page);
            assert_eq!(fill.is_zero(7, number), page == [0; SLOTS]);
            zero += u32::from(page == [0; SLOTS]);
            random += u32::from(page[..8] != page[8..16] && page[3] != 0);
        }
        assert!((46_000..54_000).contains(&zero), "{zero}");
        assert!((26_000..34_000).contains(&random), "{random}");
    }

    #[test]
    fn records_have_fields_of_their_own_and_others() {
        let fill: Fill = "mixed=100".parse().unwrap();
        let mut page = [0; SLOTS];
        fill.write(7, 3, &mut page);
        for (one, next) in page.chunks(8).zip(page[8..].chunks(8)) {
            let differ = (0..8).filter(|field| one[*field] != next[*field]).collect::<Vec<_>>();
            assert_eq!((differ, one[0] >> 48), (vec![0, 5], 0));
        }
    }

    #[test]
    fn shares_must_make_a_hundred() {
        assert_eq!("zero=50,random=30,compressible=20".parse(), Ok(FILL));
        assert_eq!("random=100".parse::<Fill>().map(|fill| fill.random), Ok(100));
        for wrong in ["", "zero", "zero=50", "zero=101", "zero=-1", "noise=100", "zero=50,random=60"] {
            assert!(wrong.parse::<Fill>().is_err(), "{wrong:?}");
        }
    }
}
