//! The progress of a migration tells everyone else on this host how it stands.

use std::fmt;

use memlane_protocol::wire::control::FetchReport;

/// A migration that is under way or has ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// This is the migration's identity, which is the same on both hosts.
    pub id: String,
    /// This is the name of the guest.
    pub guest: String,
    /// This is the name of the destination.
    pub host: String,
    /// This is the side of it that this daemon does.
    pub role: Role,
    /// The order was taken at this time, in seconds since 1970-01-01T00:00:00Z.
    pub started_at_unix_seconds: f64,
    /// This is the time from the order to the end, or until now.
    pub total_seconds: f64,
    /// If it fails, the order is tried again so many times.
    pub retries_left: u32,
    /// It is another try of the order of this migration, which failed.
    pub retry_of: Option<String>,
    /// This is what it does and waits for, and how it ended.
    pub status: MigrationStatus,
    /// This is what was sent of the guest's memory, and what is left.
    pub ram: RamStats,
    /// This is the guest's pause, as it is expected and as it was.
    pub pause: PauseStats,
    /// These are the lanes, on all ports.
    pub lanes: Vec<Lane>,
    /// This is how the guest's writes were slowed. It is `None` if they never were.
    pub stun: Option<Stun>,
    /// This is how the guest runs at the destination without all of its memory. It is `None` if it never did.
    pub postcopy: Option<Postcopy>,
}

/// What a migration does and waits for, and how it ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MigrationStatus {
    /// This is being done now.
    pub phase: Phase,
    /// This is how it ended. It is `None` while it is under way.
    pub outcome: Option<Outcome>,
    /// This is why it ended so, or what it waits for.
    pub reason: Option<String>,
    /// The guest runs on this host. It is `None` while the guest is paused, or while that is not known.
    pub guest_runs_at: Option<String>,
    /// Since this time it is not known which host owns the guest, as far as this daemon has waited, in seconds since
    /// 1970-01-01T00:00:00Z. It is `None` while that is known.
    pub in_doubt_since_unix_seconds: Option<f64>,
    /// A migration that is in doubt, or was taken up after a restart, waits for this. It is `None` if it waits for
    /// nothing.
    pub waits_for: Option<String>,
    /// This is the last decision on how to go on, and the figures that it was made from.
    pub decision: Option<String>,
}

/// What a migration has sent of the guest's memory, and what is left.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RamStats {
    /// It took this long to begin to track the guest's writes.
    pub tracking_start_seconds: Option<f64>,
    /// The guest has this many pages.
    pub pages_total: u64,
    /// This many pages are yet to be sent in this iteration.
    pub pages_remaining: u64,
    /// This many bytes went over the wire, with headers.
    pub bytes_sent: u64,
    /// This many bytes of pages were compressed to be sent, counted before that. Those of a lost lane count again.
    pub uncompressed_bytes: u64,
    /// This many bytes `uncompressed_bytes` became.
    pub compressed_bytes: u64,
    /// This many pages were sent with their contents. A page that was sent twice counts twice.
    pub pages_sent: u64,
    /// This many pages were sent as zeroes, without contents.
    pub zero_pages: u64,
    /// This many pages were sent as holes, without being read.
    pub hole_pages: u64,
    /// Block I/O of the guest stood still for this long at most, each time that it had to come to an end before pages could
    /// be read. It is `None` if the guest has no disk that bypasses the page cache.
    pub longest_io_stall_seconds: Option<f64>,
    /// All lanes together deliver this many bytes of pages per second, as they are before they are compressed, measured
    /// lately.
    pub bandwidth_bytes_per_second: f64,
    /// These are the iterations so far. The last one may be under way.
    pub iterations: Vec<Iteration>,
}

/// The pause of a guest, as it is expected and as it was.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PauseStats {
    /// The pause may take this long.
    pub downtime_limit_seconds: f64,
    /// The pause would take this long now, or was expected to take this long when it began.
    pub downtime_predicted_seconds: Option<f64>,
    /// These are the terms of that prediction.
    pub forecast: Option<Forecast>,
    /// This is the time from the guest's last instruction at the source to its first at the destination, as measured
    /// between the daemons.
    pub downtime_seconds: Option<f64>,
    /// The guest's last vCPU stopped at the source at this time, as its VMM tells it, in seconds since
    /// 1970-01-01T00:00:00Z by the source's clock.
    pub stopped_at_seconds: Option<f64>,
    /// The guest ran again at the destination at this time, as its VMM tells it, by the destination's clock.
    pub resumed_at_seconds: Option<f64>,
    /// This tells whether digests of all RAM were equal at both ends. It is `None` where they were not compared.
    pub digest_verified: Option<bool>,
    /// The VMM's state has this many bytes, without RAM.
    pub vmm_state_bytes: Option<u64>,
    /// The VMM took this long to save its state.
    pub save_seconds: Option<f64>,
    /// The destination's VMM took this long to load it, from when the last of it had come.
    pub load_seconds: Option<f64>,
    /// The guest did not run when it was to be paused, and stays so wherever it ends up. This is the word of its VMM for
    /// that, such as `paused`.
    pub guest_stays: Option<String>,
}

/// The side of a migration that a daemon does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Role {
    /// The daemon sends the guest.
    #[default]
    Source,
    /// The daemon takes the guest.
    Destination,
}

/// The step that a migration is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Phase {
    /// It finds out whether the guest can move.
    #[default]
    Preflight,
    /// It opens lanes and begins to track writes.
    Preparing,
    /// It sends pages while the guest runs.
    Copying,
    /// The guest is paused, and the last pages and the VMM's state are sent.
    SwitchingOver,
    /// The guest belongs to the destination, which starts it.
    Committing,
    /// The guest runs at the destination, which fetches what is missing of its memory.
    Fetching,
    /// It has ended, as the outcome says.
    Ended,
}

/// The outcome of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The guest runs at the destination.
    Completed,
    /// The guest runs on at the source.
    Failed,
    /// An operator has cancelled it, and the guest runs on at the source.
    Cancelled,
    /// It never began.
    Refused,
    /// The guest was handed over, and runs nowhere whole: its VMM at the destination ended before it was known to run,
    /// or it ran there without all of its memory, and what was missing will never come. The source's copy is out of
    /// date.
    Lost,
    /// The guest shut itself down during the migration, and its VMM ended with it. Nothing is lost.
    PoweredOff,
}

/// The terms of a predicted downtime; they add up to it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Forecast {
    /// Sending the pages that remain takes this long.
    pub remaining_seconds: f64,
    /// Round trips between the daemons take this long.
    pub round_trip_seconds: f64,
    /// Saving, sending and loading the VMM's state takes this long.
    pub state_seconds: f64,
    /// Letting the vCPUs run takes this long.
    pub resume_seconds: f64,
    /// Comparing digests takes this long, where that was ordered.
    pub verify_seconds: f64,
    /// Earlier predictions were short by this much.
    pub margin_seconds: f64,
}

/// One pass of pre-copy.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Iteration {
    /// This is its number, counted from 1.
    pub number: u32,
    /// This many pages were dirty when it began.
    pub pages: u64,
    /// It put this many bytes on the wire.
    pub bytes: u64,
    /// It took this long.
    pub seconds: f64,
    /// The guest wrote this many pages meanwhile.
    pub dirtied_pages: u64,
    /// It took this long to find them.
    pub harvest_seconds: f64,
}

/// This is how a guest's writes are slowed while it is copied. All rates are over the time in which they were slowed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stun {
    /// They were slowed for this long.
    pub seconds: f64,
    /// The guest was let write this many pages of 4 KiB per second. A page of 2 MiB counts as 512.
    pub released_pages_per_second: f64,
    /// The guest might have written this many pages per second, which follows what the lanes deliver.
    pub target_pages_per_second: f64,
    /// It took this long to begin, while the guest ran on.
    pub switch_seconds: f64,
}

/// The state of post-copy, as the destination sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Postcopy {
    /// This many accesses to missing pages had to wait. Several to one page count once.
    pub faults: u64,
    /// This is the median of the times from the moment at which the daemon saw such an access until the page was
    /// placed, in microseconds.
    pub fault_p50_us: f64,
    /// In microseconds, 99 of 100 of these times did not exceed this.
    pub fault_p99_us: f64,
    /// This is the longest of these times, in microseconds.
    pub fault_max_us: f64,
    /// This many pages came because an access waited for them.
    pub pages_fetched: u64,
    /// This many pages came before an access waited for them.
    pub pages_streamed: u64,
    /// This many pages are missing.
    pub remaining_pages: u64,
    /// The guest has run for this long without all of its memory.
    pub seconds: f64,
    /// Fetching waits for this. It is `None` while pages can come.
    pub waits_for: Option<String>,
}

impl Postcopy {
    /// Notes that the migration is over. If it is `complete`, nothing is missing: the last report may come after the word
    /// that says so.
    pub(crate) fn end(&mut self, complete: bool) {
        self.waits_for = None;
        if complete {
            self.remaining_pages = 0;
        }
    }
}

/// One TCP stream of a migration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lane {
    /// This is the name of the port that it is bound to.
    pub port: String,
    /// This is its number within the migration.
    pub lane: u16,
    /// This is the address and port here.
    pub local: String,
    /// This is the address and port at the other host.
    pub remote: String,
    /// It carried this many bytes.
    pub bytes: u64,
    /// The network card read this many of these bytes from the guest's memory.
    pub zero_copy_bytes: u64,
    /// The kernel copied this many of these bytes.
    pub copied_bytes: u64,
    /// It delivers this many bytes per second, measured lately.
    pub bytes_per_second: f64,
    /// This is the state that it is in.
    pub state: LaneState,
    /// It was lost this many times so far. While the migration lasts, its port is tried again and again.
    pub losses: u32,
}

/// The state of a lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LaneState {
    /// It is being connected.
    #[default]
    Connecting,
    /// It carries pages.
    Up,
    /// It was lost, and the other lanes carry its share.
    Lost,
    /// It was closed in good order.
    Closed,
}

impl Progress {
    /// Makes the progress of a migration of which nothing is done yet.
    pub fn new(id: impl Into<String>, guest: impl Into<String>, host: impl Into<String>) -> Self {
        Self { id: id.into(), guest: guest.into(), host: host.into(), ..Self::default() }
    }
}

impl Postcopy {
    /// Takes over what the destination reports, unless something later was heard over another connection.
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
            Self::PoweredOff => "powered off",
        })
    }
}
