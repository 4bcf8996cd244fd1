//! Statistics of the guest's own progress, read from its control blocks without disturbing it.

use std::sync::atomic::Ordering;

use memlane_kvm::attach::TrackingPhase;
use memlane_kvm::ram::GuestRam;
use serde::{Deserialize, Serialize};

use crate::guest::block::RING;
use crate::guest::{ClockReading, ControlBlock, GuestLayout};

/// The VMM's notes about a guest. They move with it, so that the VMM at the destination can tell
/// what the guest saw on its way.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Notes {
    /// The counters of each vCPU when stalls were last reset.
    marks: Vec<Mark>,
    /// The times when the last tracking started, and when all pages were armed; in nanoseconds of `CLOCK_REALTIME`.
    tracking: (Option<u64>, Option<u64>),
    /// The longest stall in that time, in nanoseconds.
    tracking_stall: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Mark {
    stalls: u64,
    longest: u64,
    histogram: Vec<u64>,
}

/// The statistics of a guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Whether the guest runs, is paused, is awaited, or was loaded and waits for its start.
    pub standing: String,
    /// The time when all this was read, in nanoseconds of this host's `CLOCK_MONOTONIC`.
    pub monotonic_ns: u64,
    /// The number of steps that each vCPU that writes has done since the guest's very beginning.
    pub steps: Vec<u64>,
    /// The number of steps that all these vCPUs have done in a second, since the request before this one; 0 in the
    /// first.
    pub steps_per_second: f64,
    /// The number of pages that each vCPU that only reads has read since the guest's very beginning. It counts them by
    /// the thousand.
    pub reads: Vec<u64>,
    /// The number of pages that all these vCPUs have read in a second, since the request before this one; 0 in the
    /// first.
    pub reads_per_second: f64,
    /// The longest stall since stalls were reset, in nanoseconds; 0 if there was none of
    /// 50 µs (flat out) or 250 µs (of a guest that sleeps).
    pub longest_stall_ns: u64,
    /// The number of stalls since stalls were reset: each entry counts those of `at_least_ns` up to twice that.
    pub histogram: Vec<StallBucket>,
    /// The last stalls since stalls were reset, of all vCPUs that write, at most 256 of each, in order of time.
    pub stalls: Vec<StallSeen>,
    /// The longest stall that overlaps the time from the start of tracking until all pages were armed, in nanoseconds,
    /// for the last time that tracking was started; none if it never was.
    pub tracking_stall_ns: Option<u64>,
}

/// The progress of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestProgress {
    /// The time when it was seen, in nanoseconds of `CLOCK_REALTIME`.
    pub realtime_ns: u64,
    /// The number of steps that all vCPUs that write have done since the guest's very beginning.
    pub steps: u64,
    /// The number of pages that all vCPUs that only read have read since the guest's very beginning.
    pub reads: u64,
}

/// Stalls of about one length.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StallBucket {
    /// The length of the shortest of these stalls, in nanoseconds.
    pub at_least_ns: u64,
    /// The number of these stalls.
    pub count: u64,
}

/// A time in which a vCPU could not run although it wanted to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StallSeen {
    /// The number of the vCPU.
    pub vcpu: u16,
    /// The time when it began, in nanoseconds of `CLOCK_REALTIME`.
    pub realtime_ns: u64,
    /// The time when it began, in nanoseconds of this host's `CLOCK_MONOTONIC`; negative before the host's start.
    pub monotonic_ns: i64,
    /// The length of the stall, in nanoseconds.
    pub ns: u64,
}

impl Notes {
    /// Forgets the stalls so far. The guest's own memory is not touched.
    pub fn reset_stalls(&mut self, ram: &GuestRam, layout: &GuestLayout) {
        let marks = blocks(ram, layout).map(|(_, block)| Mark {
            stalls: block.stalls.load(Ordering::Acquire),
            longest: block.longest.load(Ordering::Relaxed),
            histogram: block.histogram.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
        });
        self.marks = marks.collect();
    }

    /// Notes that tracking has changed at `now`.
    pub fn tracking_changed(&mut self, phase: TrackingPhase, now: &ClockReading) {
        match phase {
            TrackingPhase::Started => {
                self.tracking = (Some(now.realtime), None);
                self.tracking_stall = Some(0);
            }
            TrackingPhase::WriteProtected => self.tracking.1 = Some(now.realtime),
            TrackingPhase::Stopped => self.tracking.1 = self.tracking.1.or(Some(now.realtime)),
        }
    }

    /// Looks for stalls in the start of tracking, before later stalls take their places. It must be called now and
    /// then, and before the guest moves.
    pub fn look_for_tracking_stall(&mut self, ram: &GuestRam, layout: &GuestLayout, now: &ClockReading) {
        let (Some(start), end) = self.tracking else { return };
        let end = end.unwrap_or(u64::MAX);
        let overlap =
            |stall: &StallSeen| stall.realtime_ns < end && stall.realtime_ns.saturating_add(stall.ns) > start;
        let longest = blocks(ram, layout)
            .flat_map(|(vcpu, block)| remembered(vcpu, block, 0, now))
            .filter(overlap)
            .map(|stall| stall.ns)
            .max();
        self.tracking_stall = self.tracking_stall.max(longest);
    }

    /// Returns what the guest saw. The caller adds its rates and its state.
    pub fn stats(&mut self, ram: &GuestRam, layout: &GuestLayout, now: &ClockReading) -> Stats {
        self.look_for_tracking_stall(ram, layout, now);
        self.marks.resize(layout.writers().into(), Mark::default());
        let mut stats = Stats {
            standing: String::new(),
            monotonic_ns: now.monotonic,
            steps: steps(ram, layout),
            steps_per_second: 0.0,
            reads: reads(ram, layout),
            reads_per_second: 0.0,
            longest_stall_ns: 0,
            histogram: Vec::new(),
            stalls: Vec::new(),
            tracking_stall_ns: self.tracking_stall,
        };
        let mut counts = [0u64; 64];
        for ((vcpu, block), mark) in blocks(ram, layout).zip(&self.marks) {
            let seen: Vec<_> = remembered(vcpu, block, mark.stalls, now).collect();
            let mut longest = seen.iter().map(|stall| stall.ns).max().unwrap_or(0);
            for (bucket, count) in counts.iter_mut().enumerate() {
                let before = mark.histogram.get(bucket).copied().unwrap_or(0);
                let since = block.histogram[bucket].load(Ordering::Relaxed).saturating_sub(before);
                *count += since;
                if since > 0 {
                    // The ring may have lost it; then it was at least this long.
                    longest = longest.max(now.nanoseconds(1 << bucket));
                }
            }
            let record = block.longest.load(Ordering::Relaxed);
            if record > mark.longest {
                longest = longest.max(now.nanoseconds(record));
            }
            stats.longest_stall_ns = stats.longest_stall_ns.max(longest);
            stats.stalls.extend(seen);
        }
        stats.stalls.sort_by_key(|stall| stall.realtime_ns);
        stats.histogram = (0..)
            .zip(counts)
            .filter(|(_, count)| *count > 0)
            .map(|(bucket, count)| StallBucket { at_least_ns: now.nanoseconds(1 << bucket), count })
            .collect();
        stats
    }
}

/// Returns the number of steps done by each vCPU that writes.
pub fn steps(ram: &GuestRam, layout: &GuestLayout) -> Vec<u64> {
    blocks(ram, layout).map(|(_, block)| block.steps.load(Ordering::Relaxed)).collect()
}

/// Returns the number of pages read by each vCPU that only reads.
pub fn reads(ram: &GuestRam, layout: &GuestLayout) -> Vec<u64> {
    let readers = layout.writers()..layout.vcpus();
    readers.map(|vcpu| ControlBlock::of(ram, layout, vcpu).reads.load(Ordering::Relaxed)).collect()
}

/// Adds up what all vCPUs counted. They may report anything, so the sum may overflow.
pub fn sum(counts: &[u64]) -> u64 {
    counts.iter().fold(0, |sum, count| sum.wrapping_add(*count))
}

/// Returns the blocks of the vCPUs that write; only they note stalls.
fn blocks<'a>(ram: &'a GuestRam, layout: &'a GuestLayout) -> impl Iterator<Item = (u16, &'a ControlBlock)> {
    (0..layout.writers()).map(|vcpu| (vcpu, ControlBlock::of(ram, layout, vcpu)))
}

/// Returns the stalls that a vCPU's ring still holds, from number `from` on.
fn remembered<'a>(
    vcpu: u16,
    block: &'a ControlBlock,
    from: u64,
    now: &'a ClockReading,
) -> impl Iterator<Item = StallSeen> + 'a {
    let stalls = block.stalls.load(Ordering::Acquire);
    let first = from.max(stalls.saturating_sub(RING as u64));
    (first..stalls).map(move |number| {
        let slot = &block.ring[number as usize % RING];
        let age = now.age(slot.begin.load(Ordering::Relaxed));
        StallSeen {
            vcpu,
            realtime_ns: now.realtime.saturating_sub(age),
            monotonic_ns: now.monotonic.cast_signed().saturating_sub_unsigned(age),
            ns: now.nanoseconds(slot.ticks.load(Ordering::Relaxed)),
        }
    })
}
