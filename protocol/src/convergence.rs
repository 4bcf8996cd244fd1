//! After each round of pre-copy: go on, switch over, or give up.
//!
//! The downtime limit is a bound, not a target. While the pause would not fit it, rounds go
//! on as long as they shrink; once it fits, they go on only while another one makes the
//! pause noticeably shorter at little cost.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use crate::PAGE_SIZE;

mod forecast;

pub use forecast::{Conditions, Forecast, Measured, Predictor};

/// A round must make the pause shorter by this share of it to be worth its bytes,
const WORTHWHILE_SHARE: f64 = 0.2;
/// and by this much,
const WORTHWHILE: Duration = Duration::from_millis(1);
/// and take less than this.
const CHEAP: Duration = Duration::from_secs(1);
/// A round begun for a shorter pause that brings less than this share of it is the last one:
/// the guest writes the same pages again and again.
const DISAPPOINTING_SHARE: f64 = 0.1;

/// Rounds shrink if what remains falls to this share of the most that remained
const SHRINKING: f64 = 0.9;
/// within so many rounds;
const SHRINKING_WITHIN: usize = 3;
/// if they do not for so many rounds in a row, they have stopped.
const PATIENCE: u32 = 3;

/// What the order allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// The longest pause that the guest may see.
    pub downtime_limit: Duration,
    /// Rounds after which it is switched over or given up.
    pub max_rounds: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self { downtime_limit: Duration::from_millis(300), max_rounds: 50 }
    }
}

/// A round that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Counted from 1.
    pub number: u32,
    /// How long it took.
    pub duration: Duration,
    /// Pages of 4 KiB that the guest dirtied while it ran, each counted once.
    pub dirtied_pages: u64,
    /// Bytes to be sent if the guest were paused now: what was dirtied and what is left over.
    pub remaining_bytes: u64,
}

/// What to do after a round, and the figures it was decided on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// What to do.
    pub decision: Decision,
    /// The pause if the guest were paused now.
    pub forecast: Forecast,
    /// The pause expected after one more round (never longer than the one now).
    pub forecast_after_another: Forecast,
    /// How fast the guest dirtied pages during the round, in bytes per second.
    pub dirty_bytes_per_second: f64,
}

/// What to do after a round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decision {
    /// Copy another round.
    Continue,
    /// Pause the guest and send the rest.
    SwitchOver,
    /// Leave the guest running where it is.
    GiveUp {
        /// For the operator.
        why: Why,
    },
}

/// Why a migration cannot keep its downtime limit. It displays as a sentence that says what
/// was found and what can be done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Why {
    /// What went on.
    pub reason: Reason,
    /// The round after which it was given up.
    pub round: u32,
    /// How fast the guest dirties pages, in bytes per second.
    pub dirty_bytes_per_second: f64,
    /// What the lanes deliver, in bytes per second, as far as it is known.
    pub bandwidth: Option<f64>,
    /// Bytes that would be sent in the pause.
    pub remaining_bytes: u64,
    /// The pause expected, with its margin.
    pub downtime: Duration,
    /// The pause allowed.
    pub downtime_limit: Duration,
}

/// The kinds of [`Why`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Even with nothing left to send the pause would not fit the limit.
    LimitTooShort,
    /// The guest writes as fast as the lanes deliver, or faster.
    StoppedShrinking,
    /// [`Policy::max_rounds`] are over.
    TooManyRounds,
}

/// Decides after each round of one migration.
#[derive(Debug, Clone)]
pub struct Convergence {
    policy: Policy,
    rounds: u32,
    /// What remained after the last rounds, oldest first.
    remained: VecDeque<u64>,
    /// Rounds in a row that did not shrink.
    stalled: u32,
    /// The pause that the last round was to make shorter.
    to_be_shortened: Option<Duration>,
}

impl Convergence {
    /// Before the first round.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            rounds: 0,
            remained: VecDeque::with_capacity(SHRINKING_WITHIN + 1),
            stalled: 0,
            to_be_shortened: None,
        }
    }

    /// Decides what follows `round`. [`Decision::SwitchOver`] only if the forecast with its
    /// margin fits the limit; anything but [`Decision::Continue`] at the latest when
    /// [`Policy::max_rounds`] have been decided on.
    pub fn after_round(&mut self, round: &Round, now: &Conditions, predictor: &Predictor) -> Verdict {
        self.rounds = self.rounds.saturating_add(1);
        self.note_progress(round.remaining_bytes);

        let forecast = predictor.forecast(round.remaining_bytes, now);
        let dirty_bytes_per_second = dirty_rate(round);
        let next_duration = forecast.transfer.saturating_add(now.round_trip);
        let next_remaining = dirty_bytes_per_second * next_duration.as_secs_f64();
        let next_remaining = (next_remaining as u64).min(round.remaining_bytes);
        let forecast_after_another = predictor.forecast(next_remaining, now);

        let fits = |forecast: &Forecast| forecast.with_margin() <= self.policy.downtime_limit;
        let last = self.rounds >= self.policy.max_rounds;
        let give_up = |reason, downtime: Duration| Decision::GiveUp {
            why: Why {
                reason,
                round: round.number,
                dirty_bytes_per_second,
                bandwidth: now.bandwidth,
                remaining_bytes: round.remaining_bytes,
                downtime,
                downtime_limit: self.policy.downtime_limit,
            },
        };

        let shortest = predictor.forecast(0, now);
        let decision = if fits(&forecast) {
            let before = self.to_be_shortened.take();
            let disappointed = before.is_some_and(|before| {
                before.saturating_sub(forecast.total()) < before.mul_f64(DISAPPOINTING_SHARE)
            });
            let gain = forecast.total().saturating_sub(forecast_after_another.total());
            let worthwhile = gain > WORTHWHILE
                && gain > forecast.total().mul_f64(WORTHWHILE_SHARE)
                && next_duration < CHEAP;
            if worthwhile && !disappointed && !last {
                self.to_be_shortened = Some(forecast.total());
                Decision::Continue
            } else {
                Decision::SwitchOver
            }
        } else if !fits(&shortest) {
            give_up(Reason::LimitTooShort, shortest.with_margin())
        } else if self.stalled >= PATIENCE {
            give_up(Reason::StoppedShrinking, forecast.with_margin())
        } else if last {
            give_up(Reason::TooManyRounds, forecast.with_margin())
        } else {
            Decision::Continue
        };
        Verdict { decision, forecast, forecast_after_another, dirty_bytes_per_second }
    }

    fn note_progress(&mut self, remaining: u64) {
        if let Some(&most) = self.remained.iter().max() {
            let shrank = remaining as f64 <= most as f64 * SHRINKING;
            self.stalled = if shrank { 0 } else { self.stalled.saturating_add(1) };
        }
        self.remained.push_back(remaining);
        if self.remained.len() > SHRINKING_WITHIN {
            self.remained.pop_front();
        }
    }
}

/// Bytes per second that the guest dirtied; infinite for pages dirtied in no time.
fn dirty_rate(round: &Round) -> f64 {
    match round.dirtied_pages {
        0 => 0.0,
        pages => pages as f64 * PAGE_SIZE as f64 / round.duration.as_secs_f64(),
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { round, dirty_bytes_per_second, remaining_bytes, .. } = *self;
        let (downtime, limit) = (Milliseconds(self.downtime), Milliseconds(self.downtime_limit));
        if self.reason == Reason::LimitTooShort {
            return write!(
                f,
                "even with nothing left to send, the pause would take {downtime}, and the limit is {limit}: \
                 raise the downtime limit above that"
            );
        }
        match self.reason {
            Reason::TooManyRounds => {
                write!(f, "the guest does not fit into its pause after {round} rounds: ")?
            }
            _ => write!(f, "rounds have stopped shrinking (round {round}): ")?,
        }
        write!(f, "it dirties {}", Rate(dirty_bytes_per_second))?;
        match self.bandwidth {
            Some(bandwidth) => write!(f, " and the ports deliver {}", Rate(bandwidth))?,
            None => write!(f, " and the ports have delivered nothing")?,
        }
        let megabytes = remaining_bytes as f64 / 1e6;
        write!(
            f,
            "; with {megabytes:.1} MB left the pause would take {downtime}, and the limit is {limit}: \
             raise the downtime limit above that, add ports, or try when the guest writes less"
        )
    }
}

/// A rate as operators of hosts and of networks know it.
struct Rate(f64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} MB/s ({:.2} Gbit/s)", self.0 / 1e6, self.0 * 8.0 / 1e9)
    }
}

struct Milliseconds(Duration);

impl fmt::Display for Milliseconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_micros().div_ceil(1000) {
            ms @ ..10_000 => write!(f, "{ms} ms"),
            ms @ ..3_600_000 => write!(f, "{:.1} s", ms as f64 / 1000.0),
            _ => f.write_str("more than an hour"),
        }
    }
}

#[cfg(test)]
mod tests;
