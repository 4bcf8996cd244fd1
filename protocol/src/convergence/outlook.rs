//! What a round means for the pause, and the decisions with that as their reason.

use std::time::Duration;

use super::{
    Conditions, Decision, Figures, Forecast, Policy, Predictor, Reason, Round, Slowdown, Verdict, Why,
};
use crate::PAGE_SIZE;

/// What things are like after a round.
pub(super) struct Outlook {
    pub figures: Figures,
    pub forecast: Forecast,
    pub forecast_after_another: Forecast,
    /// Of another round.
    pub next_duration: Duration,
    /// The pause with nothing left to send.
    shortest: Forecast,
}

impl Outlook {
    pub fn new(round: &Round, now: &Conditions, predictor: &Predictor, policy: &Policy) -> Self {
        let forecast = predictor.forecast(round.remaining_bytes, now);
        let dirty_bytes_per_second = dirty_rate(round);
        let next_duration = forecast.transfer.saturating_add(now.round_trip);
        let next_remaining = dirty_bytes_per_second * next_duration.as_secs_f64();
        let next_remaining = (next_remaining as u64).min(round.remaining_bytes);
        Self {
            figures: Figures {
                round: round.number,
                dirty_bytes_per_second,
                bandwidth: now.bandwidth,
                remaining_bytes: round.remaining_bytes,
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

    /// Whether the pause fits the limit.
    pub fn fits(&self) -> bool {
        self.figures.downtime <= self.figures.downtime_limit
    }

    /// What the guest dirties as a share of what the lanes deliver; none if that is not known.
    pub fn load(&self) -> f64 {
        self.figures.bandwidth.map_or(0.0, |bandwidth| self.figures.dirty_bytes_per_second / bandwidth)
    }

    /// Giving up because not even a pause with nothing left to send fits the limit.
    pub fn limit_too_short(&self) -> Option<Decision> {
        let downtime = self.shortest.with_margin();
        let figures = Figures { downtime, ..self.figures };
        let why = Why { reason: Reason::LimitTooShort, figures };
        (downtime > self.figures.downtime_limit).then_some(Decision::GiveUp { why })
    }

    pub fn give_up(&self, reason: Reason) -> Decision {
        Decision::GiveUp { why: Why { reason, figures: self.figures } }
    }

    pub fn postcopy(&self, reason: Reason) -> Decision {
        Decision::Postcopy { why: Why { reason, figures: self.figures } }
    }

    /// Holding the guest to what `slowdown` says.
    pub fn stun(&mut self, reason: Reason, slowdown: Slowdown) -> Decision {
        self.figures.stun = Some(slowdown);
        let why = Why { reason, figures: self.figures };
        Decision::Stun { pages_per_second: slowdown.pages_per_second(), why }
    }

    /// `decision`, with what it is based on.
    pub fn verdict(self, decision: Decision) -> Verdict {
        let Self { figures, forecast, forecast_after_another, shortest, .. } = self;
        let (forecast, forecast_after_another) = match decision {
            Decision::Postcopy { .. } => (shortest, shortest),
            _ => (forecast, forecast_after_another),
        };
        Verdict { decision, figures, forecast, forecast_after_another }
    }
}

/// Bytes per second that the guest dirtied; infinite for pages dirtied in no time.
fn dirty_rate(round: &Round) -> f64 {
    match round.dirtied_pages {
        0 => 0.0,
        pages => pages as f64 * PAGE_SIZE as f64 / round.duration.as_secs_f64(),
    }
}
