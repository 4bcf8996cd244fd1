//! The stun: how far a guest's writes are slowed.
//!
//! A stunned guest may dirty a share of what the lanes deliver, so that each iteration is
//! shorter than the one before by that factor, and never less than the order lets it keep.

use super::policy::Policy;
use crate::PAGE_SIZE;

/// Iterations have stopped shrinking when so many in a row did not shrink.
pub(super) const PATIENCE: u32 = 3;

/// The share of the bandwidth that a stunned guest may dirty at first or, if that is less, the share of what it dirtied
/// before. Iterations halve.
const FIRST_SHARE: f64 = 0.5;
/// The factor by which the share changes after an iteration with a stunned guest that did not shrink.
const TIGHTER: f64 = 0.5;
/// The largest share. With more than this share of the bandwidth, iterations would hardly shrink, so a guest that may
/// keep more is better not slowed at all.
const LARGEST_SHARE: f64 = 0.75;
/// The lowest target in bytes per second (256 pages per second). It is for a guest that happened to write little before.
const LEAST: f64 = 1024.0 * 1024.0;

/// How far a guest's writes are slowed, or would have to be. Rates are in bytes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Slowdown {
    /// What the guest dirtied in the last iteration without a stun.
    pub unstunned: f64,
    /// The rate to which the guest is slowed, or would have to be slowed.
    pub target: f64,
    /// The rate that the order lets the guest keep at least.
    pub floor: f64,
    /// The share of its rate that the order lets the guest lose ([`Policy::max_stun_percent`]), in percent.
    pub max_percent: u8,
}

impl Slowdown {
    /// Returns the share of its rate that the guest loses at the target, in percent, rounded up.
    pub fn percent(&self) -> u8 {
        ((1.0 - self.target / self.unstunned) * 100.0).ceil().clamp(0.0, 100.0) as u8
    }

    /// Returns the target in pages of 4 KiB per second.
    pub fn pages_per_second(&self) -> u64 {
        (self.target / PAGE_SIZE as f64) as u64
    }
}

/// The stun of one guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stun {
    /// The share of the bandwidth that the guest may dirty.
    share: f64,
    unstunned: f64,
    floor: f64,
    max_percent: u8,
}

impl Stun {
    /// Begins to stun a guest that dirties `unstunned` bytes per second.
    ///
    /// # Errors
    ///
    /// Returns how far the guest would have to be slowed, if that is further than allowed.
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

    /// Returns how far the guest is slowed while the lanes deliver `bandwidth` bytes per second.
    pub(super) fn slowdown(&self, bandwidth: Option<f64>) -> Slowdown {
        self.at((self.share * usable(bandwidth)).max(self.lowest()))
    }

    /// Slows the guest further, because the last `stalled` iterations in a row have not shrunk. Returns `None` if the guest
    /// is as slow as it may be, and has not had [`PATIENCE`] iterations like that yet.
    ///
    /// # Errors
    ///
    /// Returns how far the guest would have to be slowed next, if it has had [`PATIENCE`] iterations as slow as it may be,
    /// or as many of any kind if there is an alternative.
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

/// Returns a bandwidth to calculate with, which is 0 if nothing is known.
fn usable(bandwidth: Option<f64>) -> f64 {
    bandwidth.filter(|rate| *rate > 0.0).unwrap_or(0.0)
}
