//! Post-copy: pages that a guest waits for go ahead of all others, and each page appears whole.
//!
//! At the destination `faults` reads accesses to missing pages from the kernel and requests the pages, and `incoming`
//! places the pages that come. At the source `page_server` answers the requests.

mod faults;
mod incoming;
mod latency;
mod observer;
mod page_server;

pub use faults::Faults;
pub(crate) use incoming::By;
pub use incoming::PostcopyIncoming;
pub use observer::{FaultObserver, FaultStage};
pub use page_server::PageServer;
