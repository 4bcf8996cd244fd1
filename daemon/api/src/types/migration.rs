//! The state and progress of a migration.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The identity of a migration on both hosts: 32 hexadecimal digits.
pub type MigrationName = String;

/// A migration that is under way or has ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Migration {
    /// This is the identity, which is the same on both hosts.
    pub id: MigrationName,
    /// This is the name of the guest.
    pub guest: String,
    /// This is the name of the destination.
    pub host: String,
    /// This says which side of the migration this daemon is.
    pub role: Role,
    /// This is the phase that the migration is in.
    pub phase: Phase,
    /// This says how the migration ended; `null` while it is under way.
    pub outcome: Option<Outcome>,
    /// This says why it ended so, or what it waits for.
    pub reason: Option<String>,
    /// The guest runs on the host of this name; `null` while the guest is paused, or while the host is not known.
    pub guest_runs_at: Option<String>,
    /// The guest has been in doubt since this time: this daemon does not know which host owns the guest. The time is in
    /// seconds since 1970-01-01T00:00:00Z; `null` while the owner is known. See `/v1/migrations/{id}/resolve`.
    #[serde(default)]
    pub in_doubt_since_unix_seconds: Option<f64>,
    /// A migration that is in doubt, or was resumed after a restart, waits for this; `null` if it waits for nothing.
    #[serde(default)]
    pub waits_for: Option<String>,
    /// This is the last decision on how to go on, with the figures behind it.
    pub decision: Option<String>,
    /// If the migration fails, the order is tried again so many times. When it has failed and this is not 0, another
    /// migration follows, which names this one in `retry_of`.
    #[serde(default)]
    pub retries_left: u32,
    /// This migration is another try of an order, after the one of this identity failed.
    #[serde(default)]
    pub retry_of: Option<MigrationName>,
    /// The order was accepted at this time, in seconds since 1970-01-01T00:00:00Z.
    pub started_at_unix_seconds: f64,
    /// The migration took this many seconds from the order to its end, or has taken them until now.
    pub total_seconds: f64,
    /// The guest may pause for at most this many seconds.
    pub downtime_limit_seconds: f64,
    /// The guest was paused for this many seconds: from its last instruction at the source to its first one at the
    /// destination, as the daemons measure it.
    pub downtime_seconds: Option<f64>,
    /// The guest's last vCPU stopped at the source at this time, as its VMM reports, in seconds since
    /// 1970-01-01T00:00:00Z by the source's clock.
    pub stopped_at_seconds: Option<f64>,
    /// The guest ran again at the destination at this time, as its VMM reports, in seconds since 1970-01-01T00:00:00Z by
    /// the destination's clock.
    pub resumed_at_seconds: Option<f64>,
    /// The pause would take this many seconds now, or was expected to take them when it began.
    pub downtime_predicted_seconds: Option<f64>,
    /// These are the terms of the predicted downtime.
    pub forecast: Option<Forecast>,
    /// This is true if digests of all RAM were equal on both hosts; `null` if they were not compared.
    pub digest_verified: Option<bool>,
    /// The guest has this many pages.
    pub pages_total: u64,
    /// This many pages are left to send in this round.
    pub pages_remaining: u64,
    /// Lanes have put this many bytes on the wire, including headers.
    pub bytes_sent: u64,
    /// Lanes have compressed this many bytes of pages. Pages of a lost lane count twice if they are compressed again.
    pub uncompressed_bytes: u64,
    /// The bytes of `uncompressed_bytes` became this many by compression.
    pub compressed_bytes: u64,
    /// This many pages were sent with their contents. A page that was sent twice counts twice.
    pub pages_sent: u64,
    /// This many pages of zeros were sent without contents.
    pub zero_pages: u64,
    /// This many pages were sent as holes, without being read.
    pub hole_pages: u64,
    /// The guest's block I/O stood still for this many seconds at most, each time that it had to come to an end before
    /// memory could be read; `null` if no disk of the guest bypasses the page cache.
    #[serde(default)]
    pub longest_io_stall_seconds: Option<f64>,
    /// All lanes together deliver this many bytes of pages per second, measured lately and counted before compression.
    pub bandwidth_bytes_per_second: f64,
    /// These are the rounds so far. The last one may be under way.
    pub rounds: Vec<Round>,
    /// These are the lanes on all ports.
    pub lanes: Vec<Lane>,
    /// This describes how the guest's writes were slowed; `null` if they never were.
    pub stun: Option<Stun>,
    /// This describes how the guest ran at the destination without all of its memory; `null` if it never did.
    pub postcopy: Option<Postcopy>,
    /// It took this many seconds to begin to track the guest's writes.
    pub tracking_start_seconds: Option<f64>,
    /// The VMM's state without RAM has this many bytes.
    pub vmm_state_bytes: Option<u64>,
    /// The VMM took this many seconds to save its state.
    pub save_seconds: Option<f64>,
    /// The destination's VMM took this many seconds to load the state, from when the last of it had come.
    pub load_seconds: Option<f64>,
    /// The guest did not run when it was to be paused, and stays so on whichever host it ends up. This is its VMM's word
    /// for that, such as `paused` or `shutdown`; `null` if it ran.
    pub guest_stays: Option<String>,
}

/// The side of a migration that a daemon is on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The daemon sends the guest.
    #[default]
    Source,
    /// The daemon receives the guest.
    Destination,
}

/// The phase of a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The daemons find out whether the guest can move.
    #[default]
    Preflight,
    /// The source opens lanes and begins to track writes.
    Preparing,
    /// The source sends pages while the guest runs.
    Copying,
    /// The guest is paused, and the last pages and the VMM's state are sent.
    SwitchingOver,
    /// The guest belongs to the destination, which starts it.
    Committing,
    /// The guest runs at the destination, which fetches missing pages from the source.
    Fetching,
    /// The migration has ended; see the outcome.
    Ended,
}

/// The outcome of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The guest runs at the destination.
    Completed,
    /// The guest runs on at the source.
    Failed,
    /// An operator cancelled the migration, and the guest runs on at the source.
    Cancelled,
    /// The migration never began.
    Refused,
    /// The guest was handed over, and runs nowhere whole: its VMM at the destination ended before it was known to run,
    /// or it ran there without all of its memory, and what was missing will never come. The source's copy is out of
    /// date.
    Lost,
    /// The guest shut itself down during the migration, and its VMM ended with it. Nothing is lost.
    PoweredOff,
}

/// The terms of a predicted downtime; they add up to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Forecast {
    /// To send the remaining pages takes this many seconds.
    pub remaining_seconds: f64,
    /// Round trips between the daemons take this many seconds.
    pub round_trip_seconds: f64,
    /// To save, send and load the VMM's state takes this many seconds.
    pub state_seconds: f64,
    /// To resume the vCPUs takes this many seconds.
    pub resume_seconds: f64,
    /// To compare digests takes this many seconds, if that was ordered.
    pub verify_seconds: f64,
    /// This many seconds are added because earlier predictions were too short by them.
    pub margin_seconds: f64,
}

/// One pass of pre-copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Round {
    /// This is the number of the round, from 1.
    pub round: u32,
    /// This many pages were dirty when the round began.
    pub pages: u64,
    /// The round put this many bytes on the wire.
    pub bytes: u64,
    /// The round took this many seconds.
    pub seconds: f64,
    /// The guest wrote to this many pages during the round.
    pub dirtied_pages: u64,
    /// It took this many seconds to find the written pages.
    #[serde(default)]
    pub harvest_seconds: f64,
}

/// The stun of a guest: how its writes are slowed while it is copied. All rates are averages over `seconds`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Stun {
    /// The guest's writes were slowed for this many seconds.
    pub seconds: f64,
    /// The guest wrote to this many pages of 4 KiB per second. A page of 2 MiB counts as 512.
    pub released_pages_per_second: f64,
    /// The guest was allowed to write to this many pages of 4 KiB per second, which follows what the lanes deliver.
    pub target_pages_per_second: f64,
    /// It took this many seconds to begin, while the guest ran on.
    pub switch_seconds: f64,
}

/// The progress of post-copy, as the destination sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Postcopy {
    /// This many accesses to missing pages had to wait. Several accesses to one page count once.
    pub faults: u64,
    /// The median wait of such an access, in microseconds, from the moment that the daemon saw the access until the page
    /// was placed.
    pub fault_p50_us: f64,
    /// Of 100 such accesses, 99 waited for at most this many microseconds.
    pub fault_p99_us: f64,
    /// The longest wait of such an access took this many microseconds.
    pub fault_max_us: f64,
    /// This many pages came because an access waited for them.
    pub pages_fetched: u64,
    /// This many pages came before any access waited for them.
    pub pages_streamed: u64,
    /// This many pages are still missing.
    pub remaining_pages: u64,
    /// The guest has run without all of its memory for this many seconds.
    pub seconds: f64,
    /// Post-copy waits for this; `null` while pages can come.
    pub waits_for: Option<String>,
    /// The guest is lost if this happens before the last page has come; `null` before the guest runs at the destination,
    /// and when the migration has ended.
    #[serde(default)]
    pub lost_if: Option<String>,
}

/// One TCP stream of a migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Lane {
    /// The lane is bound to the port of this name.
    pub port: String,
    /// This is the number of the lane within the migration.
    pub lane: u16,
    /// This is the address and port on this host.
    pub local: String,
    /// This is the address and port on the other host.
    pub remote: String,
    /// The lane has carried this many bytes.
    pub bytes: u64,
    /// The kernel sent this many of these bytes straight from the guest's memory.
    pub zero_copy_bytes: u64,
    /// The kernel copied this many of these bytes.
    pub copied_bytes: u64,
    /// The lane delivers this many bytes per second, measured lately.
    pub bytes_per_second: f64,
    /// This is the state of the lane.
    pub state: LaneState,
    /// The lane was lost this many times so far. While the migration lasts, the daemon tries to connect it again.
    pub losses: u32,
}

/// The state of a lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LaneState {
    /// The lane is being connected.
    #[default]
    Connecting,
    /// The lane carries pages.
    Up,
    /// The lane is lost, and the other lanes carry its share.
    Lost,
    /// The lane was closed because its work is done.
    Closed,
}

impl Migration {
    /// Makes a migration that has done nothing yet.
    pub fn new(id: impl Into<MigrationName>, guest: impl Into<String>, host: impl Into<String>) -> Self {
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
            retries_left: 0,
            retry_of: None,
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
            longest_io_stall_seconds: None,
            bandwidth_bytes_per_second: 0.0,
            rounds: Vec::new(),
            lanes: Vec::new(),
            stun: None,
            postcopy: None,
            tracking_start_seconds: None,
            vmm_state_bytes: None,
            save_seconds: None,
            load_seconds: None,
            guest_stays: None,
        }
    }
}

impl Outcome {
    /// Returns the name of the outcome in JSON and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
            Self::Lost => "lost",
            Self::PoweredOff => "powered_off",
        }
    }
}

impl Phase {
    /// Returns the name of the phase for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Preparing => "preparing",
            Self::Copying => "copying",
            Self::SwitchingOver => "switching over",
            Self::Committing => "committing",
            Self::Fetching => "fetching",
            Self::Ended => "ended",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
