//! What the configuration says of migrations.

use std::time::Duration;

use memlane_api::units::{Rate, Size};
use memlane_protocol::compression;
use memlane_protocol::convergence::Converge;

/// `[limits]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest pause of a guest, where the order names none.
    pub downtime: Duration,
    /// Orders are refused where the ports cannot deliver this, unless the order names a rate.
    pub min_bandwidth: Rate,
    /// Rounds of pre-copy, where the order names no number.
    pub max_rounds: u32,
    /// What to do when rounds do not shrink, where the order does not say.
    pub converge: Converge,
    /// How much of its writing a guest may lose to stun, in percent, where the order does not say; see
    /// [`Limits::max_stun_percent`] for what holds where this does not say either.
    pub max_stun: Option<u8>,
    /// Whether lanes may compress, where the order does not say.
    pub compression: compression::Mode,
    /// A peer or a lane that says nothing for so long is gone.
    pub silence: Duration,
    /// Memory that arriving guests must leave free on this host.
    pub memory_reserve: Size,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(300),
            min_bandwidth: Rate(250_000_000),
            max_rounds: 50,
            converge: Converge::None,
            max_stun: None,
            compression: compression::Mode::Auto,
            silence: Duration::from_secs(5),
            memory_reserve: Size(256 << 20),
        }
    }
}

impl Limits {
    /// How much of its writing a guest may lose to stun, in percent, where the order does not say: with
    /// post-copy to fall back on it is not worth slowing a guest to a crawl.
    pub fn max_stun_percent(&self, converge: Converge) -> u8 {
        self.max_stun.unwrap_or(if converge == Converge::Auto { 75 } else { 99 })
    }
}
