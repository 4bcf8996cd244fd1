//! This module has what a preflight finds.

/// The result of looking at one thing.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// This is how bad it is.
    pub severity: Severity,
    /// This is what was looked at, in a word or two: `memory`, `cpuid`, `port a`.
    pub what: String,
    /// This is what was found.
    pub detail: String,
    /// This is what the operator can do about it.
    pub remedy: Option<String>,
}

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// It is as it should be.
    Ok,
    /// The order would run, but not as well as it could.
    Warning,
    /// The order would be refused.
    Refused,
}

/// The result of connecting a port of this host to its counterpart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PortCheck {
    /// This is the name of the port here.
    pub port: String,
    /// This is the name of the port at the destination.
    pub peer_port: String,
    /// This tells whether a connection could be made.
    pub reachable: bool,
    /// This is the round trip of the connection.
    pub round_trip_seconds: Option<f64>,
}

/// An estimate of what a move would take.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Estimate {
    /// The guest has this many bytes of RAM.
    pub ram_bytes: u64,
    /// This many bytes of the RAM are not holes.
    pub data_bytes: u64,
    /// The VMM's state, without RAM, has at most this many bytes, if the VMM tells.
    pub state_bytes: Option<u64>,
    /// The ports deliver this together, if they have been measured or their speed is known.
    pub bytes_per_second: Option<f64>,
    /// One pass over the data takes this long.
    pub seconds: Option<f64>,
}
