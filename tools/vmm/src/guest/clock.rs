//! The clock that a guest reads, and the relation of its ticks to the host's clocks.

use std::sync::atomic::{AtomicU64, Ordering};

use memlane_kvm::state::{Moment, host_tsc};
use rustix::time::{ClockId, clock_gettime};

/// The guest's clock at one instant, with the host's clocks at the same instant.
#[derive(Clone, Copy, Debug)]
pub struct ClockReading {
    /// The time of the guest's clock, in ticks.
    pub ticks: u64,
    /// The frequency of the guest's clock, in kHz.
    pub khz: u32,
    /// The time of `CLOCK_REALTIME`, in nanoseconds.
    pub realtime: u64,
    /// The time of `CLOCK_MONOTONIC`, in nanoseconds.
    pub monotonic: u64,
}

/// The TSC of a virtual machine.
#[derive(Debug, Default)]
pub struct TscClock {
    offset: AtomicU64,
    khz: AtomicU64,
}

impl ClockReading {
    /// Returns how long `ticks` take, in nanoseconds.
    pub fn nanoseconds(&self, ticks: u64) -> u64 {
        nanoseconds(ticks, self.khz.into())
    }

    /// Returns how long ago the clock showed `ticks`, in nanoseconds; 0 for a time that is still to come.
    pub fn age(&self, ticks: u64) -> u64 {
        self.nanoseconds(self.ticks.saturating_sub(ticks))
    }
}

impl TscClock {
    /// Sets by how much the guest's TSC is ahead of the host's, and its frequency.
    pub fn set(&self, offset: u64, khz: u32) {
        self.offset.store(offset, Ordering::Relaxed);
        self.khz.store(khz.into(), Ordering::Relaxed);
    }

    /// Returns the time that the clock shows, in ticks.
    pub fn now(&self) -> u64 {
        host_tsc().wrapping_add(self.offset.load(Ordering::Relaxed))
    }

    /// Returns how long `ticks` take, in nanoseconds.
    pub fn nanoseconds(&self, ticks: u64) -> u64 {
        nanoseconds(ticks, self.khz.load(Ordering::Relaxed))
    }

    /// Returns what the guest's clock and the host's clocks show.
    pub fn read(&self) -> ClockReading {
        let Moment { tsc, realtime } = Moment::now();
        ClockReading {
            ticks: tsc.wrapping_add(self.offset.load(Ordering::Relaxed)),
            khz: self.khz.load(Ordering::Relaxed) as u32,
            realtime,
            monotonic: clock(ClockId::Monotonic),
        }
    }
}

/// Returns the time of a clock of the host, in nanoseconds.
pub fn clock(id: ClockId) -> u64 {
    let time = clock_gettime(id);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn nanoseconds(ticks: u64, khz: u64) -> u64 {
    (u128::from(ticks) * 1_000_000 / u128::from(khz.max(1))) as u64
}
