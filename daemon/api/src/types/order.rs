//! Orders, and the findings of their dry runs.

use memlane_protocol::{compression, convergence, handover};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// An order to move a guest to another host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// This is the name of the guest.
    pub guest: String,
    /// This is the name of the destination, which must be a peer.
    pub host: String,
    /// The guest may pause for at most this long, in seconds. The default is the daemon's `limits.downtime`.
    #[serde(default)]
    pub downtime_limit_seconds: Option<f64>,
    /// The order is refused if the ports cannot deliver this many bits per second. The default is the daemon's
    /// `limits.min_bandwidth`.
    #[serde(default)]
    pub min_bandwidth_bits_per_second: Option<u64>,
    /// The hosts compare digests of all RAM before the guest is handed over. The guest is paused meanwhile, so the
    /// downtime limit applies to the rest of the pause only.
    #[serde(default)]
    pub verify: bool,
    /// The order fails after this many rounds if the pause would still be too long. The default is the daemon's
    /// `limits.max_rounds`.
    #[serde(default)]
    pub max_rounds: Option<u32>,
    /// This says what the daemon does when rounds do not shrink. The default is the daemon's `limits.converge`.
    #[serde(default)]
    pub converge: Option<Converge>,
    /// Stun may slow a guest's writes by at most this many percent, from 0 to 99. The default is the daemon's
    /// `limits.max_stun`.
    #[serde(default)]
    pub max_stun_percent: Option<u8>,
    /// The guest runs at the destination before all of its memory is there, whether or not rounds would shrink.
    #[serde(default)]
    pub postcopy: Option<WhenPostcopy>,
    /// This says whether lanes may compress pages. The default is the daemon's `limits.compression`.
    #[serde(default)]
    pub compression: Option<Compression>,
    /// While the guest is copied, the hosts try to reach each other again for this long, in seconds, from 0 to 600, if
    /// their connection or all ports are lost. The default is the daemon's `limits.patience`.
    #[serde(default)]
    pub patience_seconds: Option<f64>,
    /// If the migration fails, and the guest runs on here, the daemon tries the order again so many times, from 0 to 100,
    /// also after it was started anew. It waits for one second and then ever longer between two tries. A migration that was
    /// given up because the guest writes too fast is not tried again. The default is 0.
    #[serde(default)]
    pub retry: Option<u32>,
}

/// The treatment of a guest that writes faster than the ports carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Converge {
    /// The daemon slows the guest's writes until the pause fits its limit. Reads are not slowed.
    Stun,
    /// The guest runs at the destination, which fetches missing pages from the source.
    Postcopy,
    /// The daemon stuns the guest up to the bound, and then turns to post-copy.
    Auto,
    /// The daemon gives the migration up, and the guest runs on at its source.
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

/// The moment when a guest runs at the destination without all of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WhenPostcopy {
    /// The guest runs there at once.
    Now,
    /// The guest runs there after one round of pre-copy.
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

/// The use of compression (LZ4) by lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// A lane compresses pages while its network is too slow and a processor is free, and only pages that become much
    /// smaller.
    Auto,
    /// Lanes never compress.
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

/// An operator's decision about a guest in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Resolve {
    /// This says what happens to the copy of the guest on this host.
    pub action: Resolution,
    /// The operator promises that the other host is off, or at least its VMM of this guest, and stays so.
    /// Nothing is run here without that promise: if it is not true, two copies of the guest may run.
    #[serde(default)]
    pub other_host_is_off: bool,
}

/// The fate of a guest in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Resolution {
    /// The guest runs here, from where it was paused.
    RunHere,
    /// The copy on this host is given up, and its VMM is ended.
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

/// The result of a dry run of an order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CheckReport {
    /// This is true if the order would be accepted: no finding is `refused`.
    pub ok: bool,
    /// This is the name of the guest.
    pub guest: String,
    /// This is the name of the destination.
    pub host: String,
    /// These are the findings, in the order in which they were made.
    pub findings: Vec<Finding>,
    /// These are the pairs of ports: one of this host, and one of the destination.
    pub ports: Vec<PortCheck>,
    /// This estimates the size and the time of the move.
    pub estimate: Estimate,
}

/// One finding of a dry run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    /// This says how bad the finding is.
    pub severity: Severity,
    /// This names the subject in a word or two: `memory`, `cpuid`, `port a`.
    pub what: String,
    /// This describes what was found.
    pub detail: String,
    /// This tells the operator what to do about it; `null` if there is nothing to do.
    pub remedy: Option<String>,
}

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// All is as it should be.
    Ok,
    /// The order would run, but not as well as it could.
    Warning,
    /// The order would be refused.
    Refused,
}

/// The result of a connection from a port of this host to a port of the destination.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortCheck {
    /// This is the name of the port on this host.
    pub port: String,
    /// This is the name of the port at the destination.
    pub peer_port: String,
    /// This is true if a connection could be made.
    pub reachable: bool,
    /// The round trip of the connection takes this many seconds.
    pub round_trip_seconds: Option<f64>,
}

/// An estimate of the size and the time of a move.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Estimate {
    /// The guest has this many bytes of RAM.
    pub ram_bytes: u64,
    /// This many bytes of RAM are not holes.
    pub data_bytes: u64,
    /// The VMM's state, without RAM, has at most this many bytes, if the VMM tells. Of video memory, which is a part of it,
    /// what was never used takes no room on the way.
    pub state_bytes: Option<u64>,
    /// All ports together deliver this many bytes per second, if they were measured or their speed is known.
    pub bytes_per_second: Option<f64>,
    /// One pass over the data takes this many seconds.
    pub seconds: Option<f64>,
}
