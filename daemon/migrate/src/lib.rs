//! The engine moves a guest from one host to another.
//!
//! [`Supervisor`] takes orders and offers, and is asked about each VMM that attaches. `source` and `destination` are
//! the two sides of a migration. One loop (`drive`) takes their events to the handover (`memlane_protocol`), which
//! decides, and does what it says (`effects`). [`preflight`] finds out what can be known before anything moves, and
//! `recover` takes migrations up after a restart. [`Progress`] tells everyone else how a migration stands, and an
//! [`Observer`] hears what was measured.

#![forbid(unsafe_code)]

pub mod config;
mod context;
mod destination;
mod drive;
mod effects;
mod fetch;
mod handle;
mod lane_reconnect;
mod lanes;
mod machine;
mod missing;
mod observer;
pub mod preflight;
pub mod progress;
mod recover;
mod registry;
mod routes;
mod silence;
mod source;
mod state_lane;
mod supervisor;
mod vmm;

pub use context::{Context, Settings};
pub use handle::MigrationHandle;
pub use observer::{Measurement, Observer};
pub use progress::Progress;
pub use registry::Migrations;
pub use source::MigrateParameters;
pub use supervisor::{Order, OrderError, Supervisor};
