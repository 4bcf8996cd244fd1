//! How long the pause would be, and how far such forecasts were off before.

use std::collections::VecDeque;
use std::time::Duration;

/// Round trips within the pause: the last pages and their acknowledgement, the state and `Ready`,
/// `Commit` and `Running`.
const ROUND_TRIPS: u32 = 3;

/// Errors that count.
const WINDOW: usize = 16;
/// The margin is never less: no two pauses are alike.
const MARGIN_FLOOR: Duration = Duration::from_millis(3);
/// Stands for experience while there is none, in seconds: a margin of 20 ms.
const ASSUMED_ERRORS: [f64; 2] = [-0.010, 0.010];
/// An error beyond this, in seconds, is a mishap to learn no more from than this.
const WORST_ERROR: f64 = 60.0;

/// How much a new measurement of a term counts against all before it.
const WEIGHT: f64 = 0.3;

/// What a forecast is made from, as it is now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Conditions {
    /// What the lanes deliver, in bytes per second ([`crate::bandwidth::Bandwidth`]).
    pub bandwidth: Option<f64>,
    /// There and back, on the control connection or on the lanes, whichever takes longer.
    pub round_trip: Duration,
    /// Digesting all memory at both ends, bytes by rate; zero unless it was ordered.
    pub verify: Duration,
}

/// The pause that a switchover now would mean, term by term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forecast {
    /// Sending the remaining pages.
    pub transfer: Duration,
    /// Waiting for the other host's answers.
    pub round_trips: Duration,
    /// Pausing the guest and saving the VMM's state.
    pub save: Duration,
    /// Loading it.
    pub load: Duration,
    /// The three durable records that the handover takes (prepared, committed, running).
    pub journal: Duration,
    /// Until the guest runs once the VMM is told to resume it.
    pub resume: Duration,
    /// Comparing digests.
    pub verify: Duration,
    /// For the error that past forecasts had. Not part of the [`total`](Self::total).
    pub margin: Duration,
}

impl Forecast {
    /// The pause expected.
    pub fn total(&self) -> Duration {
        [self.transfer, self.round_trips, self.save, self.load, self.journal, self.resume, self.verify]
            .into_iter()
            .fold(Duration::ZERO, Duration::saturating_add)
    }

    /// What of it is still to come when the source begins to write the commit: that record and the
    /// destination's, the word between them, and the guest's start. It can be taken back only until then.
    pub fn after_commit(&self) -> Duration {
        let (records, words) = (self.journal * 2 / 3, self.round_trips / (2 * ROUND_TRIPS));
        [records, words, self.resume].into_iter().fold(Duration::ZERO, Duration::saturating_add)
    }

    /// The pause that will hardly be exceeded: what must fit the limit.
    pub fn with_margin(&self) -> Duration {
        self.total().saturating_add(self.margin)
    }
}

/// What a pause turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// From the guest's last instruction here to its first there.
    pub downtime: Duration,
    /// Pausing the guest and saving the VMM's state.
    pub save: Duration,
    /// Loading it.
    pub load: Duration,
    /// All durable records within the pause.
    pub journal: Duration,
    /// From telling the VMM to resume until the guest ran.
    pub resume: Duration,
}

/// Forecasts the pauses of one VMM, and learns from each.
///
/// Terms are exponentially weighted means of what was measured. The margin is the mean error
/// of the last 16 forecasts plus twice its standard deviation.
#[derive(Debug, Clone)]
pub struct Predictor {
    save: Term,
    load: Term,
    journal: Term,
    resume: Term,
    /// Actual less predicted, in seconds, oldest first.
    errors: VecDeque<f64>,
}

impl Default for Predictor {
    fn default() -> Self {
        Self::new()
    }
}

impl Predictor {
    /// With assumptions in place of experience.
    pub fn new() -> Self {
        Self {
            save: Term::assumed(Duration::from_millis(5)),
            load: Term::assumed(Duration::from_millis(5)),
            journal: Term::assumed(Duration::from_millis(6)),
            resume: Term::assumed(Duration::from_millis(1)),
            errors: ASSUMED_ERRORS.into(),
        }
    }

    /// The pause if `remaining_bytes` were left to send.
    pub fn forecast(&self, remaining_bytes: u64, now: &Conditions) -> Forecast {
        Forecast {
            transfer: transfer(remaining_bytes, now.bandwidth),
            round_trips: now.round_trip.saturating_mul(ROUND_TRIPS),
            save: self.save.expected,
            load: self.load.expected,
            journal: self.journal.expected,
            resume: self.resume.expected,
            verify: now.verify,
            margin: self.margin(),
        }
    }

    /// Learns from a pause: `predicted` is the forecast on which it was decided.
    pub fn learn(&mut self, predicted: &Forecast, actual: &Measured) {
        self.save.learn(actual.save);
        self.load.learn(actual.load);
        self.journal.learn(actual.journal);
        self.resume.learn(actual.resume);

        let error = actual.downtime.as_secs_f64() - predicted.total().as_secs_f64();
        if self.errors.len() == WINDOW {
            self.errors.pop_front();
        }
        self.errors.push_back(error.clamp(-WORST_ERROR, WORST_ERROR));
    }

    /// The margin that forecasts get at present.
    pub fn margin(&self) -> Duration {
        let count = self.errors.len() as f64;
        let mean = self.errors.iter().sum::<f64>() / count;
        let variance = self.errors.iter().map(|error| (error - mean).powi(2)).sum::<f64>() / count;
        seconds(mean + 2.0 * variance.sqrt()).max(MARGIN_FLOOR)
    }
}

/// One term of a forecast.
#[derive(Debug, Clone, Copy)]
struct Term {
    expected: Duration,
    measured: bool,
}

impl Term {
    fn assumed(expected: Duration) -> Self {
        Self { expected, measured: false }
    }

    fn learn(&mut self, actual: Duration) {
        let (before, actual) = (self.expected.as_secs_f64(), actual.as_secs_f64());
        // The first measurement is worth more than any assumption.
        let expected = if self.measured { before + WEIGHT * (actual - before) } else { actual };
        *self = Self { expected: seconds(expected), measured: true };
    }
}

/// The time that `bytes` take; beyond all limits if nothing is known of the lanes.
fn transfer(bytes: u64, bandwidth: Option<f64>) -> Duration {
    match bandwidth {
        _ if bytes == 0 => Duration::ZERO,
        Some(bandwidth) if bandwidth > 0.0 => seconds(bytes as f64 / bandwidth),
        _ => Duration::MAX,
    }
}

/// A duration of so many seconds: none if negative, the longest there is if too many.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}
