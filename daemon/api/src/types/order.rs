//! What is ordered, and what a dry run of it finds.

use memlane_protocol::{compression, convergence, handover};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

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
    /// What to do when rounds do not shrink; default: the daemon's `limits.converge`.
    #[serde(default)]
    pub converge: Option<Converge>,
    /// How much of its writing a guest may lose to stun, in percent, at most 99; default: the
    /// daemon's `limits.max_stun_percent`.
    #[serde(default)]
    pub max_stun_percent: Option<u8>,
    /// Run the guest at the destination before all of its memory is there, whether or not rounds
    /// would shrink.
    #[serde(default)]
    pub postcopy: Option<WhenPostcopy>,
    /// Whether lanes may compress pages; default: the daemon's `limits.compression`.
    #[serde(default)]
    pub compression: Option<Compression>,
}

/// What to do with a guest that writes faster than the ports carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Converge {
    /// Slow its writes until the pause fits its limit; readers are not slowed.
    Stun,
    /// Run it at the destination, and fetch what is missing.
    Postcopy,
    /// Stun up to the bound, then post-copy.
    Auto,
    /// Give up: the guest runs on at its source.
    None,
}

impl From<Converge> for convergence::Converge {
    fn from(converge: Converge) -> Self {
        match converge {
            Converge::Stun => Self::Stun,
            Converge::Postcopy => Self::Postcopy,
            Converge::Auto => Self::Auto,
            Converge::None => Self::None,
        }
    }
}

impl From<convergence::Converge> for Converge {
    fn from(converge: convergence::Converge) -> Self {
        match converge {
            convergence::Converge::Stun => Self::Stun,
            convergence::Converge::Postcopy => Self::Postcopy,
            convergence::Converge::Auto => Self::Auto,
            convergence::Converge::None => Self::None,
        }
    }
}

/// When a guest is run at the destination without all of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WhenPostcopy {
    /// At once.
    Now,
    /// After one round of pre-copy.
    Hybrid,
}

impl From<WhenPostcopy> for convergence::Postcopy {
    fn from(when: WhenPostcopy) -> Self {
        match when {
            WhenPostcopy::Now => Self::Now,
            WhenPostcopy::Hybrid => Self::Hybrid,
        }
    }
}

impl From<convergence::Postcopy> for WhenPostcopy {
    fn from(when: convergence::Postcopy) -> Self {
        match when {
            convergence::Postcopy::Now => Self::Now,
            convergence::Postcopy::Hybrid => Self::Hybrid,
        }
    }
}

/// Whether lanes compress what they send (LZ4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// While a lane is held up by its wire and a processor is free, and only what becomes much smaller.
    Auto,
    /// Never.
    Off,
}

impl From<Compression> for compression::Mode {
    fn from(mode: Compression) -> Self {
        match mode {
            Compression::Auto => Self::Auto,
            Compression::Off => Self::Off,
        }
    }
}

impl From<compression::Mode> for Compression {
    fn from(mode: compression::Mode) -> Self {
        match mode {
            compression::Mode::Auto => Self::Auto,
            compression::Mode::Off => Self::Off,
        }
    }
}

/// What an operator decides about a guest in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Resolve {
    /// What is to become of what is here.
    pub action: Resolution,
    /// The operator promises that the other host is off, or at least its VMM of this guest, and stays so.
    /// Nothing is run here without that promise: if it is not true, two copies of the guest may run.
    #[serde(default)]
    pub other_host_is_off: bool,
}

/// What is to become of a guest in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Resolution {
    /// It is to run here, from where it was paused.
    RunHere,
    /// What is here of it is to be given up, and its VMM ended.
    Discard,
}

impl From<Resolution> for handover::Resolution {
    fn from(resolution: Resolution) -> Self {
        match resolution {
            Resolution::RunHere => Self::RunHere,
            Resolution::Discard => Self::Discard,
        }
    }
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
