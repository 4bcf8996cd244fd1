//! After each round of pre-copy: go on, slow the guest, switch over, post-copy, or give up.
//!
//! The downtime limit is a bound, not a target. While the pause would not fit it, rounds go
//! on as long as they shrink; once it fits, they go on only while another one makes the
//! pause noticeably shorter at little cost.
//!
//! What is done when rounds do not shrink is up to the order ([`Policy`]):
//!
//! - **stun**: the guest's writes are slowed to half of what the lanes deliver, and to half of
//!   that again whenever a round does not shrink all the same, but never below the share that
//!   the order lets the guest keep. Rounds then shrink, and end as above. How fast it may write
//!   follows the lanes at any moment ([`Convergence::stun_target`]).
//! - **post-copy**: the guest runs at the destination while the rest of its memory is fetched.
//!   Nothing but its state is sent in the pause, so this always converges; but it fits
//!   no limit below that.
//! - neither: it is left where it is.

use std::collections::VecDeque;
use std::time::Duration;

mod forecast;
mod outlook;
mod policy;
mod stun;
mod text;

pub use forecast::{Conditions, Forecast, Measured, Predictor};
pub use policy::{Converge, Policy, Postcopy, UnknownConverge, UnknownPostcopy};
pub use stun::Slowdown;

use outlook::Outlook;
use stun::Stun;

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
/// Where something can be done about it, one is enough if the guest dirties more than this share
/// of what the lanes deliver; if less, it may be due to them,
const CLEAR: f64 = 0.5;
/// and with more than this share there is no need to see even one.
const OUTRUN: f64 = 0.9;

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

/// What to do, and what it was decided on. It displays as a clause that begins with a verb.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// What to do.
    pub decision: Decision,
    /// The figures.
    pub figures: Figures,
    /// The pause if the guest were paused now: with all that remains sent in it, or nothing of
    /// it if post-copy was decided.
    pub forecast: Forecast,
    /// The pause expected after one more round (never longer than the one now).
    pub forecast_after_another: Forecast,
}

/// What to do next. It displays as a clause that begins with a verb.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decision {
    /// Copy another round; a guest that is stunned stays so.
    Continue,
    /// Copy another round, the guest's writes being held to this from now on.
    Stun {
        /// Pages of 4 KiB that it may write. [`Convergence::stun_target`] follows the lanes.
        pages_per_second: u64,
        /// For the operator.
        why: Why,
    },
    /// Pause the guest and send the rest.
    SwitchOver,
    /// Pause the guest, and let the destination run it before the rest is there.
    Postcopy {
        /// For the operator.
        why: Why,
    },
    /// Leave the guest running where it is.
    GiveUp {
        /// For the operator.
        why: Why,
    },
}

/// Why rounds do not just go on. It displays as a sentence that says what was found and what
/// can be done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Why {
    /// What went on.
    pub reason: Reason,
    /// The figures.
    pub figures: Figures,
}

/// What a decision is made from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    /// The round that has ended; 0 before the first.
    pub round: u32,
    /// How fast the guest dirtied pages during it, in bytes per second.
    pub dirty_bytes_per_second: f64,
    /// What the lanes deliver, in bytes per second, as far as it is known.
    pub bandwidth: Option<f64>,
    /// Bytes that would be sent in the pause.
    pub remaining_bytes: u64,
    /// The pause expected with these, and with its margin.
    pub downtime: Duration,
    /// The pause allowed.
    pub downtime_limit: Duration,
    /// How far the guest is slowed from now on, or would have to be.
    pub stun: Option<Slowdown>,
}

/// The kinds of [`Why`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The order wants post-copy in any case.
    Ordered,
    /// Even with nothing left to send the pause would not fit the limit.
    LimitTooShort,
    /// The guest has dirtied about as much during the round as the lanes deliver, or more.
    Outrun,
    /// Rounds have not shrunk for a while.
    StoppedShrinking,
    /// Half of [`Policy::max_rounds`] are over: those left may not be enough without a stun.
    ShrinkingSlowly,
    /// The guest would have to be slowed more than [`Policy::max_stun_percent`] allows.
    StunTooWeak,
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
    stun: Option<Stun>,
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
            stun: None,
        }
    }

    /// Decides whether there are to be rounds at all for a guest of `memory_bytes`: `None` if
    /// so, otherwise [`Decision::Postcopy`], or [`Decision::GiveUp`] if the limit is too short
    /// even for that.
    pub fn before_rounds(
        &self,
        memory_bytes: u64,
        now: &Conditions,
        predictor: &Predictor,
    ) -> Option<Verdict> {
        if self.policy.postcopy != Some(Postcopy::Now) {
            return None;
        }
        let nothing_yet =
            Round { number: 0, duration: Duration::ZERO, dirtied_pages: 0, remaining_bytes: memory_bytes };
        let outlook = Outlook::new(&nothing_yet, now, predictor, &self.policy);
        let decision = outlook.limit_too_short().unwrap_or_else(|| outlook.postcopy(Reason::Ordered));
        Some(outlook.verdict(decision))
    }

    /// Decides what follows `round`. [`Decision::SwitchOver`] only if the forecast with its
    /// margin fits the limit, [`Decision::Postcopy`] only if one with nothing left to send
    /// does; and one that ends the rounds at the latest when [`Policy::max_rounds`] have been
    /// decided on.
    pub fn after_round(&mut self, round: &Round, now: &Conditions, predictor: &Predictor) -> Verdict {
        self.rounds = self.rounds.saturating_add(1);
        self.note_progress(round.remaining_bytes);
        let mut outlook = Outlook::new(round, now, predictor, &self.policy);
        outlook.figures.stun = self.stun.map(|stun| stun.slowdown(now.bandwidth));

        let decision = if let Some(give_up) = outlook.limit_too_short() {
            give_up
        } else if self.policy.postcopy.is_some() {
            outlook.postcopy(Reason::Ordered)
        } else if outlook.fits() {
            self.shorten(&outlook)
        } else if let Some(reason) = self.trouble(&outlook) {
            self.remedy(reason, &mut outlook)
        } else {
            Decision::Continue
        };
        outlook.verdict(decision)
    }

    /// Pages of 4 KiB per second that a stunned guest may write while the lanes deliver
    /// `bandwidth` bytes per second; `None` if it is not stunned. To be asked some ten times a
    /// second: a round may be long, and what the lanes deliver changes.
    pub fn stun_target(&self, bandwidth: Option<f64>) -> Option<u64> {
        self.stun.map(|stun| stun.slowdown(bandwidth).pages_per_second())
    }

    fn note_progress(&mut self, remaining: u64) {
        // Under stun each round is to be shorter than the one before.
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

    /// The pause fits: one more round for a shorter one, or not.
    fn shorten(&mut self, outlook: &Outlook) -> Decision {
        let (now, after_another) = (outlook.forecast.total(), outlook.forecast_after_another.total());
        let before = self.to_be_shortened.take();
        let disappointed =
            before.is_some_and(|before| before.saturating_sub(now) < before.mul_f64(DISAPPOINTING_SHARE));
        let gain = now.saturating_sub(after_another);
        let worthwhile =
            gain > WORTHWHILE && gain > now.mul_f64(WORTHWHILE_SHARE) && outlook.next_duration < CHEAP;
        if !worthwhile || disappointed || self.is_last() {
            return Decision::SwitchOver;
        }
        self.to_be_shortened = Some(now);
        Decision::Continue
    }

    /// The pause does not fit: why more rounds like the last are not the way, if they are not.
    fn trouble(&self, outlook: &Outlook) -> Option<Reason> {
        let (load, can_help) = (outlook.load(), self.policy.converge != Converge::None);
        let clear = self.stun.is_some() || can_help && load > CLEAR;
        if self.stalled >= if clear { 1 } else { PATIENCE } {
            return Some(Reason::StoppedShrinking);
        }
        if self.is_last() {
            return Some(Reason::TooManyRounds);
        }
        if self.stun.is_some() || !can_help {
            return None;
        }
        if load > OUTRUN {
            return Some(Reason::Outrun);
        }
        let late = self.rounds >= self.policy.max_rounds.div_ceil(2);
        (self.policy.converge.may_stun() && late).then_some(Reason::ShrinkingSlowly)
    }

    /// What the order allows to be done about `reason`.
    fn remedy(&mut self, reason: Reason, outlook: &mut Outlook) -> Decision {
        let converge = self.policy.converge;
        let mut reason = reason;
        if converge.may_stun() && self.is_last() {
            reason = Reason::TooManyRounds; // there is none in which it could be slowed
        } else if converge.may_stun() {
            match self.slow(outlook) {
                Ok(None) => return Decision::Continue,
                Ok(Some(slowdown)) => return outlook.stun(reason, slowdown),
                Err(slowdown) => {
                    outlook.figures.stun = Some(slowdown);
                    reason = Reason::StunTooWeak;
                }
            }
        }
        if converge.may_postcopy() { outlook.postcopy(reason) } else { outlook.give_up(reason) }
    }

    /// Slows the guest, or slows it further. `None`: it is as slow as it may be, and gets a
    /// few rounds like that. An error tells how far it would have to be slowed.
    fn slow(&mut self, outlook: &Outlook) -> Result<Option<Slowdown>, Slowdown> {
        let Figures { dirty_bytes_per_second, bandwidth, .. } = outlook.figures;
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
        self.rounds >= self.policy.max_rounds
    }
}

#[cfg(test)]
mod tests;
