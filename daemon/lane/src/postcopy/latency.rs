//! How long something took, many times: a histogram that many threads add to, and the longest time exactly.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use histogram::AtomicHistogram;

/// Buckets for each power of two, as a power of two: each of the 32 is at most 1/32 wider than what it begins with.
const GROUPING_POWER: u8 = 5;
/// All times of 64 bits of nanoseconds have a bucket.
const MAX_VALUE_POWER: u8 = 64;

/// Times by how often they were seen.
#[derive(Debug)]
pub(crate) struct Latencies {
    nanoseconds: AtomicHistogram,
    longest: AtomicU64,
}

impl Default for Latencies {
    fn default() -> Self {
        let nanoseconds =
            AtomicHistogram::new(GROUPING_POWER, MAX_VALUE_POWER).expect("the powers are within bounds");
        Self { nanoseconds, longest: AtomicU64::new(0) }
    }
}

impl Latencies {
    /// Adds one.
    pub(crate) fn add(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.increment(nanoseconds).expect("all of 64 bits have a bucket");
        self.longest.fetch_max(nanoseconds, Ordering::Relaxed);
    }

    /// What this share of all times did not exceed, 3 % at the most above the truth; zero if there
    /// are none.
    ///
    /// # Panics
    ///
    /// If the share is not from 0 to 1.
    pub(crate) fn quantile(&self, share: f64) -> Duration {
        let bucket = self.nanoseconds.load().quantile_bucket(share).expect("a share is from 0 to 1");
        bucket.map_or(Duration::ZERO, |bucket| Duration::from_nanos(bucket.end()).min(self.longest()))
    }

    /// The longest of all.
    pub(crate) fn longest(&self) -> Duration {
        Duration::from_nanos(self.longest.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_quantile_is_little_above_the_time(nanoseconds in any::<u64>()) {
            let latencies = Latencies::default();
            latencies.add(Duration::from_nanos(nanoseconds));
            latencies.add(Duration::MAX);
            let median = latencies.quantile(0.5).as_nanos() as u64;
            prop_assert!(median >= nanoseconds && median - nanoseconds <= nanoseconds / 32, "{median}");
        }
    }

    #[test]
    fn quantiles_are_those_of_what_was_added() {
        let latencies = Latencies::default();
        assert_eq!((latencies.quantile(0.5), latencies.longest()), (Duration::ZERO, Duration::ZERO));
        for microseconds in 1..=1000 {
            latencies.add(Duration::from_micros(microseconds));
        }
        let near = |quantile: Duration, expected: u64| {
            let expected = Duration::from_micros(expected);
            assert!(quantile >= expected && quantile < expected.mul_f64(1.04), "{quantile:?} {expected:?}");
        };
        near(latencies.quantile(0.5), 500);
        near(latencies.quantile(0.99), 990);
        assert_eq!(latencies.longest(), Duration::from_millis(1));
        assert_eq!(latencies.quantile(1.0), Duration::from_millis(1));
    }
}
