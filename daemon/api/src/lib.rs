//! The daemon's API: its types, and a client.
//!
//! - [`types`] are the bodies of requests and answers, in JSON.
//! - [`client`] sends requests to a daemon over its Unix socket.
//! - [`units`] reads and writes durations, rates and sizes as people do, everywhere in the workspace.
//! - [`ids`] are the identities of migrations, as text and as bytes.
//! - [`json`] writes values so that a terminal can show them.

#![forbid(unsafe_code)]

pub mod client;
pub mod ids;
pub mod json;
pub mod types;
pub mod units;
