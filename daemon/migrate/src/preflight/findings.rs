//! What a preflight finds.

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// As it should be.
    Ok,
    /// The order would run, but not as well as it could.
    Warning,
    /// The order would be refused.
    Refused,
}

/// Whether a port of this host reaches its counterpart.
#[derive(Clone, Debug, Default, PartialEq)]
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
#[derive(Clone, Debug, Default, PartialEq)]
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
