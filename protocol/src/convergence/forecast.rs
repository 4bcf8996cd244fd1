//! Forecasts of the pause, and their errors in the past.

use std::collections::VecDeque;
use std::time::Duration;

/// The number of round trips within the pause: the last pages and their acknowledgement, the state and `Ready`, `Commit`
/// and `Running`.
const ROUND_TRIPS: u32 = 3;

/// The number of past errors that count.
const WINDOW: usize = 16;
/// The smallest margin, because no two pauses are alike.
const MARGIN_FLOOR: Duration = Duration::from_millis(3);
/// The part of the transfer's time that the margin is at least: one in this many. The bandwidth is measured over a few
/// acknowledgements of large frames, which on a slow port says no more than this about the seconds that follow.
const TRANSFER_MARGIN: u32 = 20;
/// The errors in seconds that are assumed before any was measured. They give a margin of 20 ms.
const ASSUMED_ERRORS: [f64; 2] = [-0.010, 0.010];
/// The largest error in seconds that is learnt. A larger one is an accident, and counts as this one.
const WORST_ERROR: f64 = 60.0;

/// The weight of a new measurement of a term against all before it.
const WEIGHT: f64 = 0.3;

/// The present conditions on which a forecast is based.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Conditions {
    /// What the lanes deliver, in bytes per second ([`crate::bandwidth::Bandwidth`]).
    pub bandwidth: Option<f64>,
    /// The round trip on the control connection or on the lanes, whichever is longer.
    pub round_trip: Duration,
    /// The bytes of the VMM's state that will be sent in the pause.
    pub state_bytes: u64,
    /// The time to compute digests of all memory at both ends, or zero if they were not ordered.
    pub verify: Duration,
}

/// The pause that a switchover would cause now, term by term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forecast {
    /// The time to send the remaining pages.
    pub transfer: Duration,
    /// The time to wait for the other host's answers.
    pub round_trips: Duration,
    /// The time to pause the guest and to save the VMM's state.
    pub save: Duration,
    /// The time to send what is left of the VMM's state.
    pub state: Duration,
    /// The time to load the VMM's state.
    pub load: Duration,
    /// The time to write the three durable records of the handover (prepared, committed, running).
    pub journal: Duration,
    /// The time from the command to resume until the guest runs.
    pub resume: Duration,
    /// The time to compare digests.
    pub verify: Duration,
    /// The margin for the error that past forecasts had, and that the bandwidth has: at least a twentieth of the transfer.
    /// It is not part of the [`total`](Self::total).
    pub margin: Duration,
}

impl Forecast {
    /// Returns the expected pause, without its margin.
    pub fn total(&self) -> Duration {
        let state = [self.save, self.state, self.load];
        [self.transfer, self.round_trips, self.journal, self.resume, self.verify]
            .into_iter()
            .chain(state)
            .fold(Duration::ZERO, Duration::saturating_add)
    }

    /// Returns the part of the pause after the source has begun to write the commit: that record and the destination's, the
    /// message between them, and the guest's start. Until then, the source can still keep the guest.
    pub fn after_commit(&self) -> Duration {
        let (records, words) = (self.journal * 2 / 3, self.round_trips / (2 * ROUND_TRIPS));
        [records, words, self.resume].into_iter().fold(Duration::ZERO, Duration::saturating_add)
    }

    /// Returns the pause with its margin, which must fit the limit.
    pub fn with_margin(&self) -> Duration {
        self.total().saturating_add(self.margin)
    }
}

/// The measured pause of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// The time from the guest's last instruction at the source to its first at the destination.
    pub downtime: Duration,
    /// The time to pause the guest and to save the VMM's state.
    pub save: Duration,
    /// The time to load the VMM's state.
    pub load: Duration,
    /// The time to write all durable records within the pause.
    pub journal: Duration,
    /// The time from the command to resume until the guest ran.
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
    /// The errors (actual less predicted) in seconds, oldest first.
    errors: VecDeque<f64>,
}

impl Default for Predictor {
    fn default() -> Self {
        Self::new()
    }
}

impl Predictor {
    /// Returns a predictor with assumptions in place of measurements.
    pub fn new() -> Self {
        Self {
            save: Term::assumed(Duration::from_millis(4)),
            load: Term::assumed(Duration::from_millis(3)),
            journal: Term::assumed(Duration::from_millis(3)),
            resume: Term::assumed(Duration::from_millis(1)),
            errors: ASSUMED_ERRORS.into(),
        }
    }

    /// Returns the pause if `remaining_bytes` were left to send.
    pub fn forecast(&self, remaining_bytes: u64, now: &Conditions) -> Forecast {
        let transfer = transfer_time(remaining_bytes, now.bandwidth);
        Forecast {
            transfer,
            round_trips: now.round_trip.saturating_mul(ROUND_TRIPS),
            save: self.save.expected,
            // Lanes that have delivered nothing yet say nothing of it.
            state: match now.bandwidth {
                Some(bandwidth) if bandwidth > 0.0 => transfer_time(now.state_bytes, now.bandwidth),
                _ => Duration::ZERO,
            },
            load: self.load.expected,
            journal: self.journal.expected,
            resume: self.resume.expected,
            verify: now.verify,
            margin: self.margin().max(transfer / TRANSFER_MARGIN),
        }
    }

    /// Learns from a pause, for which `predicted` was forecast.
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

    /// Learns from a pause that was ended after the VMM's state had been saved, which took so long.
    pub fn learn_save(&mut self, save: Duration) {
        self.save.learn(save);
    }

    /// Returns the margin for the errors of past forecasts.
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

/// Returns the time that `bytes` take, which is beyond all limits if the bandwidth is not known.
fn transfer_time(bytes: u64, bandwidth: Option<f64>) -> Duration {
    match bandwidth {
        _ if bytes == 0 => Duration::ZERO,
        Some(bandwidth) if bandwidth > 0.0 => seconds(bytes as f64 / bandwidth),
        _ => Duration::MAX,
    }
}

/// Returns a duration of `seconds`, which is zero for a negative number and the longest duration for a too large one.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}
