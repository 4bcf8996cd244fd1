//! The daemon's API: its types, and a client.
//!
//! - [`types`] are the bodies of requests and answers, in JSON.
//! - [`client`] sends requests to a daemon over its Unix socket.
//! - [`units`] reads and writes durations, rates and sizes as people do, everywhere in the workspace.
//! - [`ids`] are the identities of migrations, as text and as bytes.
//! - [`json`] writes values so that a terminal can show them.
//!
//! Without the feature `client`, which is on by default, there are only the units.

#![forbid(unsafe_code)]

#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "client")]
pub mod ids;
#[cfg(feature = "client")]
pub mod json;
#[cfg(feature = "client")]
pub mod types;
pub mod units;
