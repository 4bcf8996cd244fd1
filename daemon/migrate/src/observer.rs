//! The engine reports what it measures to an observer, which may keep metrics of it.

use std::time::Duration;

use memlane_guest::StunReport;
use memlane_lane::Totals;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::control::FetchReport;

use crate::progress::Outcome;

/// An observer hears what the engine measures, on the control thread. What is under way it sees in the migrations'
/// progress.
pub trait Observer {
    /// Takes note of a measurement.
    fn measured(&self, measurement: Measurement<'_>);
    /// Returns what notes that a guest was announced with one frame. That is called on a thread of its own.
    fn announced(&self) -> fn();
}

/// One thing that was measured.
#[derive(Clone, Copy, Debug)]
pub enum Measurement<'m> {
    /// A migration ended on this host with this outcome.
    Ended(Outcome),
    /// An order or an offer was refused for this reason, one word.
    Refused(&'static str),
    /// Pages were sent as holes, without being read.
    Holes {
        /// It was this many pages.
        pages: u64,
    },
    /// A lane has carried more.
    Carried {
        /// This is the lane's port.
        port: &'m Label,
        /// This tells whether the lane sends.
        sending: bool,
        /// The lane has carried this much more.
        fresh: Totals,
    },
    /// Lanes that sent over this port were lost.
    LanesLost {
        /// This is the port.
        port: &'m Label,
        /// It was this many lanes.
        lanes: u32,
    },
    /// A port has a lane again that it had lost.
    LaneReopened {
        /// This is the port.
        port: &'m Label,
    },
    /// An iteration of pre-copy ended.
    Iteration {
        /// The iteration took this long.
        took: Duration,
        /// The guest wrote this many pages meanwhile.
        dirtied_pages: u64,
    },
    /// A guest writes faster than its memory is sent, and this one word is what is done about it: `stun`, `postcopy` or
    /// `give_up`.
    NotConverging(&'static str),
    /// Tracking of a guest's writes began, which took this long.
    TrackingStarted(Duration),
    /// Block I/O of a guest stood still for this long, so that pages could be read.
    BlockIoStalled(Duration),
    /// A guest was paused and runs again.
    Downtime {
        /// It was paused for this long.
        actual: Duration,
        /// The pause was predicted to take this long.
        predicted: Duration,
        /// The pause was allowed to take this long.
        limit: Duration,
    },
    /// A guest's writes are held up from now on, which took this long to begin.
    StunBegan(Duration),
    /// A stun went on.
    Stunned {
        /// This is how it stood at the last report.
        before: &'m StunReport,
        /// This is how it stands now.
        now: &'m StunReport,
    },
    /// Fetching went on.
    Fetched {
        /// This is how it stood at the last report.
        before: &'m FetchReport,
        /// This is how it stands now.
        now: &'m FetchReport,
    },
}
