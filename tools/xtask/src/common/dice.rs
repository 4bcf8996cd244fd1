//! Numbers that look random, and are the same ones for the same seed.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A generator of random numbers: SplitMix64.
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

/// Returns a seed for who has named none: another one each second.
pub(crate) fn seed_of_clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_secs())
}

impl Dice {
    /// Makes the generator for one round of a run.
    pub(crate) fn of_round(seed: u64, round: u64) -> Self {
        let mut dice = Self(seed);
        // A round's numbers depend on the seed by more than where they begin.
        let start = dice.next() ^ round.wrapping_mul(0xd134_2543_de82_ef95);
        Self(start)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Returns a number that is at least 0 and less than 1.
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Returns true in `percent` of a hundred cases.
    pub(crate) fn percent(&mut self, percent: u32) -> bool {
        self.next() % 100 < u64::from(percent)
    }

    /// Picks one of these values.
    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[(self.next() % from.len() as u64) as usize]
    }

    /// Picks one of these values, each as often as its weight says.
    pub(crate) fn weighed<T: Copy>(&mut self, from: &[(u32, T)]) -> T {
        let all: u64 = from.iter().map(|(weight, _)| u64::from(*weight)).sum();
        let mut left = self.next() % all;
        for (weight, value) in from {
            match left.checked_sub(u64::from(*weight)) {
                None => return *value,
                Some(less) => left = less,
            }
        }
        unreachable!("what is left is less than all weights together")
    }

    /// Picks a time between these two, short ones as often as long ones.
    pub(crate) fn between(&mut self, shortest: Duration, longest: Duration) -> Duration {
        let times = longest.as_secs_f64() / shortest.as_secs_f64();
        shortest.mul_f64(times.powf(self.fraction()))
    }

    /// Picks a time up to this one.
    pub(crate) fn up_to(&mut self, longest: Duration) -> Duration {
        longest.mul_f64(self.fraction())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_the_same_each_time_and_unlike_its_neighbours() {
        let numbers = |seed, round| {
            let mut dice = Dice::of_round(seed, round);
            [dice.next(), dice.next(), dice.next()]
        };
        assert_eq!(numbers(1, 7), numbers(1, 7));
        assert_ne!(numbers(1, 7), numbers(1, 8));
        assert_ne!(numbers(1, 7), numbers(2, 7));
        assert_ne!(numbers(1, 2), numbers(2, 1));
    }

    #[test]
    fn times_and_weights_keep_to_their_bounds() {
        let mut dice = Dice::of_round(3, 0);
        let (shortest, longest) = (Duration::from_micros(100), Duration::from_secs(3));
        let mut seen = [0; 2];
        for _ in 0..1000 {
            let time = dice.between(shortest, longest);
            assert!(time >= shortest && time <= longest, "{time:?}");
            seen[usize::from(time > Duration::from_millis(17))] += 1;
            assert!(dice.up_to(longest) < longest);
            assert_eq!(dice.weighed(&[(0, 'a'), (3, 'b'), (0, 'c')]), 'b');
        }
        // The middle of it, by factors.
        assert!(seen[0] > 400 && seen[1] > 400, "{seen:?}");
    }
}
