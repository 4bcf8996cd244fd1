//! What the API says and takes, shared by the daemon, `memlanectl` and whoever writes a client in
//! Rust. Field names carry their units; a field that is `null` is not known (yet).

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Identity of a migration on both hosts: 32 hexadecimal digits.
pub type MigrationName = String;

/// A daemon and its host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Name of the host.
    pub host: String,
    /// Version of the daemon.
    pub version: String,
    /// Versions of the protocol between daemons that it speaks, oldest and newest.
    pub protocol_versions: [u16; 2],
    /// Seconds since the daemon started.
    pub uptime_seconds: f64,
    /// Guests whose VMM is attached.
    pub guests: usize,
    /// Migrations under way, in both directions.
    pub migrations: usize,
    /// True while nothing between daemons is encrypted.
    pub insecure: bool,
    /// Release of the running kernel.
    pub kernel: String,
    /// Whether the host offers KVM.
    pub kvm: bool,
}

/// A network port lent to migrations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortInfo {
    /// Name of the port.
    pub name: String,
    /// Network interface that holds the address.
    pub interface: Option<String>,
    /// IP address that lanes are bound to.
    pub address: String,
    /// Speed, as configured or as the interface reports it.
    pub speed_bits_per_second: Option<u64>,
    /// Whether the interface has a carrier and the address.
    pub up: bool,
    /// Lanes that a migration opens on this port.
    pub lanes: u16,
    /// Bytes that lanes have sent since the daemon started.
    pub bytes_sent: u64,
    /// Bytes that lanes have received since the daemon started.
    pub bytes_received: u64,
}

/// Another host that guests may move to and come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PeerInfo {
    /// Name of the host.
    pub name: String,
    /// Address and port of its daemon's control connection.
    pub control: String,
}

/// A guest whose VMM is attached to the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestInfo {
    /// Name of the guest.
    pub name: String,
    /// Program that runs it.
    pub vmm: String,
    /// Number of virtual CPUs.
    pub vcpus: u16,
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// How its dirty pages are found: `log`, `ring` or `pagemap`.
    pub tracker: String,
    /// What it is doing.
    pub standing: Standing,
    /// Network interfaces that are announced after a migration.
    pub nics: Vec<NicInfo>,
    /// Process of the VMM.
    pub pid: Option<u32>,
}

/// A guest's network interface.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NicInfo {
    /// Hardware address, as in `52:54:00:12:34:56`.
    pub mac: String,
    /// Network that it is plugged into.
    pub network: String,
}

/// What a guest is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It runs here.
    Running,
    /// Its VMM waits for a guest to arrive.
    Incoming,
    /// A migration of it is under way.
    Migrating,
    /// It was given up for a migration and does not run here.
    Relinquished,
    /// It has arrived and waits for permission to run.
    Loaded,
}

/// An order: move this guest to that host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// Name of the guest.
    pub guest: String,
    /// Name of the destination, one of the peers.
    pub host: String,
    /// Longest pause that the guest may see; default: the daemon's `limits.downtime`.
    #[serde(default)]
    pub downtime_limit_seconds: Option<f64>,
    /// The order is refused where the ports cannot deliver this; default: the daemon's
    /// `limits.min_bandwidth`.
    #[serde(default)]
    pub min_bandwidth_bits_per_second: Option<u64>,
    /// Compare digests of all RAM at both ends before the guest is handed over. The guest
    /// stands still meanwhile, so the limit applies to the rest of the pause only.
    #[serde(default)]
    pub verify: bool,
    /// Rounds after which the order fails if the pause would still be too long; default: the
    /// daemon's `limits.max_rounds`.
    #[serde(default)]
    pub max_rounds: Option<u32>,
}

/// What a dry run of an order found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CheckReport {
    /// Whether the order would be accepted: no finding is `refused`.
    pub ok: bool,
    /// Name of the guest.
    pub guest: String,
    /// Name of the destination.
    pub host: String,
    /// What was looked at, in order.
    pub findings: Vec<Finding>,
    /// Pairs of ports, ours and the destination's.
    pub ports: Vec<PortCheck>,
    /// What the move would take.
    pub estimate: Estimate,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What was looked at, in a word or two: `memory`, `cpuid`, `port a`.
    pub what: String,
    /// What was found.
    pub detail: String,
    /// What the operator can do about it.
    pub remedy: Option<String>,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// The order would run, but not as well as it could.
    Warning,
    /// The order would be refused.
    Refused,
}

/// Whether a port of this host reaches its counterpart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortCheck {
    /// Name of the port here.
    pub port: String,
    /// Name of the port at the destination.
    pub peer_port: String,
    /// Whether a connection could be made.
    pub reachable: bool,
    /// Round trip of the connection.
    pub round_trip_seconds: Option<f64>,
}

/// What a move would take.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Estimate {
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// Bytes of RAM that are not holes.
    pub data_bytes: u64,
    /// What the ports deliver together, if they have been measured or their speed is known.
    pub bytes_per_second: Option<f64>,
    /// Time for one pass over the data.
    pub seconds: Option<f64>,
}

/// One migration, under way or ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Migration {
    /// Identity, the same on both hosts.
    pub id: MigrationName,
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
    /// Name of the host where the guest runs; `null` while it stands still.
    pub guest_runs_at: Option<String>,
    /// When the order was taken, in seconds since 1970-01-01T00:00:00Z.
    pub started_at_unix_seconds: f64,
    /// From the order to the end, or until now.
    pub total_seconds: f64,
    /// Longest pause allowed.
    pub downtime_limit_seconds: f64,
    /// From the guest's last instruction at the source to its first at the destination, as
    /// measured between the daemons.
    pub downtime_seconds: Option<f64>,
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
    /// Pages sent with their contents; a page sent twice counts twice.
    pub pages_sent: u64,
    /// Pages sent as zeroes, without contents.
    pub zero_pages: u64,
    /// Pages sent as holes, without being read.
    pub hole_pages: u64,
    /// What all lanes deliver together, measured lately.
    pub bandwidth_bytes_per_second: f64,
    /// Rounds so far; the last one may be under way.
    pub rounds: Vec<Round>,
    /// Lanes, on all ports.
    pub lanes: Vec<Lane>,
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It sends the guest.
    #[default]
    Source,
    /// It takes the guest.
    Destination,
}

/// What a migration is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
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
    /// Ended; see the outcome.
    Ended,
}

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The guest runs at the destination.
    Completed,
    /// The guest runs on at the source.
    Failed,
    /// Cancelled by an operator: the guest runs on at the source.
    Cancelled,
    /// It never began.
    Refused,
}

/// The terms of a predicted downtime; they add up to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
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
}

/// One TCP stream of a migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
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
}

/// How a lane is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
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

/// What the API answers when it cannot do as it was told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What kind of error it is, for programs.
    pub code: ErrorCode,
    /// What went wrong and what can be done, for people.
    pub message: String,
}

/// Kinds of errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// No such route (404).
    UnknownRoute,
    /// The route exists, but not for this method (405).
    UnknownMethod,
    /// No guest of this name is attached (404).
    UnknownGuest,
    /// No peer of this name is configured (404).
    UnknownHost,
    /// No migration of this identity is remembered (404).
    UnknownMigration,
    /// The guest is already being moved (409).
    AlreadyMoving,
    /// The preflight found a reason not to move the guest (409).
    Refused,
    /// The migration cannot be cancelled any more (409).
    TooLate,
    /// The request is not understood, or a value is out of range (400).
    Invalid,
    /// The body is too large (413).
    TooLarge,
    /// The request did not arrive in time (408).
    Slow,
    /// The daemon cannot do it now (503).
    Unavailable,
    /// The daemon failed (500).
    Internal,
}

/// The body of every answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ApiError,
}

impl ApiError {
    /// An error of this kind.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl ErrorCode {
    /// The status of the HTTP answer.
    pub fn http_status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::UnknownRoute | Self::UnknownGuest | Self::UnknownHost | Self::UnknownMigration => 404,
            Self::UnknownMethod => 405,
            Self::Slow => 408,
            Self::AlreadyMoving | Self::Refused | Self::TooLate => 409,
            Self::TooLarge => 413,
            Self::Internal => 500,
            Self::Unavailable => 503,
        }
    }
}

impl Migration {
    /// A migration of which nothing is done yet.
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
            started_at_unix_seconds: 0.0,
            total_seconds: 0.0,
            downtime_limit_seconds: 0.0,
            downtime_seconds: None,
            downtime_predicted_seconds: None,
            forecast: None,
            digest_verified: None,
            pages_total: 0,
            pages_remaining: 0,
            bytes_sent: 0,
            pages_sent: 0,
            zero_pages: 0,
            hole_pages: 0,
            bandwidth_bytes_per_second: 0.0,
            rounds: Vec::new(),
            lanes: Vec::new(),
            tracking_start_seconds: None,
            vmm_state_bytes: None,
            save_seconds: None,
            load_seconds: None,
        }
    }
}

impl Outcome {
    /// As it stands in JSON and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
        }
    }
}

impl Phase {
    /// For people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Preparing => "preparing",
            Self::Copying => "copying",
            Self::SwitchingOver => "switching over",
            Self::Committing => "committing",
            Self::Ended => "ended",
        }
    }
}

impl Standing {
    /// As it stands in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Incoming => "incoming",
            Self::Migrating => "migrating",
            Self::Relinquished => "relinquished",
            Self::Loaded => "loaded",
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

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
