//! [`Bucket`]: a bound on how many pages go per second, and [`Reach`]: how many at a time.

mod reach;

use std::time::Duration;

pub use reach::Reach;

/// What may go at once although nothing went for a while, as time at the rate.
const BURST: Duration = Duration::from_millis(2);

/// The same for a caller that was made to wait lately and comes later than it was told, as
/// threads wake up late: what it may make up for.
const LATENESS: Duration = Duration::from_millis(50);

/// A caller was made to wait lately if that wait ended within this.
const LATELY: Duration = Duration::from_millis(100);

/// A page in the unit of [`Bucket::remainder`].
const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// A token bucket: on average so many pages go per second and no more, and whoever wants to
/// let pages go is told how long to wait.
///
/// It is kept as the time at which the next pages may go (virtual scheduling, as in the generic
/// cell rate algorithm of ITU-T I.371), so it is exact at any rate: nothing is rounded away, and
/// nothing depends on how often it is asked. Pages of one request go together, however many
/// they are, and the next request waits for all of them.
///
/// The clock is the caller's: durations since any one moment.
#[derive(Debug, Clone)]
pub struct Bucket {
    /// None: open.
    pages_per_second: Option<u64>,
    /// When the next pages may go; in the past if fewer went than might have.
    next: Duration,
    /// What `next` leaves out, in billionths of a page.
    remainder: u128,
    /// When the last wait ended, or was being made up for.
    waited: Option<Duration>,
}

impl Bucket {
    /// Lets `pages_per_second` go, one at least, the first of them `now`.
    pub fn new(pages_per_second: u64, now: Duration) -> Self {
        Self { pages_per_second: Some(pages_per_second.max(1)), next: now, remainder: 0, waited: None }
    }

    /// Lets `pages_per_second` go from `now` on, one at least. Pages that have been let go and
    /// are not paid for yet are paid for at the new rate; a wait that a caller has been told
    /// stays as it is.
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

    /// Lets everything go at once, until the next [`set_rate`](Self::set_rate).
    pub fn open(&mut self) {
        self.pages_per_second = None;
        self.waited = None;
    }

    /// Reserves the passage of `pages` pages for a caller that asks `now`, and tells how long it
    /// has to wait before it lets them go. A caller that comes up to 50 ms later than it was told
    /// has lost nothing: that much less it waits the next times.
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

/// The longest there is, some 584 years, if there are too many.
fn nanoseconds(nanos: u128) -> Duration {
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
