//! What the daemon says over its API, for the daemon itself and for all who ask it.
//!
//! - [`types`] are the bodies of requests and answers, in JSON.
//! - [`client`] asks a daemon over its Unix socket.
//! - [`units`] reads and writes durations, rates and sizes as people do, everywhere in the workspace.
//! - [`ids`] are the identities of migrations, as text and as bytes.
//! - [`json`] writes values so that a terminal can show them.

#![forbid(unsafe_code)]

pub mod client;
pub mod ids;
pub mod json;
pub mod types;
pub mod units;
