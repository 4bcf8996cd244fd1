//! Post-copy: what a guest waits for goes ahead of everything else, and pages appear whole.
//!
//! At the destination `faults` hears of accesses to missing pages and asks for them, and `incoming` places what comes.
//! At the source `page_server` answers.

mod faults;
mod incoming;
mod latency;
mod observer;
mod page_server;

pub use faults::Faults;
pub(crate) use incoming::By;
pub use incoming::PostcopyIncoming;
pub use observer::{FaultObserver, Leg};
pub use page_server::PageServer;
