//! How a migration stands, for everyone else on this host.

use std::fmt;

use memlane_protocol::wire::control::FetchReport;

/// One migration, under way or ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// Identity, the same on both hosts.
    pub id: String,
    /// Name of the guest.
    pub guest: String,
    /// Name of the destination.
    pub host: String,
    /// Which half of it this daemon does.
    pub role: Role,
    /// What is being done now.
    pub phase: Phase,
    /// How it ended; `null` while it is under way.
    pub outcome: Option<Outcome>,
    /// Why it ended so, or what it waits for.
    pub reason: Option<String>,
    /// Name of the host where the guest runs; `null` while it stands still, or that is not known.
    pub guest_runs_at: Option<String>,
    /// Since when it is not known whose the guest is, as far as this daemon has waited, in seconds since
    /// 1970-01-01T00:00:00Z; `null` while that is known.
    pub in_doubt_since_unix_seconds: Option<f64>,
    /// What a migration that is in doubt, or was taken up after a restart, waits for; `null` if for nothing.
    pub waits_for: Option<String>,
    /// The last decision on how to go on, and the figures that it was made from.
    pub decision: Option<String>,
    /// When the order was taken, in seconds since 1970-01-01T00:00:00Z.
    pub started_at_unix_seconds: f64,
    /// From the order to the end, or until now.
    pub total_seconds: f64,
    /// Longest pause allowed.
    pub downtime_limit_seconds: f64,
    /// From the guest's last instruction at the source to its first at the destination, as
    /// measured between the daemons.
    pub downtime_seconds: Option<f64>,
    /// When the guest's last vCPU stood still at the source, as its VMM tells it, in seconds since
    /// 1970-01-01T00:00:00Z by the source's clock.
    pub stopped_at_seconds: Option<f64>,
    /// When the guest ran again at the destination, as its VMM tells it, by the destination's clock.
    pub resumed_at_seconds: Option<f64>,
    /// What the pause would take now, or was expected to take when it began.
    pub downtime_predicted_seconds: Option<f64>,
    /// The terms of that prediction.
    pub forecast: Option<Forecast>,
    /// Whether digests of all RAM were equal at both ends; `null` where they were not compared.
    pub digest_verified: Option<bool>,
    /// Pages of the guest.
    pub pages_total: u64,
    /// Pages yet to be sent in this round.
    pub pages_remaining: u64,
    /// Bytes on the wire, headers included.
    pub bytes_sent: u64,
    /// Bytes of pages that were compressed to be sent, before that; those of a lost lane count again.
    pub uncompressed_bytes: u64,
    /// Bytes that `uncompressed_bytes` became.
    pub compressed_bytes: u64,
    /// Pages sent with their contents; a page sent twice counts twice.
    pub pages_sent: u64,
    /// Pages sent as zeroes, without contents.
    pub zero_pages: u64,
    /// Pages sent as holes, without being read.
    pub hole_pages: u64,
    /// Bytes of pages, as they are before they are compressed, that all lanes deliver together, measured lately.
    pub bandwidth_bytes_per_second: f64,
    /// Rounds so far; the last one may be under way.
    pub rounds: Vec<Round>,
    /// Lanes, on all ports.
    pub lanes: Vec<Lane>,
    /// How the guest's writes were slowed; `null` if they never were.
    pub stun: Option<Stun>,
    /// Running at the destination without all of its memory; `null` if it never did.
    pub postcopy: Option<Postcopy>,
    /// Time that it took to begin to track the guest's writes.
    pub tracking_start_seconds: Option<f64>,
    /// Bytes of the VMM's state, without RAM.
    pub vmm_state_bytes: Option<u64>,
    /// Time that the VMM took to save its state.
    pub save_seconds: Option<f64>,
    /// Time that the destination's VMM took to load it.
    pub load_seconds: Option<f64>,
}

/// Which half of a migration a daemon does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Role {
    /// It sends the guest.
    #[default]
    Source,
    /// It takes the guest.
    Destination,
}

/// What a migration is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Finds out whether the guest can move.
    #[default]
    Preflight,
    /// Opens lanes, begins to track writes.
    Preparing,
    /// Sends pages while the guest runs.
    Copying,
    /// The guest stands still: the last pages and the VMM's state are sent.
    SwitchingOver,
    /// The guest belongs to the destination, which starts it.
    Committing,
    /// The guest runs at the destination, which fetches what is missing of its memory.
    Fetching,
    /// Ended; see the outcome.
    Ended,
}

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The guest runs at the destination.
    Completed,
    /// The guest runs on at the source.
    Failed,
    /// Cancelled by an operator: the guest runs on at the source.
    Cancelled,
    /// It never began.
    Refused,
    /// The guest was handed over, and runs nowhere whole: its VMM at the destination ended before it was known to run,
    /// or it ran there without all of its memory, and what was missing will never come. The source's copy is out of
    /// date.
    Lost,
}

/// The terms of a predicted downtime; they add up to it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Forecast {
    /// Sending the pages that remain.
    pub remaining_seconds: f64,
    /// Round trips between the daemons.
    pub round_trip_seconds: f64,
    /// Saving, sending and loading the VMM's state.
    pub state_seconds: f64,
    /// Letting the vCPUs go.
    pub resume_seconds: f64,
    /// Comparing digests, where that was ordered.
    pub verify_seconds: f64,
    /// What earlier predictions were short by.
    pub margin_seconds: f64,
}

/// One pass of pre-copy.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Round {
    /// Its number, from 1.
    pub round: u32,
    /// Pages that were dirty when it began.
    pub pages: u64,
    /// Bytes that it put on the wire.
    pub bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// Pages that the guest wrote meanwhile.
    pub dirtied_pages: u64,
    /// How long it took to find them.
    pub harvest_seconds: f64,
}

/// How a guest's writes are slowed while it is copied. All rates are over the time that they were.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stun {
    /// For how long they were.
    pub seconds: f64,
    /// Pages of 4 KiB that the guest was let write; those of 2 MiB count as 512.
    pub released_pages_per_second: f64,
    /// Pages that it might have written, which follows what the lanes deliver.
    pub target_pages_per_second: f64,
    /// How long it took to begin, while the guest ran on.
    pub switch_seconds: f64,
}

/// How post-copy goes, as the destination sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Postcopy {
    /// Accesses to missing pages that had to wait; several to one page count once.
    pub faults: u64,
    /// From the moment that the daemon saw such an access until the page was placed, in microseconds:
    /// the median,
    pub fault_p50_us: f64,
    /// what 99 of 100 did not exceed,
    pub fault_p99_us: f64,
    /// and the longest.
    pub fault_max_us: f64,
    /// Pages that came because an access waited for them.
    pub pages_fetched: u64,
    /// Pages that came before anybody asked for them.
    pub pages_streamed: u64,
    /// Pages that are still missing.
    pub remaining_pages: u64,
    /// For how long the guest has run without all of its memory.
    pub seconds: f64,
    /// What fetching waits for; `null` while pages can come.
    pub waits_for: Option<String>,
}

/// One TCP stream of a migration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lane {
    /// Name of the port that it is bound to.
    pub port: String,
    /// Its number within the migration.
    pub lane: u16,
    /// Address and port here.
    pub local: String,
    /// Address and port at the other host.
    pub remote: String,
    /// Bytes that it carried.
    pub bytes: u64,
    /// Bytes of these that the network card read from the guest's memory.
    pub zero_copy_bytes: u64,
    /// Bytes of these that the kernel copied.
    pub copied_bytes: u64,
    /// What it delivers, measured lately.
    pub bytes_per_second: f64,
    /// How it is.
    pub state: LaneState,
    /// How often it was lost so far; while the migration lasts, its port is tried again and again.
    pub losses: u32,
}

/// How a lane is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LaneState {
    /// Being connected.
    #[default]
    Connecting,
    /// Carries pages.
    Up,
    /// Lost; the other lanes carry its share.
    Lost,
    /// Closed in good order.
    Closed,
}

impl Progress {
    /// A migration of which nothing is done yet.
    pub fn new(id: impl Into<String>, guest: impl Into<String>, host: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            guest: guest.into(),
            host: host.into(),
            role: Role::default(),
            phase: Phase::default(),
            outcome: None,
            reason: None,
            guest_runs_at: None,
            in_doubt_since_unix_seconds: None,
            waits_for: None,
            decision: None,
            started_at_unix_seconds: 0.0,
            total_seconds: 0.0,
            downtime_limit_seconds: 0.0,
            downtime_seconds: None,
            stopped_at_seconds: None,
            resumed_at_seconds: None,
            downtime_predicted_seconds: None,
            forecast: None,
            digest_verified: None,
            pages_total: 0,
            pages_remaining: 0,
            bytes_sent: 0,
            uncompressed_bytes: 0,
            compressed_bytes: 0,
            pages_sent: 0,
            zero_pages: 0,
            hole_pages: 0,
            bandwidth_bytes_per_second: 0.0,
            rounds: Vec::new(),
            lanes: Vec::new(),
            stun: None,
            postcopy: None,
            tracking_start_seconds: None,
            vmm_state_bytes: None,
            save_seconds: None,
            load_seconds: None,
        }
    }
}

impl Postcopy {
    /// Takes over what the destination tells, unless something later was heard over another connection.
    pub fn report(&mut self, report: &FetchReport) {
        let placed = report.pages_fetched.saturating_add(report.pages_streamed);
        if placed < self.pages_fetched.saturating_add(self.pages_streamed) {
            return;
        }
        let microseconds = |nanoseconds: u64| nanoseconds as f64 / 1e3;
        self.faults = report.faults;
        self.fault_p50_us = microseconds(report.fault_p50_nanoseconds);
        self.fault_p99_us = microseconds(report.fault_p99_nanoseconds);
        self.fault_max_us = microseconds(report.fault_max_nanoseconds);
        self.pages_fetched = report.pages_fetched;
        self.pages_streamed = report.pages_streamed;
        self.remaining_pages = report.remaining_pages;
        self.seconds = report.nanoseconds as f64 / 1e9;
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
            Self::Lost => "lost",
        })
    }
}
