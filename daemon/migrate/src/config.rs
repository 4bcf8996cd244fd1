//! This module holds what the configuration says of migrations.

use std::time::Duration;

use memlane_api::units::{Rate, Size};
use memlane_protocol::compression;
use memlane_protocol::convergence::Converge;

/// The `[limits]` table of the configuration bounds migrations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A guest may be paused this long, where the order names no limit.
    pub downtime: Duration,
    /// Orders are refused where the ports cannot deliver this rate, unless the order names another.
    pub min_bandwidth: Rate,
    /// Pre-copy may take this many iterations, where the order names no number.
    pub max_iterations: u32,
    /// This is done when iterations do not shrink, where the order does not say.
    pub converge: Converge,
    /// A guest may lose this much of its writing to stun, in percent, where the order does not say.
    /// [`Limits::max_stun_percent`] says what holds where this does not say either.
    pub max_stun: Option<u8>,
    /// This says whether lanes may compress, where the order does not say.
    pub compression: compression::Mode,
    /// While a guest is copied, the other host may be out of reach for this long, where the order does not say.
    pub patience: Duration,
    /// A peer or a lane that says nothing for this long is gone.
    pub silence: Duration,
    /// Arriving guests must leave this much memory free on this host.
    pub memory_reserve: Size,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(300),
            min_bandwidth: Rate(250_000_000),
            max_iterations: 50,
            converge: Converge::None,
            max_stun: None,
            compression: compression::Mode::Auto,
            patience: Duration::from_secs(30),
            silence: Duration::from_secs(5),
            memory_reserve: Size(256 << 20),
        }
    }
}

impl Limits {
    /// Returns how much of its writing a guest may lose to stun, in percent, where the order does not say. With
    /// post-copy to fall back on, a guest need not be slowed to a crawl.
    pub fn max_stun_percent(&self, converge: Converge) -> u8 {
        self.max_stun.unwrap_or(if converge == Converge::Auto { 75 } else { 99 })
    }
}
