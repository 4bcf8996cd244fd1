//! Measurements of accesses to missing pages.

use std::time::Duration;

/// An observer takes measurements of accesses to missing pages. Threads of lanes call it, so it must not block.
pub trait FaultObserver: Send + Sync {
    /// Records for how long an access waited, from when the daemon read it until its page was placed.
    fn waited(&self, time: Duration);
    /// Records how long one stage of that wait took.
    fn took(&self, leg: FaultStage, time: Duration);
}

/// A stage of the wait for a missing page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultStage {
    /// This stage lasts from the moment that the daemon reads the access until it has requested the page.
    Request,
    /// This stage lasts from the request until all of the answer has arrived.
    Transfer,
    /// This stage lasts from the arrival of the answer until the page is placed.
    Place,
}
