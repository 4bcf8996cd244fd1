//! [`Window`] decides how much a lane may have in flight.
//!
//! With too little in flight, the line runs empty before acknowledgements return. With too much, a slow port holds pages
//! for a long time that others could have sent, and for which the end of an iteration or of the pause has to wait. The
//! right amount follows from what the lane delivers and from the round trip, which are only known by measuring. Towards
//! the end it also follows from [what is left](hold).

use std::collections::VecDeque;
use std::time::Duration;

/// The smallest window that a lane begins with.
const FIRST_BYTES: u64 = 1 << 20;
/// On a long path, a lane begins with the window that this rate in bytes per second needs there. So it does not limit
/// TCP, which begins slowly itself and never becomes faster for a sender that sends little.
const FIRST_RATE: f64 = 64e6;
/// The largest window that a lane begins with, because a slow port would hold more for a long time.
const MOST_FIRST_BYTES: u64 = 16 << 20;
/// The smallest window of a lane that has been measured.
const LEAST_BYTES: u64 = 512 << 10;
/// The largest window of a lane.
const MOST_BYTES: u64 = 64 << 20;
/// On a short path, where a round trip takes no time, a lane has in flight what it delivers in this time.
const HOLD: Duration = Duration::from_millis(30);
/// On a short path, a lane has no more in flight than this, which keeps a processor busy that wakes up late.
const MOST_HELD_BYTES: u64 = 4 << 20;
/// Where little is left, a lane still has in flight what it delivers in this time, because waiting for a processor takes
/// as long.
const LEAST_HOLD: Duration = Duration::from_millis(4);
/// On a long path, a lane has in flight what it delivers in this many round trips. It is twice as much as the line
/// holds, so that the next measurement shows whether it could be more.
const ROUND_TRIPS: f64 = 2.0;
/// The shortest time over which a rate is measured, because acknowledgements come in bursts.
const SAMPLE: Duration = Duration::from_millis(20);
/// The number of measurements of which the best one counts.
const SAMPLES: usize = 8;

/// The size of a small frame in bytes.
const LEAST_FRAME_BYTES: u64 = 64 << 10;
/// A lane has at least two small frames in flight, however slow it is.
const LEAST_HELD_BYTES: u64 = 2 * LEAST_FRAME_BYTES;
/// A window has room for this many frames.
const FRAMES: u64 = 4;
/// The smallest limit for the number of frames in flight. There is a limit because each takes memory at both ends.
const LEAST_FRAMES: usize = 64;

/// Returns how much each lane may have in flight, as the time in which it delivers that. All lanes together deliver
/// `bytes_per_second`, and `left_bytes` are not claimed yet.
///
/// It is half of the time that the rest takes. Otherwise one lane would claim all that is left at the end, while the
/// others have nothing to do. So lanes of any speed finish at about the same time.
pub fn hold(left_bytes: u64, bytes_per_second: u64) -> Duration {
    match bytes_per_second {
        0 => HOLD,
        rate => Duration::from_secs_f64(left_bytes as f64 / rate as f64 / 2.0).clamp(LEAST_HOLD, HOLD),
    }
}

/// The state of a lane when something was acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The number of bytes of pages that were acknowledged so far.
    pub acked_bytes: u64,
    /// The shortest round trip of the recent past.
    pub round_trip: Duration,
    /// Whether a larger window would have let the lane send more since the last observation.
    pub full: bool,
}

/// The window of one lane: how much it may have in flight.
#[derive(Clone, Debug)]
pub struct Window {
    bytes: u64,
    /// The part of the window that a long path needs.
    on_the_line: u64,
    /// The first window, which is the smallest until the lane has been measured for a while.
    first: u64,
    /// The measured rates in bytes per second, newest last.
    rates: VecDeque<f64>,
    sample: Option<Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    since: Duration,
    acked_bytes: u64,
    full: bool,
}

impl Window {
    /// Returns the window of a lane that has sent nothing yet and has this round trip.
    pub fn new(round_trip: Duration) -> Self {
        let first = on_the_line(FIRST_RATE, round_trip).clamp(FIRST_BYTES, MOST_FIRST_BYTES);
        Self { bytes: first, on_the_line: 0, first, rates: VecDeque::new(), sample: None }
    }

    /// Returns how many bytes of pages may be in flight.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns how many bytes of pages may be in flight if the lane may [hold] no more than it delivers in this time.
    pub fn bytes_held(&self, hold: Duration) -> u64 {
        if hold >= HOLD || self.rates.is_empty() {
            return self.bytes;
        }
        delivered_in(self.best(), hold).max(self.on_the_line).max(LEAST_HELD_BYTES).min(self.bytes)
    }

    /// Returns the bytes per second that the lane delivers at its best, or 0 before that was measured.
    pub fn bytes_per_second(&self) -> u64 {
        self.best() as u64
    }

    /// Returns how many frames may be in flight.
    pub fn frames(&self) -> usize {
        ((self.bytes / LEAST_FRAME_BYTES) as usize).max(LEAST_FRAMES)
    }

    /// Returns how many bytes of pages one frame may have if the lane may [hold] no more than it delivers in this time.
    pub fn frame_bytes(&self, hold: Duration) -> u64 {
        (self.bytes_held(hold) / FRAMES).max(LEAST_FRAME_BYTES)
    }

    /// Notes that nothing is in flight and nothing is to be sent. The next measurement begins with what is sent next.
    pub fn rest(&mut self) {
        self.sample = None;
    }

    /// Takes the state of the lane at `now`, a time since any fixed moment.
    pub fn observe(&mut self, now: Duration, flow: &Flow) {
        let Flow { acked_bytes, round_trip, full } = *flow;
        let sample = self.sample.get_or_insert(Sample { since: now, acked_bytes, full: false });
        sample.full |= full;
        let took = now.saturating_sub(sample.since);
        if took < SAMPLE.max(round_trip) {
            return;
        }
        let rate = acked_bytes.saturating_sub(sample.acked_bytes) as f64 / took.as_secs_f64();
        // A lane that did not fill its window says only that the line carries as much, or more.
        let full = sample.full;
        if full || rate > self.best() {
            if self.rates.len() == SAMPLES {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        self.sample = Some(Sample { since: now, acked_bytes, full: false });
        self.on_the_line = on_the_line(self.best(), round_trip);
        let bytes = self.right_size();
        self.bytes = if full { bytes } else { bytes.max(self.bytes) };
    }

    fn best(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    fn right_size(&self) -> u64 {
        let held = delivered_in(self.best(), HOLD).min(MOST_HELD_BYTES);
        let least = if self.rates.len() < SAMPLES { self.first } else { LEAST_BYTES };
        held.max(self.on_the_line).clamp(least, MOST_BYTES)
    }
}

fn delivered_in(bytes_per_second: f64, time: Duration) -> u64 {
    (bytes_per_second * time.as_secs_f64()) as u64
}

fn on_the_line(rate: f64, round_trip: Duration) -> u64 {
    delivered_in(ROUND_TRIPS * rate, round_trip)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A line that carries `rate` bytes a second with a round trip of `round_trip`, and a lane that has more to
    /// send all the `time`; returns when that is over.
    fn settle(
        window: &mut Window,
        start: Duration,
        rate: f64,
        round_trip: Duration,
        time: Duration,
    ) -> Duration {
        let step = Duration::from_millis(5);
        let (mut now, mut acked) = (start, 0.0);
        while now < start + time {
            now += step;
            // What was acknowledged is the window of a round trip ago, or what the line carried.
            let of_window = window.bytes() as f64 / round_trip.max(Duration::from_micros(100)).as_secs_f64();
            acked += rate.min(of_window) * step.as_secs_f64();
            window.observe(now, &Flow { acked_bytes: acked as u64, round_trip, full: true });
        }
        window.rest();
        now
    }

    fn settled(rate: f64, round_trip: Duration) -> Window {
        let mut window = Window::new(MS);
        settle(&mut window, Duration::ZERO, rate, round_trip, Duration::from_secs(10));
        window
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_long_line_is_filled_after_a_few_round_trips() {
        let mut window = Window::new(MS);
        settle(&mut window, Duration::ZERO, 125e6, 150 * MS, 1200 * MS);
        assert!(window.bytes() as f64 > 1.9 * 125e6 * 0.15, "{}", window.bytes());
        assert_eq!(window.frame_bytes(HOLD), window.bytes() / 4);
    }

    #[test]
    fn a_long_line_is_not_held_up_while_tcp_begins() {
        let mut window = Window::new(150 * MS);
        let (mut rate, mut acked, mut now) = (0.6e6, 0.0, Duration::ZERO);
        while rate < 125e6 {
            assert!(window.bytes() as f64 >= MOST_FIRST_BYTES as f64, "{} at {rate} B/s", window.bytes());
            now += 150 * MS;
            acked += rate * 0.15;
            window.observe(now, &Flow { acked_bytes: acked as u64, round_trip: 150 * MS, full: false });
            rate *= 2.0;
        }
        assert_eq!(Window::new(MS).bytes(), FIRST_BYTES);
    }

    #[test]
    fn a_short_line_has_what_it_had_and_a_slow_one_less() {
        assert_eq!(settled(3e9, MS / 10).bytes(), MOST_HELD_BYTES);
        assert_eq!(settled(125e6, MS / 10).bytes(), 125_000_000 * 3 / 100);
        let slow = settled(1.25e6, MS);
        assert_eq!(
            (slow.bytes(), slow.frame_bytes(HOLD), slow.frames()),
            (LEAST_BYTES, 128 << 10, LEAST_FRAMES)
        );
    }

    #[test]
    fn where_little_is_left_lanes_hold_what_they_deliver_in_the_same_time() {
        let (fast, slow) = (settled(125e6, MS / 10), settled(12.5e6, MS / 10));
        let rate = fast.bytes_per_second() + slow.bytes_per_second();
        assert!(rate.abs_diff(137_500_000) < 2_000_000, "{rate}");
        let held = |left| [&fast, &slow].map(|window| window.bytes_held(hold(left, rate)));
        assert_eq!(held(1 << 30), [fast.bytes(), slow.bytes()]);
        // 20 ms for both, of which they may hold 10.
        let [of_fast, of_slow] = held(2_750_000);
        assert!(of_fast.abs_diff(1_250_000) < 25_000, "{of_fast}");
        assert_eq!(of_slow, LEAST_HELD_BYTES, "which it delivers in these 10 ms, or nearly");
        assert_eq!(fast.frame_bytes(hold(2_750_000, rate)), of_fast / 4);
        // There is always room for something, and enough for a processor that comes late.
        assert_eq!(held(0), [(fast.bytes_per_second() as f64 * 0.004) as u64, LEAST_HELD_BYTES]);
    }

    #[test]
    fn a_long_line_is_full_to_the_end() {
        let window = settled(125e6, 150 * MS);
        assert_eq!(window.bytes_held(LEAST_HOLD), window.bytes());
        assert_eq!(Window::new(MS).bytes_held(LEAST_HOLD), FIRST_BYTES, "nothing is known yet");
        assert_eq!(hold(0, 0), HOLD);
    }

    #[test]
    fn who_has_nothing_to_send_keeps_the_window() {
        let mut window = settled(125e6, 150 * MS);
        let before = window.bytes();
        for tick in 0..1000 {
            // A few pages now and then, and nothing in between.
            let flow = Flow { acked_bytes: tick * 4096, round_trip: 150 * MS, full: false };
            window.observe(Duration::from_secs(20) + 50 * MS * tick as u32, &flow);
            if tick % 7 == 0 {
                window.rest();
            }
        }
        assert_eq!(window.bytes(), before);
    }

    #[test]
    fn zeros_are_no_measure_of_a_line() {
        let mut window = Window::new(MS);
        for tick in 0..100 {
            window.observe(50 * MS * tick, &Flow { acked_bytes: 0, round_trip: MS, full: false });
        }
        assert_eq!(window.bytes(), FIRST_BYTES);
    }

    #[test]
    fn time_without_anything_to_send_does_not_count() {
        let mut window = settled(125e6, MS / 10);
        let before = window.bytes();
        for second in 1..20 {
            // Two full windows, one after the other, and then nothing.
            for (at, acked_bytes) in [(Duration::ZERO, 0), (30 * MS, before)] {
                let flow =
                    Flow { acked_bytes: second * before + acked_bytes, round_trip: MS / 10, full: true };
                window.observe(Duration::from_secs(20 + second) + at, &flow);
            }
            window.rest();
        }
        assert!(window.bytes().abs_diff(before) < before / 20, "{} instead of {before}", window.bytes());
    }

    #[test]
    fn it_follows_a_line_that_becomes_slower_or_faster() {
        let mut window = Window::new(MS);
        let mut now = Duration::ZERO;
        for (rate, expected) in [(125e6, 37_500_000), (12.5e6, 3_750_000), (50e6, 15_000_000)] {
            now = settle(&mut window, now, rate, 150 * MS, Duration::from_secs(5));
            let bytes = window.bytes();
            assert!(bytes.abs_diff(expected) < expected / 20, "{bytes} where {expected} is right");
        }
    }

    proptest! {
        #[test]
        fn it_stays_within_bounds(
            flows in prop::collection::vec(any::<(u32, u64, u32, bool, bool)>(), 0..60),
        ) {
            let (mut window, mut now) = (Window::new(MS), Duration::ZERO);
            for (passed, acked_bytes, round_trip, full, rests) in flows {
                now += Duration::from_micros(passed.into());
                let round_trip = Duration::from_nanos(round_trip.into());
                window.observe(now, &Flow { acked_bytes, round_trip, full });
                if rests {
                    window.rest();
                }
                prop_assert!((LEAST_BYTES..=MOST_BYTES).contains(&window.bytes()));
                prop_assert!(window.frame_bytes(HOLD) >= LEAST_FRAME_BYTES && window.frames() >= LEAST_FRAMES);
                prop_assert!(window.frames() <= 1024);
                let held = window.bytes_held(hold(acked_bytes, round_trip.as_nanos() as u64));
                prop_assert!((LEAST_HELD_BYTES..=window.bytes()).contains(&held));
            }
        }

        #[test]
        fn it_holds_what_the_line_does(rate in 1e6f64..1e9, round_trip in 0u64..200) {
            let window = settled(rate, Duration::from_millis(round_trip));
            let line = rate * round_trip as f64 / 1e3;
            prop_assert!(window.bytes() as f64 >= line.min(MOST_BYTES as f64) * 0.99);
            let most = (2.1 * line).max(rate * 0.031).max(LEAST_BYTES as f64);
            prop_assert!(window.bytes() as f64 <= most, "{} > {most}", window.bytes());
        }
    }
}
