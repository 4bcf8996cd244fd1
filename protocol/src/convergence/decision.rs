//! What is decided after an iteration, and why.

use std::time::Duration;

use super::forecast::Forecast;
use super::stun::Slowdown;

/// An iteration of pre-copy that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Iteration {
    /// The number of the iteration, from 1.
    pub number: u32,
    /// The time that it took.
    pub duration: Duration,
    /// The number of pages of 4 KiB that the guest dirtied during the iteration, each counted once.
    pub dirtied_pages: u64,
    /// The number of bytes to send if the guest were paused now: what was dirtied and what is left over.
    pub remaining_bytes: u64,
}

/// A decision, and what it is based on. It displays as a clause that begins with a verb.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// The decision.
    pub decision: Decision,
    /// The figures that the decision is based on.
    pub figures: Figures,
    /// The pause if the guest were paused now. Everything that remains is sent in it, or nothing if the decision is
    /// post-copy.
    pub forecast: Forecast,
    /// The expected pause after one more iteration, which is never longer than the one now.
    pub forecast_after_another: Forecast,
}

/// A decision what to do next. It displays as a clause that begins with a verb.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decision {
    /// Another iteration is copied. A guest that is stunned stays so.
    Continue,
    /// Another iteration is copied, and the guest's writes are limited from now on.
    Stun {
        /// The number of pages of 4 KiB per second that the guest may write.
        /// [`Convergence::stun_target`](super::Convergence::stun_target) follows the lanes.
        pages_per_second: u64,
        /// The reason, for the operator.
        why: Why,
    },
    /// The guest is paused, and the rest is sent.
    SwitchOver,
    /// The guest is paused, and the destination runs it before the rest is there.
    Postcopy {
        /// The reason, for the operator.
        why: Why,
    },
    /// The guest is left running where it is.
    GiveUp {
        /// The reason, for the operator.
        why: Why,
    },
}

/// The reason why iterations do not just go on. It displays as a sentence that says what was found and what can be done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Why {
    /// The kind of the reason.
    pub reason: Reason,
    /// The figures that the decision is based on.
    pub figures: Figures,
}

/// The figures that a decision is based on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    /// The number of the iteration that has ended, or 0 before the first.
    pub iteration: u32,
    /// The rate at which the guest dirtied pages during the iteration, in bytes per second.
    pub dirty_bytes_per_second: f64,
    /// What the lanes deliver, in bytes per second, if that is known.
    pub bandwidth: Option<f64>,
    /// The number of bytes that would be sent in the pause.
    pub remaining_bytes: u64,
    /// The expected pause with these figures, including its margin.
    pub downtime: Duration,
    /// The pause that the order allows.
    pub downtime_limit: Duration,
    /// How far the guest is slowed from now on, or would have to be slowed.
    pub stun: Option<Slowdown>,
}

/// The kind of a reason ([`Why`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The order asks for post-copy in any case.
    Ordered,
    /// Even with nothing left to send the pause would not fit the limit.
    LimitTooShort,
    /// The guest has dirtied about as much during the iteration as the lanes deliver, or more.
    Outrun,
    /// Iterations have not shrunk for a while.
    StoppedShrinking,
    /// Half of [`Policy::max_iterations`](super::Policy::max_iterations) are over, and the rest may not be enough without
    /// a stun.
    ShrinkingSlowly,
    /// The guest would have to be slowed more than [`Policy::max_stun_percent`](super::Policy::max_stun_percent) allows.
    StunTooWeak,
    /// [`Policy::max_iterations`](super::Policy::max_iterations) are over.
    TooManyIterations,
}
