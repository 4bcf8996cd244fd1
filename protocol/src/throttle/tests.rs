use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// Somebody who always has pages to let go, and how late it is after each wait and each piece
/// of work.
struct Saturated<'a> {
    now: Duration,
    pages_each: u64,
    delays: std::iter::Cycle<std::slice::Iter<'a, Duration>>,
}

impl<'a> Saturated<'a> {
    fn new(pages_each: u64, delays: &'a [Duration]) -> Self {
        Self { now: SECOND, pages_each, delays: delays.iter().cycle() }
    }

    /// How many pages have gone at `until`.
    fn run(&mut self, bucket: &mut TokenBucket, until: Duration) -> u64 {
        let mut gone = 0;
        while self.now < until {
            let wait = bucket.take(self.pages_each, self.now);
            let late = if wait.is_zero() { Duration::ZERO } else { *self.delays.next().expect("a cycle") };
            self.now += wait + late;
            gone += self.pages_each;
        }
        gone
    }
}

#[test]
fn the_first_goes_at_once_and_the_others_in_their_time() {
    let mut bucket = TokenBucket::new(1000, SECOND);
    let waits: Vec<_> = (0..4).map(|_| bucket.take(1, SECOND)).collect();
    assert_eq!(waits, [Duration::ZERO, MS, 2 * MS, 3 * MS]);
}

#[test]
fn a_large_page_goes_whole_and_is_paid_for_by_the_next() {
    let mut bucket = TokenBucket::new(5120, SECOND);
    assert_eq!(bucket.take(512, SECOND), Duration::ZERO);
    assert_eq!(bucket.take(1, SECOND), 100 * MS);
}

#[test]
fn a_long_silence_is_worth_two_milliseconds() {
    let mut bucket = TokenBucket::new(1000, SECOND);
    assert_eq!(bucket.take(1, 60 * SECOND), Duration::ZERO);
    let at_once = (1..100).take_while(|_| bucket.take(1, 60 * SECOND).is_zero()).count();
    assert_eq!(at_once, 2);
}

#[test]
fn a_silence_after_a_wait_is_worth_no_more() {
    let mut bucket = TokenBucket::new(1000, SECOND);
    while bucket.take(1, SECOND) < 5 * MS {}
    let at_once = (0..100).take_while(|_| bucket.take(1, 9 * SECOND).is_zero()).count();
    assert_eq!(at_once, 3);
}

#[test]
fn lateness_is_made_up_for() {
    let mut bucket = TokenBucket::new(1000, SECOND);
    assert_eq!(bucket.take(1, SECOND), Duration::ZERO);
    assert_eq!(bucket.take(1, SECOND), MS);
    // It comes back 40 ms late, and is slow for a while.
    let mut now = SECOND + 41 * MS;
    for _ in 0..40 {
        assert_eq!(bucket.take(1, now), Duration::ZERO);
        now += MS / 10;
    }
    let caught_up = (0..10).find(|_| !bucket.take(1, now).is_zero());
    assert_eq!(caught_up, Some(4), "all that came due meanwhile, and no more");
}

#[test]
fn lateness_beyond_all_bounds_is_not() {
    let mut bucket = TokenBucket::new(1000, SECOND);
    while bucket.take(1, SECOND) < MS {}
    let at_once = (0..1000).take_while(|_| bucket.take(1, SECOND + 90 * MS).is_zero()).count();
    assert_eq!(at_once, 51);
}

#[test]
fn an_open_bucket_holds_nobody_up_until_it_gets_a_rate() {
    let mut bucket = TokenBucket::new(1, SECOND);
    assert_eq!(bucket.take(1 << 20, SECOND), Duration::ZERO);
    bucket.open();
    assert!((0..100).all(|_| bucket.take(1 << 20, SECOND).is_zero()));
    bucket.set_rate(10, 2 * SECOND);
    assert_eq!(bucket.take(1, 2 * SECOND), Duration::ZERO);
    assert_eq!(bucket.take(1, 2 * SECOND), 100 * MS);
}

#[test]
fn what_is_owed_is_owed_in_pages() {
    let mut bucket = TokenBucket::new(10, SECOND);
    assert_eq!(bucket.take(100, SECOND), Duration::ZERO); // ten seconds' worth
    bucket.set_rate(1000, SECOND);
    assert_eq!(bucket.take(1, SECOND), 100 * MS);
}

#[test]
fn no_rate_is_one_page_per_second() {
    let mut bucket = TokenBucket::new(0, SECOND);
    assert_eq!((bucket.take(1, SECOND), bucket.take(1, SECOND)), (Duration::ZERO, SECOND));
    bucket.set_rate(0, SECOND);
    assert_eq!(bucket.take(1, SECOND), 2 * SECOND);
}

fn delays() -> impl Strategy<Value = Vec<Duration>> {
    let delay = prop_oneof![Just(0), 0..200_000u64, 0..5_000_000u64, 0..50_000_000u64];
    prop::collection::vec(delay.prop_map(Duration::from_nanos), 1..50)
}

/// A request of which so many are made that it is worth a test, and not more.
fn some_at_once(rate: u64) -> u64 {
    (rate / 2000).max(1)
}

fn rates() -> impl Strategy<Value = u64> {
    prop_oneof![100..1000u64, 1000..100_000u64, 100_000..3_000_000u64]
}

proptest! {
    #[test]
    fn a_long_run_has_the_rate_however_late_its_wake_ups(
        rate in rates(),
        huge in any::<bool>(),
        delays in delays(),
    ) {
        let pages_each = if huge { 512 } else { some_at_once(rate) };
        let mut bucket = TokenBucket::new(rate, SECOND);
        let mut caller = Saturated::new(pages_each, &delays);
        // So long that what goes at the beginning and comes late at the end counts little.
        let span = (30 * SECOND).max(Duration::from_secs_f64(1000.0 * pages_each as f64 / rate as f64));
        let gone = caller.run(&mut bucket, SECOND + span);
        let expected = rate as f64 * (caller.now - SECOND).as_secs_f64();
        let off = gone as f64 / expected - 1.0;
        prop_assert!(off.abs() < 0.003, "{off:+.5}: {gone} instead of {expected:.0}");
    }

    #[test]
    fn never_more_than_the_rate_and_a_burst(
        rate in rates(),
        steps in prop::collection::vec((0..200_000_000u64, 1..600u64), 1..300),
    ) {
        let mut bucket = TokenBucket::new(rate, SECOND);
        let mut now = SECOND;
        // When pages went, and how many.
        let mut gone: Vec<(Duration, u64)> = Vec::new();
        for (idle, pages) in steps {
            now += Duration::from_nanos(idle);
            let wait = bucket.take(pages, now);
            gone.push((now + wait, pages));
        }
        for from in 0..gone.len() {
            let mut sum = 0;
            for &(at, pages) in &gone[from..] {
                // The last request goes whole.
                let allowed = rate as f64 * (at - gone[from].0 + LATENESS).as_secs_f64();
                prop_assert!(sum as f64 <= allowed + 1.0, "{sum} pages where {allowed} may go");
                sum += pages;
            }
        }
    }

    #[test]
    fn changes_of_the_rate_are_followed(
        rates in prop::collection::vec(50_000..1_000_000u64, 2..20),
        delays in delays(),
    ) {
        let mut bucket = TokenBucket::new(rates[0], SECOND);
        let mut caller = Saturated::new(some_at_once(1_000_000), &delays);
        let (mut gone, mut expected) = (0, 0.0);
        for rate in rates {
            let from = caller.now;
            bucket.set_rate(rate, from);
            gone += caller.run(&mut bucket, from + 10 * SECOND);
            expected += rate as f64 * (caller.now - from).as_secs_f64();
        }
        let off = gone as f64 / expected - 1.0;
        prop_assert!(off.abs() < 0.01, "{off:+.5}: {gone} instead of {expected:.0}");
    }

    #[test]
    fn whatever_it_is_told_it_answers(calls in prop::collection::vec((any::<u8>(), any::<u64>(), any::<u64>()), 1..100)) {
        let mut bucket = TokenBucket::new(1, Duration::ZERO);
        for (call, amount, time) in calls {
            let now = if call < 128 { Duration::from_nanos(time) } else { Duration::from_secs(time) };
            match call % 8 {
                0 => bucket.open(),
                1 | 2 => bucket.set_rate(amount, now),
                _ => {
                    bucket.take(amount, now);
                }
            }
        }
    }
}
