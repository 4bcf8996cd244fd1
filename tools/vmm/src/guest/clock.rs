//! The clock that a guest reads, and how its ticks relate to the host's clocks.

use std::sync::atomic::{AtomicU64, Ordering};

use memlane_kvm::state::{Moment, host_tsc};
use rustix::time::{ClockId, clock_gettime};

/// A guest's clock at one instant, with the host's clocks at the same.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// The guest's clock.
    pub ticks: u64,
    /// Its frequency.
    pub khz: u32,
    /// `CLOCK_REALTIME`, nanoseconds.
    pub realtime: u64,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub monotonic: u64,
}

/// The TSC of a virtual machine.
#[derive(Debug, Default)]
pub struct TscClock {
    offset: AtomicU64,
    khz: AtomicU64,
}

impl Reading {
    /// Nanoseconds that `ticks` take.
    pub fn nanoseconds(&self, ticks: u64) -> u64 {
        nanoseconds(ticks, self.khz.into())
    }

    /// How long ago the clock showed `ticks`, in nanoseconds; 0 for what is still to come.
    pub fn age(&self, ticks: u64) -> u64 {
        self.nanoseconds(self.ticks.saturating_sub(ticks))
    }
}

impl TscClock {
    /// A virtual machine's clock: what its TSC is ahead of the host's, and its frequency.
    pub fn set(&self, offset: u64, khz: u32) {
        self.offset.store(offset, Ordering::Relaxed);
        self.khz.store(khz.into(), Ordering::Relaxed);
    }

    /// What it shows.
    pub fn now(&self) -> u64 {
        host_tsc().wrapping_add(self.offset.load(Ordering::Relaxed))
    }

    /// Nanoseconds that `ticks` take.
    pub fn nanoseconds(&self, ticks: u64) -> u64 {
        nanoseconds(ticks, self.khz.load(Ordering::Relaxed))
    }

    /// What it shows, and what the host's clocks show.
    pub fn read(&self) -> Reading {
        let Moment { tsc, realtime } = Moment::now();
        Reading {
            ticks: tsc.wrapping_add(self.offset.load(Ordering::Relaxed)),
            khz: self.khz.load(Ordering::Relaxed) as u32,
            realtime,
            monotonic: clock(ClockId::Monotonic),
        }
    }
}

/// A clock of the host, in nanoseconds.
pub fn clock(id: ClockId) -> u64 {
    let time = clock_gettime(id);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn nanoseconds(ticks: u64, khz: u64) -> u64 {
    (u128::from(ticks) * 1_000_000 / u128::from(khz.max(1))) as u64
}
