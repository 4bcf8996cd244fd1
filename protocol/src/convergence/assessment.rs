//! What an iteration means for the pause, and the decisions that follow from it.

use std::time::Duration;

use super::decision::{Decision, Figures, Iteration, Reason, Verdict, Why};
use super::forecast::{Conditions, Forecast, Predictor};
use super::policy::Policy;
use super::stun::Slowdown;
use crate::PAGE_SIZE;

/// The assessment of the migration after an iteration.
pub(super) struct Assessment {
    pub figures: Figures,
    pub forecast: Forecast,
    pub forecast_after_another: Forecast,
    /// The expected duration of another iteration.
    pub next_duration: Duration,
    /// The pause if nothing were left to send.
    shortest: Forecast,
}

impl Assessment {
    pub(super) fn new(
        iteration: &Iteration,
        now: &Conditions,
        predictor: &Predictor,
        policy: &Policy,
    ) -> Self {
        let forecast = predictor.forecast(iteration.remaining_bytes, now);
        let dirty_bytes_per_second = dirty_rate(iteration);
        let next_duration = forecast.transfer.saturating_add(now.round_trip);
        let next_remaining = dirty_bytes_per_second * next_duration.as_secs_f64();
        let next_remaining = (next_remaining as u64).min(iteration.remaining_bytes);
        Self {
            figures: Figures {
                iteration: iteration.number,
                dirty_bytes_per_second,
                bandwidth: now.bandwidth,
                remaining_bytes: iteration.remaining_bytes,
                downtime: forecast.with_margin(),
                downtime_limit: policy.downtime_limit,
                stun: None,
            },
            forecast,
            forecast_after_another: predictor.forecast(next_remaining, now),
            next_duration,
            shortest: predictor.forecast(0, now),
        }
    }

    /// Tells whether the pause fits the limit.
    pub(super) fn fits(&self) -> bool {
        self.figures.downtime <= self.figures.downtime_limit
    }

    /// Returns what the guest dirties as a share of what the lanes deliver, or 0 if that is not known.
    pub(super) fn load(&self) -> f64 {
        self.figures.bandwidth.map_or(0.0, |bandwidth| self.figures.dirty_bytes_per_second / bandwidth)
    }

    /// Returns the decision to give up if not even a pause with nothing left to send fits the limit.
    pub(super) fn limit_too_short(&self) -> Option<Decision> {
        let downtime = self.shortest.with_margin();
        let figures = Figures { downtime, ..self.figures };
        let why = Why { reason: Reason::LimitTooShort, figures };
        (downtime > self.figures.downtime_limit).then_some(Decision::GiveUp { why })
    }

    /// Returns the decision to give up.
    pub(super) fn give_up(&self, reason: Reason) -> Decision {
        Decision::GiveUp { why: Why { reason, figures: self.figures } }
    }

    /// Returns the decision to begin post-copy.
    pub(super) fn postcopy(&self, reason: Reason) -> Decision {
        Decision::Postcopy { why: Why { reason, figures: self.figures } }
    }

    /// Returns the decision to stun the guest as `slowdown` says.
    pub(super) fn stun(&mut self, reason: Reason, slowdown: Slowdown) -> Decision {
        self.figures.stun = Some(slowdown);
        let why = Why { reason, figures: self.figures };
        Decision::Stun { pages_per_second: slowdown.pages_per_second(), why }
    }

    /// Returns `decision` with what it is based on.
    pub(super) fn verdict(self, decision: Decision) -> Verdict {
        let Self { figures, forecast, forecast_after_another, shortest, .. } = self;
        let (forecast, forecast_after_another) = match decision {
            Decision::Postcopy { .. } => (shortest, shortest),
            _ => (forecast, forecast_after_another),
        };
        Verdict { decision, figures, forecast, forecast_after_another }
    }
}

/// Returns how many bytes per second the guest dirtied, which is infinite for pages that were dirtied in no time.
fn dirty_rate(iteration: &Iteration) -> f64 {
    match iteration.dirtied_pages {
        0 => 0.0,
        pages => pages as f64 * PAGE_SIZE as f64 / iteration.duration.as_secs_f64(),
    }
}
