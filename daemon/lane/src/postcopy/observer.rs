//! What is measured of accesses to missing pages.

use std::time::Duration;

/// Is told how long accesses to missing pages waited. Threads of lanes call it; it must not block.
pub trait FaultObserver: Send + Sync {
    /// An access waited for so long, from when it was seen until its page was placed.
    fn waited(&self, time: Duration);
    /// A leg of that took so long.
    fn took(&self, leg: Leg, time: Duration);
}

/// A leg of the way of a page that an access waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// From when the access was seen until the page was asked for.
    Ask,
    /// From then until all of the answer was there.
    Transfer,
    /// From then until the page was placed.
    Place,
}
