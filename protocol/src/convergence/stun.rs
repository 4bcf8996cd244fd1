//! How far a guest's writes are slowed.
//!
//! A stunned guest may dirty a share of what the lanes deliver, so that each round is
//! shorter than the one before by that factor, and never less than the order lets it keep.

use super::{PATIENCE, Policy};
use crate::PAGE_SIZE;

/// What a stunned guest may dirty at first, as a share of the bandwidth or, if that is less, of
/// what it dirtied before: rounds halve.
const FIRST_SHARE: f64 = 0.5;
/// By what the share is multiplied after a round under stun that did not shrink.
const TIGHTER: f64 = 0.5;
/// With more than this share of the bandwidth rounds would hardly shrink: a guest that may keep
/// more is better not slowed at all.
const LARGEST_SHARE: f64 = 0.75;
/// Nor is a guest that happened to write little slowed below this, in bytes per second: 256
/// pages, which no wire minds.
const LEAST: f64 = 1024.0 * 1024.0;

/// How far a guest's writes are slowed, or would have to be. Rates are in bytes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Slowdown {
    /// What the guest dirtied in its last round without.
    pub unstunned: f64,
    /// What it is held to, or would have to be.
    pub target: f64,
    /// What the order lets it keep at least.
    pub floor: f64,
    /// How much of its writing the order lets it lose ([`Policy::max_stun_percent`]).
    pub max_percent: u8,
}

impl Slowdown {
    /// How much of its writing the guest loses at the target, rounded up.
    pub fn percent(&self) -> u8 {
        ((1.0 - self.target / self.unstunned) * 100.0).ceil().clamp(0.0, 100.0) as u8
    }

    /// The target in pages of 4 KiB per second.
    pub fn pages_per_second(&self) -> u64 {
        (self.target / PAGE_SIZE as f64) as u64
    }
}

/// The stun of one guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stun {
    /// Of the bandwidth.
    share: f64,
    unstunned: f64,
    floor: f64,
    max_percent: u8,
}

impl Stun {
    /// For a guest that dirties `unstunned` bytes per second.
    ///
    /// # Errors
    ///
    /// How far it would have to be slowed, which is further than it may be.
    pub(super) fn begin(unstunned: f64, bandwidth: Option<f64>, policy: &Policy) -> Result<Self, Slowdown> {
        let bandwidth = usable(bandwidth);
        let stun = Self {
            share: FIRST_SHARE * (unstunned / bandwidth).min(1.0),
            unstunned,
            floor: unstunned * policy.kept_share(),
            max_percent: policy.max_stun_percent,
        };
        if stun.floor <= LARGEST_SHARE * bandwidth {
            Ok(stun)
        } else {
            Err(stun.at(LARGEST_SHARE * bandwidth))
        }
    }

    /// What the guest is held to while the lanes deliver `bandwidth`.
    pub(super) fn slowdown(&self, bandwidth: Option<f64>) -> Slowdown {
        self.at((self.share * usable(bandwidth)).max(self.lowest()))
    }

    /// Slows the guest further: the last `stalled` rounds in a row have not shrunk. `None` if it
    /// is as slow as it may be, and that has not had its rounds yet.
    ///
    /// # Errors
    ///
    /// How far it would have to be slowed next, if it has had its rounds as slow as it may
    /// be; or as many of any kind, if there is an alternative.
    pub(super) fn tighten(
        &mut self,
        bandwidth: Option<f64>,
        stalled: u32,
        has_alternative: bool,
    ) -> Result<Option<Slowdown>, Slowdown> {
        let slowest = self.share * usable(bandwidth) <= self.lowest();
        if stalled >= PATIENCE && (slowest || has_alternative) {
            return Err(self.at(self.slowdown(bandwidth).target * TIGHTER));
        }
        if slowest {
            return Ok(None);
        }
        self.share *= TIGHTER;
        Ok(Some(self.slowdown(bandwidth)))
    }

    fn lowest(&self) -> f64 {
        self.floor.max(LEAST)
    }

    fn at(&self, target: f64) -> Slowdown {
        Slowdown { unstunned: self.unstunned, target, floor: self.floor, max_percent: self.max_percent }
    }
}

/// A bandwidth to calculate with: nothing if nothing is known.
fn usable(bandwidth: Option<f64>) -> f64 {
    bandwidth.filter(|rate| *rate > 0.0).unwrap_or(0.0)
}
