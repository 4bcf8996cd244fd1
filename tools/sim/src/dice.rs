//! The dice: everything that is random in a run comes from here, and follows from its seed.

use std::time::Duration;

use oorandom::Rand64;

/// A seeded source of random numbers. It gives the same ones for the same seed on every machine, for all time.
#[derive(Debug)]
pub(crate) struct Dice(Rand64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Rand64::new(seed.into()))
    }

    /// Returns a number below `end`, which is not zero.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0.rand_range(0..end)
    }

    /// Returns a number from `first` up to and including `last`.
    pub(crate) fn between(&mut self, first: u64, last: u64) -> u64 {
        self.0.rand_range(first..last + 1)
    }

    /// Returns a number from `first` to `last`, where each power of two is as likely as any other.
    pub(crate) fn scale(&mut self, first: u64, last: u64) -> u64 {
        let powers = (last / first).max(1).ilog2();
        let from = first << self.below(u64::from(powers) + 1);
        self.between(from, (2 * from).min(last).max(from))
    }

    /// Tells yes in so many cases of a thousand.
    pub(crate) fn permille(&mut self, cases: u64) -> bool {
        self.below(1000) < cases
    }

    /// Returns a time between two others.
    pub(crate) fn time(&mut self, least: Duration, most: Duration) -> Duration {
        Duration::from_nanos(self.between(least.as_nanos() as u64, most.as_nanos() as u64))
    }

    /// Returns a time as [`scale`](Self::scale) returns a number.
    pub(crate) fn scaled_time(&mut self, least: Duration, most: Duration) -> Duration {
        Duration::from_nanos(self.scale(least.as_nanos() as u64, most.as_nanos() as u64))
    }

    /// Returns a time that is up to `percent` longer or shorter than `time`.
    pub(crate) fn about(&mut self, time: Duration, percent: u64) -> Duration {
        let nanos = time.as_nanos() as u64;
        let most = nanos / 100 * percent;
        Duration::from_nanos(self.between(nanos - most, nanos + most))
    }

    /// Returns one of several, which are not none.
    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}
