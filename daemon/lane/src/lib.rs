//! The data plane: lanes that carry pages, one thread and one io_uring each.
//!
//! At the source all lanes of a migration share one [`SendState`]. A lane claims a run of pages when its own window has
//! room, so a slow port takes less and nothing is assigned ahead. At the destination all lanes share one
//! [`ReceiveState`]. They receive pages straight into guest memory, with three exceptions that are received beside it
//! first: pages that are not allocated yet, compressed pages, and the pages of a guest that runs already (post-copy).

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
mod thread_clock;
mod transport;

use std::sync::Arc;

pub use error::LaneError;
pub use receive::{LaneReceiver, ReceiveState};
pub use send::{LaneSender, SendState, Waker};
pub use stats::{LaneStats, Totals};
pub use transport::Transport;

/// A bell tells the control plane that the state of the lanes has changed. Threads of lanes call it, so it must not
/// block.
pub type Bell = Arc<dyn Fn() + Send + Sync>;

#[cfg(test)]
mod tests;
