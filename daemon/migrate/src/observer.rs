//! What the engine measures, for whoever keeps metrics.

use std::time::Duration;

use memlane_guest::StunReport;
use memlane_lane::Totals;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::control::FetchReport;

use crate::progress::Outcome;

/// Told what the engine measures, on the control thread. What is under way it sees in the migrations' progress.
pub trait Observer {
    /// Takes note of a measurement.
    fn measured(&self, measurement: Measurement<'_>);
    /// Takes note that a guest was announced with one frame. Called on a thread of its own.
    fn announced(&self) -> fn();
}

/// One thing that was measured.
#[derive(Clone, Copy, Debug)]
pub enum Measurement<'m> {
    /// A migration ended so on this host.
    Ended(Outcome),
    /// An order or an offer was refused, in this respect.
    Refused(&'static str),
    /// Pages were told as holes, without being read.
    Holes {
        /// How many.
        pages: u64,
    },
    /// A lane has carried more.
    Carried {
        /// Its port.
        port: &'m Label,
        /// Whether the lane sends.
        sending: bool,
        /// How much more.
        fresh: Totals,
    },
    /// Lanes that sent over this port were lost.
    LanesLost {
        /// The port.
        port: &'m Label,
        /// How many.
        lanes: u32,
    },
    /// A port has a lane again that it had lost.
    LaneReopened {
        /// The port.
        port: &'m Label,
    },
    /// An iteration of pre-copy ended.
    Iteration {
        /// How long it took.
        took: Duration,
        /// Pages that the guest wrote meanwhile.
        dirtied_pages: u64,
    },
    /// Tracking of a guest's writes began, which took so long.
    TrackingStarted(Duration),
    /// A guest stood still.
    Downtime {
        /// For so long,
        actual: Duration,
        /// and was expected to for so long.
        predicted: Duration,
    },
    /// A guest's writes are held up from now on, which took so long to begin.
    StunBegan(Duration),
    /// A stun went on.
    Stunned {
        /// How it stood when it was told last.
        before: &'m StunReport,
        /// How it stands.
        now: &'m StunReport,
    },
    /// Fetching went on.
    Fetched {
        /// How it stood when it was told last.
        before: &'m FetchReport,
        /// How it stands.
        now: &'m FetchReport,
    },
}
