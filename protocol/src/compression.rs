//! [`Compression`] decides whether a lane compresses what it sends.
//!
//! Compression costs processor time, so a lane compresses only while its wire limits it and its thread sleeps, and only
//! what becomes much smaller. The decision is based on measurements: how long the thread ran or waited for a processor,
//! how much the wire took, how fast compression is, and how small a few pages of each frame become.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The shortest time over which a lane is measured.
const PERIOD: Duration = Duration::from_millis(100);
/// The wire limits a lane whose thread slept for this share of the time although it had more to send.
const ASLEEP: f64 = 0.5;
/// No processor is free for a thread that does not compress yet, and waits for one for this share of the time.
const CROWDED: f64 = 0.25;
/// No processor is free for a thread that compresses, and waits for one for this share of the time.
const CROWDED_OUT: f64 = 0.5;
/// Compression must be this many times as fast as the wire, and must make a frame this many times smaller.
const WORTH: f64 = 1.25;
/// The time over which it is checked whether a lane that compresses delivers more than its wire took without compression.
const JUDGED_OVER: Duration = Duration::from_secs(1);
/// The interval after which a lane stops compressing for a [`PERIOD`], to learn what the wire takes now.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// The speed of compression in bytes per second that is assumed before it was measured.
const EXPECTED_SPEED: f64 = 500e6;
/// A frame with fewer bytes of pages is never compressed.
const LEAST_BYTES: u64 = 16 << 10;
/// The largest number of frames that are skipped after one that would not become smaller.
const MOST_PASSED_OVER: u32 = 63;
/// The first time for which a lane does not compress after there was no processor for it. It doubles each time.
const FIRST_REST: Duration = Duration::from_millis(250);
/// The longest time for which a lane does not compress. A lane that compressed well for as long begins again with the
/// first.
const LONGEST_REST: Duration = Duration::from_secs(30);

/// What an order says about compression.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// A lane compresses if its wire limits it and compression is worth it.
    #[default]
    Auto,
    /// No lane compresses.
    Off,
}

/// A word does not name a [`Mode`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no way to compress: use `auto` or `off`")]
pub struct UnknownMode(pub String);

/// What a lane and its thread have done since they began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// The number of bytes of payload that were acknowledged.
    pub wire_bytes: u64,
    /// The number of bytes of the pages that this payload brought.
    pub contents_bytes: u64,
    /// The time for which the thread ran.
    pub ran: Duration,
    /// The time for which the thread waited for a processor.
    pub crowded: Duration,
}

/// The decisions for one lane.
#[derive(Clone, Debug)]
pub struct Compression {
    measured: Option<(Duration, Load)>,
    /// The time since which the lane compresses, if it does.
    since: Option<Duration>,
    /// Whether the lane does not compress for a moment, to measure the wire.
    looking: bool,
    /// The time of the next such measurement.
    next_look: Duration,
    /// The time since which delivery is checked, and the bytes of pages that were delivered by then.
    judged: Option<(Duration, u64)>,
    /// The bytes per second that the wire took when it limited the lane.
    wire: f64,
    /// The bytes of pages that were compressed since the last measurement, and the time that it took.
    compressed: (u64, Duration),
    /// The lane does not compress before this time.
    not_before: Duration,
    /// The next time for which the lane does not compress.
    rest: Duration,
    /// The number of frames that are still to be skipped.
    pass_over: u32,
    /// The number of frames that are skipped after the next one that would not become smaller.
    poor: u32,
}

impl Default for Compression {
    fn default() -> Self {
        Self {
            measured: None,
            since: None,
            looking: false,
            next_look: Duration::ZERO,
            judged: None,
            wire: 0.0,
            compressed: (0, Duration::ZERO),
            not_before: Duration::ZERO,
            rest: FIRST_REST,
            pass_over: 0,
            poor: 0,
        }
    }
}

impl Compression {
    /// Notes that the lane had nothing to send, so that the measurement begins anew.
    pub fn idle(&mut self) {
        (self.measured, self.judged) = (None, None);
    }

    /// Tells whether enough time has passed at `now`, a time since any fixed moment, to [observe](Self::observe).
    pub fn is_due(&self, now: Duration) -> bool {
        self.measured.is_none_or(|(since, _)| now.saturating_sub(since) >= PERIOD)
    }

    /// Takes what the lane has done until `now`, a time since any fixed moment.
    pub fn observe(&mut self, now: Duration, load: Load) {
        let Some((before, past)) = self.measured.replace((now, load)) else { return };
        let seconds = now.saturating_sub(before).as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        let share = |now: Duration, past: Duration| now.saturating_sub(past).as_secs_f64() / seconds;
        let crowded = share(load.crowded, past.crowded);
        let held_up = 1.0 - share(load.ran, past.ran) - crowded >= ASLEEP;
        if held_up {
            self.wire = load.wire_bytes.saturating_sub(past.wire_bytes) as f64 / seconds;
        }
        let speed = match std::mem::take(&mut self.compressed) {
            (_, Duration::ZERO) => EXPECTED_SPEED,
            (bytes, took) => bytes as f64 / took.as_secs_f64(),
        };
        let worth_it = held_up && crowded <= CROWDED && speed >= WORTH * self.wire;
        let compressing = self.since;
        match compressing {
            Some(since) if std::mem::take(&mut self.looking) => {
                (self.next_look, self.judged) = (now + LOOK_AGAIN, None);
                if !worth_it {
                    self.leave(since, now);
                }
            }
            // Acknowledgements come in bursts: what is just as fast as the wire may be faster.
            Some(since) if crowded > CROWDED_OUT || speed < self.wire || self.falls_behind(now, &load) => {
                self.leave(since, now);
            }
            Some(_) => self.looking = now >= self.next_look,
            None if worth_it && now >= self.not_before => {
                (self.since, self.next_look, self.judged) = (Some(now), now + LOOK_AGAIN, None);
            }
            None => {}
        }
    }

    /// Tells whether the lane delivers less than it did without compression, including all costs.
    fn falls_behind(&mut self, now: Duration, load: &Load) -> bool {
        let (from, contents_bytes) = *self.judged.get_or_insert((now, load.contents_bytes));
        let took = now.saturating_sub(from);
        if took < JUDGED_OVER {
            return false;
        }
        self.judged = Some((now, load.contents_bytes));
        (load.contents_bytes.saturating_sub(contents_bytes) as f64) < self.wire * took.as_secs_f64()
    }

    /// Tells whether to compress a few pages of a frame with this many bytes of pages, as a sample.
    pub fn wants_sample(&mut self, bytes: u64) -> bool {
        if self.since.is_none() || self.looking || bytes < LEAST_BYTES {
            return false;
        }
        let passed_over = self.pass_over > 0;
        self.pass_over = self.pass_over.saturating_sub(1);
        !passed_over
    }

    /// Takes a sample of a frame, of which `bytes` became `compressed` bytes. Returns whether to compress the whole frame.
    pub fn judge_sample(&mut self, bytes: u64, compressed: u64) -> bool {
        self.judge(bytes, compressed)
    }

    /// Takes a frame of which `bytes` became `compressed` bytes in the time that it `took`. Returns whether to send it
    /// compressed.
    pub fn judge_frame(&mut self, bytes: u64, compressed: u64, took: Duration) -> bool {
        self.compressed.0 += bytes;
        self.compressed.1 += took;
        self.judge(bytes, compressed)
    }

    fn judge(&mut self, bytes: u64, compressed: u64) -> bool {
        let worth = bytes as f64 >= WORTH * compressed as f64;
        self.poor = if worth { 0 } else { (2 * self.poor + 1).min(MOST_PASSED_OVER) };
        self.pass_over = self.poor;
        worth
    }

    fn leave(&mut self, since: Duration, now: Duration) {
        if now.saturating_sub(since) >= LONGEST_REST {
            self.rest = FIRST_REST;
        }
        (self.since, self.not_before) = (None, now + self.rest);
        self.rest = (2 * self.rest).min(LONGEST_REST);
    }
}

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        [Self::Auto, Self::Off]
            .into_iter()
            .find(|mode| mode.to_string() == text)
            .ok_or_else(|| UnknownMode(text.to_owned()))
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::Off => "off",
        })
    }
}

#[cfg(test)]
mod tests;
