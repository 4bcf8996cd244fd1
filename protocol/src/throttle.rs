//! The throttle of a guest's writes: [`TokenBucket`] bounds how many pages are released per second, and [`FaultAround`]
//! decides how many are released at a time.

mod fault_around;

use std::time::Duration;

pub use fault_around::FaultAround;

/// The burst: after an idle time, as many pages may be released at once as the rate permits in this time.
const BURST: Duration = Duration::from_millis(2);

/// The burst of a caller that had to wait lately and comes later than it was told, because threads wake up late.
const LATENESS: Duration = Duration::from_millis(50);

/// A caller had to wait lately if its wait ended within this time.
const LATELY: Duration = Duration::from_millis(100);

/// A page in the unit of [`TokenBucket::remainder`].
const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// A token bucket. On average it releases no more than its rate, and tells each caller how long to wait.
///
/// It keeps the time at which the next pages may be released (virtual scheduling, as in the generic cell rate algorithm
/// of ITU-T I.371), so it is exact at any rate: nothing is rounded away, and nothing depends on how often it is asked.
/// The pages of one request are released together, however many they are, and the next request waits for all of them.
///
/// The caller has the clock. Times are durations since any fixed moment.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    /// The rate, or `None` if everything is released at once.
    pages_per_second: Option<u64>,
    /// The time when the next pages may be released. It is in the past if fewer were released than the rate permits.
    next: Duration,
    /// The remainder that `next` leaves out, in billionths of a page.
    remainder: u128,
    /// The time when the last wait ended, or was being made up for.
    waited: Option<Duration>,
}

impl TokenBucket {
    /// Returns a bucket that releases `pages_per_second` (at least one), the first of them at `now`.
    pub fn new(pages_per_second: u64, now: Duration) -> Self {
        Self { pages_per_second: Some(pages_per_second.max(1)), next: now, remainder: 0, waited: None }
    }

    /// Sets the rate from `now` on to `pages_per_second` (at least one). Pages that were released ahead of the rate count
    /// at the new rate. A wait that a caller has been told stays as it is.
    pub fn set_rate(&mut self, pages_per_second: u64, now: Duration) {
        let pages_per_second = pages_per_second.max(1);
        match self.pages_per_second.replace(pages_per_second) {
            Some(before) if before == pages_per_second => return,
            Some(before) => {
                let scale = |time: Duration| {
                    nanoseconds(time.as_nanos().saturating_mul(before.into()) / u128::from(pages_per_second))
                };
                self.next = match self.next.checked_sub(now) {
                    Some(owed) => now.saturating_add(scale(owed)),
                    None => now.saturating_sub(scale(now - self.next)),
                };
            }
            None => self.next = now,
        }
        self.remainder = 0;
    }

    /// Releases everything at once until the next [`set_rate`](Self::set_rate).
    pub fn open(&mut self) {
        self.pages_per_second = None;
        self.waited = None;
    }

    /// Takes `pages` out of the bucket for a caller that asks at `now`, and returns how long the caller has to wait before
    /// it releases them. A caller that comes up to 50 ms later than it was told loses nothing, because it waits that much
    /// less the next times.
    pub fn take(&mut self, pages: u64, now: Duration) -> Duration {
        let Some(pages_per_second) = self.pages_per_second else { return Duration::ZERO };

        let lately = self.waited.is_some_and(|waited| now <= waited.saturating_add(LATELY));
        let slack = if lately { LATENESS } else { BURST };
        self.next = self.next.max(now.saturating_sub(slack));
        if self.next > now || now - self.next > BURST {
            self.waited = Some(self.next.max(now));
        }
        let wait = self.next.saturating_sub(now);

        let owed = u128::from(pages) * NANOS_PER_SECOND + self.remainder;
        self.remainder = owed % u128::from(pages_per_second);
        self.next = self.next.saturating_add(nanoseconds(owed / u128::from(pages_per_second)));
        wait
    }
}

/// Returns a duration of `nanos`, or the longest duration in 64 bits (some 584 years) if there are too many.
fn nanoseconds(nanos: u128) -> Duration {
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
