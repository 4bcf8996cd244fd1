//! What waits for being claimed, as lanes see it: how little of it there is says how much each of them may hold.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use memlane_protocol::PAGE_SIZE;
use memlane_protocol::window::hold;

/// About how much is left, and how fast all lanes together deliver it.
#[derive(Default)]
pub struct Backlog {
    pages: AtomicU64,
    /// 0 before it was measured.
    bytes_per_second: AtomicU64,
}

impl Backlog {
    /// There are `pages` to claim now.
    pub fn set(&self, pages: u64, bytes_per_second: u64) {
        self.pages.store(pages, Ordering::Relaxed);
        self.bytes_per_second.store(bytes_per_second, Ordering::Relaxed);
    }

    /// Somebody has claimed so many of them.
    pub fn claimed(&self, pages: u64) {
        let fewer = |left: u64| Some(left.saturating_sub(pages));
        // Never refused.
        let _ = self.pages.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer);
    }

    /// How much each lane may hold, as the time in which it delivers that.
    pub fn hold(&self) -> Duration {
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
        assert_eq!(left.hold(), 20 * MS);
        left.claimed(20_000);
        assert_eq!(left.hold(), 10 * MS);
        // Others may have found more than was said.
        left.claimed(30_000);
        assert_eq!(left.hold(), 4 * MS);
    }
}
