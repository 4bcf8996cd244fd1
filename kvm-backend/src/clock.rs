//! [`Moment`]: the host's time-stamp counter and its real time, read together.

use rustix::time::{ClockId, clock_gettime};

/// One instant on two clocks of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The host's time-stamp counter, in its own ticks.
    pub tsc: u64,
    /// `CLOCK_REALTIME` in nanoseconds since 1970 (clock_gettime(2)).
    pub realtime: u64,
}

impl Moment {
    /// Reads both clocks now. The two readings lie as close together as a few tries can bring them.
    pub fn now() -> Self {
        let read = || {
            let before = host_tsc();
            let clock = clock_gettime(ClockId::Realtime);
            let after = host_tsc();
            let realtime = clock.tv_sec as u64 * 1_000_000_000 + clock.tv_nsec as u64;
            let apart = after.wrapping_sub(before);
            (apart, Self { tsc: before.wrapping_add(apart / 2), realtime })
        };
        (0..5).map(|_| read()).min_by_key(|(apart, _)| *apart).expect("five readings were taken").1
    }
}

/// Returns the host's time-stamp counter, in its own ticks.
pub fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux leaves it to user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}
