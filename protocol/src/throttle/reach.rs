//! [`Reach`]: how many neighbours go along with a page whose write is let go.

use std::time::Duration;

/// A writer whose next write waits so soon after it was let go does little else but wait: letting
/// go, and not the rate, is what holds it up.
const SOON: Duration = Duration::from_micros(200);

/// Most pages that go together, as a power of two: 128 KiB. Each may be sent in vain.
const LARGEST: u32 = 5;

/// Pages that are let go together.
///
/// Letting one write go costs some ten microseconds, and each vCPU a look at its page tables. So a
/// guest whose every write waits writes far less than it may, and its readers are held up too. It
/// gets more pages at a time while it uses up less than its rate, and fewer as soon as it has to
/// wait for that.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reach {
    power: u32,
    released: Option<Duration>,
}

impl Reach {
    /// How many pages go together with one whose write begins to wait `now`: a power of two.
    pub fn on_write(&mut self, now: Duration) -> u64 {
        match self.released {
            Some(released) if now.saturating_sub(released) <= SOON => {}
            // Writes are not what it spends its time on.
            _ => self.power = 0,
        }
        1 << self.power
    }

    /// They have been let go, after they were made to `wait` for their rate.
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
    use crate::throttle::Bucket;

    const SECOND: Duration = Duration::from_secs(1);

    /// A writer that waits again `busy` after each of its writes was let go, which takes `cost`;
    /// returns how many pages went in a second, and how many times it waited.
    fn write(rate: u64, busy: Duration, cost: Duration) -> (u64, u64) {
        let (mut reach, mut bucket) = (Reach::default(), Bucket::new(rate, Duration::ZERO));
        let (mut now, mut gone, mut times) = (Duration::ZERO, 0, 0);
        while now < SECOND {
            let pages = reach.on_write(now);
            let wait = bucket.take(pages, now);
            now += wait + cost;
            reach.on_release(wait, now);
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
