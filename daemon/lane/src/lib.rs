//! The data plane: lanes that carry pages, one thread and one io_uring each.
//!
//! At the source every lane of a migration works from one [`SendState`]: it claims a run of
//! pages when its own window has room, so a slow port takes less and nothing is assigned
//! ahead. At the destination every lane writes into one [`ReceiveState`]: straight into guest memory, but for
//! pages that nobody has touched there yet, compressed ones, and those of a guest that runs already.

mod checksum;
mod compress;
pub mod digest;
mod error;
mod message;
pub mod postcopy;
pub mod priority;
mod receive;
mod ring;
mod send;
pub mod socket;
mod stats;

use std::sync::Arc;

pub use error::LaneError;
pub use receive::{LaneReceiver, ReceiveState};
pub use send::{LaneSender, SendState, Waker};
pub use stats::{LaneStats, Totals};

/// Tells the control plane that there is something for it to look at. Threads of lanes call it; it must not block.
pub type Bell = Arc<dyn Fn() + Send + Sync>;

#[cfg(test)]
mod tests;
