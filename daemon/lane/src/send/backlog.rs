//! An estimate of how much is left to claim. The less is left, the less each lane may have in its window.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use memlane_protocol::PAGE_SIZE;
use memlane_protocol::window::hold;

/// The number of pages that are left to claim, about, and how fast all lanes together deliver them.
#[derive(Default)]
pub(crate) struct Backlog {
    pages: AtomicU64,
    /// All lanes together deliver this many bytes per second; 0 while it is not measured.
    bytes_per_second: AtomicU64,
}

impl Backlog {
    /// Sets how many pages are left to claim now, and how fast lanes deliver them.
    pub(crate) fn set(&self, pages: u64, bytes_per_second: u64) {
        self.pages.store(pages, Ordering::Relaxed);
        self.bytes_per_second.store(bytes_per_second, Ordering::Relaxed);
    }

    /// Notes that a lane has claimed so many pages.
    pub(crate) fn claimed(&self, pages: u64) {
        let fewer = |left: u64| Some(left.saturating_sub(pages));
        // The closure always returns a value, so the update cannot fail.
        let _ = self.pages.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer);
    }

    /// Returns how much each lane may have in its window, as the time that the lane needs to deliver it.
    pub(crate) fn lane_share(&self) -> Duration {
        let bytes = self.pages.load(Ordering::Relaxed).saturating_mul(PAGE_SIZE);
        hold(bytes, self.bytes_per_second.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_less_is_left_the_less_may_be_held() {
        const MS: Duration = Duration::from_millis(1);
        let left = Backlog::default();
        // 40 ms of pages at 1000 pages a millisecond, of which each lane may hold half.
        left.set(40_000, 1_000_000 * PAGE_SIZE);
        assert_eq!(left.lane_share(), 20 * MS);
        left.claimed(20_000);
        assert_eq!(left.lane_share(), 10 * MS);
        // Others may have found more than was said.
        left.claimed(30_000);
        assert_eq!(left.lane_share(), 4 * MS);
    }
}
