//! How long something took, many times: a histogram that many threads add to.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets for each power of two: each is at most 1/32 wider than what it begins with.
const FINE: u64 = 32;
/// Enough for all times of 64 bits of nanoseconds.
const BUCKETS: usize = 64 * FINE as usize;

/// Times by how often they were seen.
#[derive(Debug)]
pub(super) struct Latencies {
    counts: Box<[AtomicU64]>,
    longest: AtomicU64,
}

impl Default for Latencies {
    fn default() -> Self {
        let counts = (0..BUCKETS).map(|_| AtomicU64::new(0)).collect();
        Self { counts, longest: AtomicU64::new(0) }
    }
}

impl Latencies {
    /// Adds one.
    pub(super) fn add(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(nanoseconds)].fetch_add(1, Ordering::Relaxed);
        self.longest.fetch_max(nanoseconds, Ordering::Relaxed);
    }

    /// What this share of all times did not exceed, 3 % at the most above the truth; zero if there
    /// are none.
    pub(super) fn quantile(&self, share: f64) -> Duration {
        let counts: Vec<u64> = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let total: u64 = counts.iter().sum();
        let mut left = (total as f64 * share).ceil() as u64;
        for (bucket, count) in counts.into_iter().enumerate() {
            if count >= left && count > 0 {
                return Duration::from_nanos(end_of(bucket)).min(self.longest());
            }
            left -= count.min(left);
        }
        Duration::ZERO
    }

    /// The longest of all.
    pub(super) fn longest(&self) -> Duration {
        Duration::from_nanos(self.longest.load(Ordering::Relaxed))
    }
}

fn bucket(nanoseconds: u64) -> usize {
    let exponent = nanoseconds.max(1).ilog2();
    match exponent.checked_sub(FINE.ilog2()) {
        None => nanoseconds as usize,
        Some(shift) => ((u64::from(shift) + 1) * FINE + (nanoseconds >> shift) % FINE) as usize,
    }
}

/// The last time that falls into a bucket.
fn end_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    match (bucket / FINE).checked_sub(1) {
        None => bucket,
        Some(shift) => ((FINE + bucket % FINE + 1) << shift).wrapping_sub(1),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_bucket_ends_little_after_each_of_its_times(nanoseconds in any::<u64>()) {
            let end = end_of(bucket(nanoseconds));
            prop_assert!(end >= nanoseconds && end - nanoseconds <= nanoseconds / 32, "{end}");
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
