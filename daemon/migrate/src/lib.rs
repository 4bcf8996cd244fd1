//! The engine: moves a guest from one host to another.
//!
//! [`Supervisor`] takes orders and offers, and is asked about each VMM that attaches. [`source`] and [`destination`] are
//! the two halves of a migration: each asks its half of the handover (`memlane_protocol`) what to do, and has effects
//! (`executor`) carry that out. [`preflight`] is what is found out before anything moves, and `recover` what is taken
//! up after a restart. [`Progress`] tells everyone else how a migration stands, and an [`Observer`] what was measured.

pub mod config;
mod context;
mod copy;
mod destination;
mod digest;
mod executor;
mod fetch;
mod first_round;
mod handle;
mod lanes;
mod missing;
mod observer;
mod pause;
mod postcopy;
pub mod preflight;
pub mod progress;
mod recover;
mod registry;
mod reopen;
mod routes;
mod serve;
mod silence;
mod source;
mod stun;
mod supervisor;

pub use context::{Context, Settings};
pub use handle::Ticket;
pub use observer::{Measurement, Observer};
pub use progress::Progress;
pub use registry::Migrations;
pub use source::Wishes;
pub use supervisor::{Order, OrderError, Supervisor};
