//! [`FaultAround`] decides how many neighbours are released together with a page whose write fault waits.

use std::time::Duration;

/// A writer whose next write waits within this time after a release does little else but wait. So the cost of the
/// releases limits it, and not the rate.
const SOON: Duration = Duration::from_micros(200);

/// The largest number of pages that are released together, as a power of two. It is 128 KiB, because each page may be
/// sent in vain.
const LARGEST: u32 = 5;

/// The number of pages that are released together.
///
/// The release of one write costs some ten microseconds, and each vCPU a look at its page tables. So a guest whose every
/// write waits writes far less than its rate permits, and its readers are slowed as well. It gets more pages at a time
/// while it stays below its rate, and fewer as soon as it has to wait for the rate. The kernel does the same for read
/// faults of file mappings (fault-around).
#[derive(Debug, Clone, Copy, Default)]
pub struct FaultAround {
    power: u32,
    released: Option<Duration>,
}

impl FaultAround {
    /// Returns how many pages are released together with one whose write begins to wait at `now`. It is a power of two.
    pub fn on_write(&mut self, now: Duration) -> u64 {
        match self.released {
            Some(released) if now.saturating_sub(released) <= SOON => {}
            // The guest does not spend its time on writes.
            _ => self.power = 0,
        }
        1 << self.power
    }

    /// Notes that the pages were released at `now`, after they had to `wait` for the rate.
    pub fn on_release(&mut self, wait: Duration, now: Duration) {
        self.released = Some(now);
        self.power = match wait.is_zero() {
            true => (self.power + 1).min(LARGEST),
            false => self.power.saturating_sub(1),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::throttle::TokenBucket;

    const SECOND: Duration = Duration::from_secs(1);

    /// A writer that waits again `busy` after each of its writes was let go, which takes `cost`;
    /// returns how many pages went in a second, and how many times it waited.
    fn write(rate: u64, busy: Duration, cost: Duration) -> (u64, u64) {
        let (mut fault_around, mut bucket) = (FaultAround::default(), TokenBucket::new(rate, Duration::ZERO));
        let (mut now, mut gone, mut times) = (Duration::ZERO, 0, 0);
        while now < SECOND {
            let pages = fault_around.on_write(now);
            let wait = bucket.take(pages, now);
            now += wait + cost;
            fault_around.on_release(wait, now);
            (gone, times, now) = (gone + pages, times + 1, now + busy);
        }
        (gone, times)
    }

    #[test]
    fn a_writer_that_does_nothing_but_wait_gets_its_rate() {
        for rate in [5_000, 20_000, 60_000, 200_000, 1_000_000] {
            let (gone, _) = write(rate, Duration::from_micros(2), Duration::from_micros(20));
            assert!(gone.abs_diff(rate) < rate / 50, "{gone} of {rate}");
        }
    }

    #[test]
    fn where_the_rate_is_what_it_waits_for_pages_go_one_by_one() {
        let (gone, times) = write(5_000, Duration::from_micros(2), Duration::from_micros(20));
        assert!(gone - times < 100, "{gone} pages in {times} times");
    }

    #[test]
    fn a_writer_that_has_other_things_to_do_gets_no_neighbours() {
        let (gone, times) = write(60_000, Duration::from_millis(1), Duration::from_micros(20));
        assert_eq!(gone, times);
    }
}
