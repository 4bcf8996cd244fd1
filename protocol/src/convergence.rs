//! Convergence decides after each iteration of pre-copy: copy another one, stun the guest, switch over, begin post-copy,
//! or give up. (The command line, the JSON fields and the messages to operators call an iteration a round.)
//!
//! The downtime limit is a bound, not a target. While the pause would exceed it, iterations go on as long as they shrink.
//! Once the pause fits the limit, they go on only while another one makes the pause noticeably shorter at little cost.
//!
//! The order ([`Policy`]) says what is done when iterations do not shrink:
//!
//! - **stun**: the guest's writes are slowed to half of what the lanes deliver, and to half of
//!   that again whenever an iteration still does not shrink, but never below the share that the order lets the guest
//!   keep. Iterations then shrink, and end as above. The permitted rate of writes follows the lanes at any moment
//!   ([`Convergence::stun_target`]).
//! - **post-copy**: the guest runs at the destination while the rest of its memory is fetched.
//!   Only its state is sent in the pause, so this always converges, but it fits no limit that is shorter than that.
//! - **neither**: the guest is left where it is.

use std::collections::VecDeque;
use std::time::Duration;

mod assessment;
mod decision;
mod forecast;
mod policy;
mod stun;
mod text;

pub use decision::{Decision, Figures, Iteration, Reason, Verdict, Why};
pub use forecast::{Conditions, Forecast, Measured, Predictor};
pub use policy::{Converge, Policy, Postcopy, UnknownConverge, UnknownPostcopy};
pub use stun::Slowdown;

use assessment::Assessment;
use stun::{PATIENCE, Stun};

/// An iteration is worth its bytes only if it makes the pause shorter by this share of it.
const WORTHWHILE_SHARE: f64 = 0.2;
/// An iteration is worth its bytes only if it makes the pause shorter by this time.
const WORTHWHILE: Duration = Duration::from_millis(1);
/// An iteration for a shorter pause is cheap if it takes less than this time.
const CHEAP: Duration = Duration::from_secs(1);
/// An iteration for a shorter pause that saves less than this share of it is the last one, because the guest writes the
/// same pages again and again.
const DISAPPOINTING_SHARE: f64 = 0.1;

/// Iterations shrink if what remains falls to this share of the most that remained after recent ones.
const SHRINKING: f64 = 0.9;
/// The number of recent iterations with which what remains is compared.
const SHRINKING_WITHIN: usize = 3;
/// If the order permits a remedy, a single iteration that did not shrink is enough if the guest dirties more than this
/// share of what the lanes deliver. If it dirties less, the lanes may be the reason.
const CLEAR: f64 = 0.5;
/// If the order permits a remedy, and the guest dirties more than this share of what the lanes deliver, no iteration has
/// to be seen that did not shrink.
const OUTRUN: f64 = 0.9;

/// The decisions of one migration, one after each iteration.
#[derive(Debug, Clone)]
pub struct Convergence {
    policy: Policy,
    iterations: u32,
    /// The bytes that remained after the last iterations, oldest first.
    remained: VecDeque<u64>,
    /// The number of iterations in a row that did not shrink.
    stalled: u32,
    /// The pause that the last iteration was to make shorter, if that was its purpose.
    to_be_shortened: Option<Duration>,
    stun: Option<Stun>,
}

impl Convergence {
    /// Returns the state before the first iteration.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            iterations: 0,
            remained: VecDeque::with_capacity(SHRINKING_WITHIN + 1),
            stalled: 0,
            to_be_shortened: None,
            stun: None,
        }
    }

    /// Decides whether a guest of `memory_bytes` is copied in iterations at all. Returns `None` if so. Otherwise the
    /// decision is [`Decision::Postcopy`], or [`Decision::GiveUp`] if the limit is too short even for that.
    pub fn before_iterations(
        &self,
        memory_bytes: u64,
        now: &Conditions,
        predictor: &Predictor,
    ) -> Option<Verdict> {
        if self.policy.postcopy != Some(Postcopy::Now) {
            return None;
        }
        let nothing_yet = Iteration {
            number: 0,
            duration: Duration::ZERO,
            dirtied_pages: 0,
            remaining_bytes: memory_bytes,
        };
        let assessment = Assessment::new(&nothing_yet, now, predictor, &self.policy);
        let decision = assessment.limit_too_short().unwrap_or_else(|| assessment.postcopy(Reason::Ordered));
        Some(assessment.verdict(decision))
    }

    /// Decides what follows `iteration`.
    ///
    /// The decision is [`Decision::SwitchOver`] only if the forecast with its margin fits the limit, and
    /// [`Decision::Postcopy`] only if a forecast with nothing left to send fits it. After [`Policy::max_iterations`] at
    /// the latest, the decision ends the iterations.
    pub fn after_iteration(
        &mut self,
        iteration: &Iteration,
        now: &Conditions,
        predictor: &Predictor,
    ) -> Verdict {
        self.iterations = self.iterations.saturating_add(1);
        self.note_progress(iteration.remaining_bytes);
        let mut assessment = Assessment::new(iteration, now, predictor, &self.policy);
        assessment.figures.stun = self.stun.map(|stun| stun.slowdown(now.bandwidth));

        let decision = if let Some(give_up) = assessment.limit_too_short() {
            give_up
        } else if self.policy.postcopy.is_some() {
            assessment.postcopy(Reason::Ordered)
        } else if assessment.fits() {
            self.shorten(&assessment)
        } else if let Some(reason) = self.trouble(&assessment) {
            self.remedy(reason, &mut assessment)
        } else {
            Decision::Continue
        };
        assessment.verdict(decision)
    }

    /// Returns how many pages of 4 KiB per second a stunned guest may write while the lanes deliver `bandwidth` bytes per
    /// second, or `None` if it is not stunned. The daemon asks some ten times a second, because an iteration may be long,
    /// and what the lanes deliver changes.
    pub fn stun_target(&self, bandwidth: Option<f64>) -> Option<u64> {
        self.stun.map(|stun| stun.slowdown(bandwidth).pages_per_second())
    }

    fn note_progress(&mut self, remaining: u64) {
        // Under stun each iteration is to be shorter than the one before.
        let before = if self.stun.is_some() { self.remained.back() } else { self.remained.iter().max() };
        if let Some(&before) = before {
            let shrank = remaining as f64 <= before as f64 * SHRINKING;
            self.stalled = if shrank { 0 } else { self.stalled.saturating_add(1) };
        }
        self.remained.push_back(remaining);
        if self.remained.len() > SHRINKING_WITHIN {
            self.remained.pop_front();
        }
    }

    /// Decides, for a pause that fits the limit, whether one more iteration is to make it shorter.
    fn shorten(&mut self, assessment: &Assessment) -> Decision {
        let (now, after_another) = (assessment.forecast.total(), assessment.forecast_after_another.total());
        let before = self.to_be_shortened.take();
        let disappointed =
            before.is_some_and(|before| before.saturating_sub(now) < before.mul_f64(DISAPPOINTING_SHARE));
        let gain = now.saturating_sub(after_another);
        let worthwhile =
            gain > WORTHWHILE && gain > now.mul_f64(WORTHWHILE_SHARE) && assessment.next_duration < CHEAP;
        if !worthwhile || disappointed || self.is_last() {
            return Decision::SwitchOver;
        }
        self.to_be_shortened = Some(now);
        Decision::Continue
    }

    /// Returns, for a pause that does not fit the limit, why more iterations like the last do not help, if they do not.
    fn trouble(&self, assessment: &Assessment) -> Option<Reason> {
        let (load, can_help) = (assessment.load(), self.policy.converge != Converge::None);
        let clear = self.stun.is_some() || can_help && load > CLEAR;
        if self.stalled >= if clear { 1 } else { PATIENCE } {
            return Some(Reason::StoppedShrinking);
        }
        if self.is_last() {
            return Some(Reason::TooManyIterations);
        }
        if self.stun.is_some() || !can_help {
            return None;
        }
        if load > OUTRUN {
            return Some(Reason::Outrun);
        }
        let late = self.iterations >= self.policy.max_iterations.div_ceil(2);
        (self.policy.converge.may_stun() && late).then_some(Reason::ShrinkingSlowly)
    }

    /// Decides what to do about `reason`, within what the order allows.
    fn remedy(&mut self, reason: Reason, assessment: &mut Assessment) -> Decision {
        let converge = self.policy.converge;
        let mut reason = reason;
        if converge.may_stun() && self.is_last() {
            reason = Reason::TooManyIterations; // there is none in which it could be slowed
        } else if converge.may_stun() {
            match self.slow(assessment) {
                Ok(None) => return Decision::Continue,
                Ok(Some(slowdown)) => return assessment.stun(reason, slowdown),
                Err(slowdown) => {
                    assessment.figures.stun = Some(slowdown);
                    reason = Reason::StunTooWeak;
                }
            }
        }
        if converge.may_postcopy() { assessment.postcopy(reason) } else { assessment.give_up(reason) }
    }

    /// Slows the guest, or slows it further. Returns `None` if the guest is as slow as it may be, and gets a few iterations
    /// like that.
    ///
    /// # Errors
    ///
    /// Returns how far the guest would have to be slowed, if it may not be slowed so far.
    fn slow(&mut self, assessment: &Assessment) -> Result<Option<Slowdown>, Slowdown> {
        let Figures { dirty_bytes_per_second, bandwidth, .. } = assessment.figures;
        if let Some(stun) = &mut self.stun {
            let has_alternative = self.policy.converge.may_postcopy();
            return stun.tighten(bandwidth, self.stalled, has_alternative);
        }
        let stun = Stun::begin(dirty_bytes_per_second, bandwidth, &self.policy)?;
        self.stalled = 0;
        self.stun = Some(stun);
        Ok(Some(stun.slowdown(bandwidth)))
    }

    fn is_last(&self) -> bool {
        self.iterations >= self.policy.max_iterations
    }
}

#[cfg(test)]
mod tests;
