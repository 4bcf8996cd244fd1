//! Post-copy: what a guest waits for goes ahead of everything else, and pages appear whole.
//!
//! At the destination `faults` hears of accesses to missing pages and asks for them, and `incoming` places what comes.
//! At the source `page_server` answers.

mod faults;
mod incoming;
mod latency;
mod page_server;

pub use faults::{FaultObserver, Faults, Leg};
pub(crate) use incoming::By;
pub use incoming::PostcopyIncoming;
pub use page_server::PageServer;
