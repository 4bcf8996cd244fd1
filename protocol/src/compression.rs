//! [`Compression`]: whether a lane compresses what it sends.
//!
//! It costs a processor, so it is done only where a lane is held up by its wire while its thread sleeps, and
//! only for what becomes much smaller. What tells is measured: how long the thread ran, or waited for a
//! processor, what the wire took, how fast compressing goes, and what a few pages of each frame become.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Shortest time over which a lane is measured.
const PERIOD: Duration = Duration::from_millis(100);
/// A lane is held up by its wire if its thread slept for this share of the time, although it had more to send.
const ASLEEP: f64 = 0.5;
/// No processor is free for a thread that waits for one for this share of the time: before it compresses,
const CROWDED: f64 = 0.25;
/// and when it does.
const CROWDED_OUT: f64 = 0.5;
/// How many times as fast as the wire compressing must be, and how many times as long what is not compressed.
const WORTH: f64 = 1.25;
/// Over so long it is seen whether a lane that compresses gets more across than its wire took without,
const JUDGED_OVER: Duration = Duration::from_secs(1);
/// and so often it does not compress for a [`PERIOD`], to learn what the wire takes by now.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// Bytes per second that are expected of a compressor of which nothing is known.
const EXPECTED_SPEED: f64 = 500e6;
/// Frames with fewer bytes of contents are sent as they are.
const LEAST_BYTES: u64 = 16 << 10;
/// Frames that are passed over at most after one that would not become smaller.
const MOST_PASSED_OVER: u32 = 63;
/// How long a lane leaves compressing alone when there was no processor for it,
const FIRST_REST: Duration = Duration::from_millis(250);
/// which doubles up to this, unless it went well for as long in between.
const LONGEST_REST: Duration = Duration::from_secs(30);

/// What an order says of compression.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Where a lane is held up by its wire, and it is worth it.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// A word that names no [`Mode`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no way to compress: use `auto` or `off`")]
pub struct UnknownMode(pub String);

/// What a lane and its thread have done so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Bytes of payload that were acknowledged,
    pub wire_bytes: u64,
    /// and those of the pages that they brought.
    pub contents_bytes: u64,
    /// Time for which the thread ran,
    pub ran: Duration,
    /// and for which it could have, had a processor been free.
    pub crowded: Duration,
}

/// Decides for one lane.
#[derive(Clone, Debug)]
pub struct Compression {
    measured: Option<(Duration, Load)>,
    /// Compressing since then.
    since: Option<Duration>,
    /// Not compressing for a moment, to see how the wire does.
    looking: bool,
    /// When to look next.
    next_look: Duration,
    /// From when on it is seen what gets across, and what had by then.
    judged: Option<(Duration, u64)>,
    /// Bytes per second that the wire took when it held the lane up.
    wire: f64,
    /// Bytes of contents that were compressed since the lane was measured, and the time that it took.
    compressed: (u64, Duration),
    /// Not before this moment,
    not_before: Duration,
    /// and so long the next time.
    rest: Duration,
    /// Frames that are passed over yet,
    pass_over: u32,
    /// and how many after the next one that would not become smaller.
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
    /// The lane had nothing to send: what is measured begins anew.
    pub fn idle(&mut self) {
        (self.measured, self.judged) = (None, None);
    }

    /// Whether enough time has passed at `now`, a time since any fixed moment, to [observe](Self::observe).
    pub fn is_due(&self, now: Duration) -> bool {
        self.measured.is_none_or(|(since, _)| now.saturating_sub(since) >= PERIOD)
    }

    /// Takes in what the lane has done until `now`.
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

    /// Whether less gets across than did without compressing, everything included that it takes.
    fn falls_behind(&mut self, now: Duration, load: &Load) -> bool {
        let (from, contents_bytes) = *self.judged.get_or_insert((now, load.contents_bytes));
        let took = now.saturating_sub(from);
        if took < JUDGED_OVER {
            return false;
        }
        self.judged = Some((now, load.contents_bytes));
        (load.contents_bytes.saturating_sub(contents_bytes) as f64) < self.wire * took.as_secs_f64()
    }

    /// Whether to look at what a few pages of a frame with so many bytes of contents would become.
    pub fn wants_sample(&mut self, bytes: u64) -> bool {
        if self.since.is_none() || self.looking || bytes < LEAST_BYTES {
            return false;
        }
        let passed_over = self.pass_over > 0;
        self.pass_over = self.pass_over.saturating_sub(1);
        !passed_over
    }

    /// So many bytes of a frame would become so many: whether to compress all of it.
    pub fn judge_sample(&mut self, bytes: u64, compressed: u64) -> bool {
        self.judge(bytes, compressed)
    }

    /// A frame was compressed from so many bytes to so many: whether to send it so.
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
