//! What the guest saw of its own progress, read from its control blocks without disturbing it.

use std::sync::atomic::Ordering;

use memlane_kvm::attach::TrackingPhase;
use memlane_kvm::ram::GuestRam;
use serde::{Deserialize, Serialize};

use crate::guest::block::RING;
use crate::guest::{ControlBlock, Layout, Reading};

/// The VMM's notes about a guest. They move with it, so that the VMM at the destination can tell
/// what the guest saw on its way.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Notes {
    /// What each vCPU had seen when stalls were last reset.
    marks: Vec<Mark>,
    /// When the last tracking started, and when all pages were armed; `CLOCK_REALTIME`, nanoseconds.
    tracking: (Option<u64>, Option<u64>),
    /// The longest stall in that time, nanoseconds.
    tracking_stall: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Mark {
    stalls: u64,
    longest: u64,
    histogram: Vec<u64>,
}

/// How the guest is doing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Whether the guest runs, is paused, is awaited, or was loaded and waits for its start.
    pub standing: String,
    /// When all this was read, `CLOCK_MONOTONIC` of this host, nanoseconds.
    pub monotonic_ns: u64,
    /// Steps done by each vCPU that writes, since the guest's very beginning.
    pub steps: Vec<u64>,
    /// Steps a second of all of them since the request before this one; 0 in the first.
    pub steps_per_second: f64,
    /// Pages read by each vCPU that only reads, since the guest's very beginning; it counts them
    /// by the thousand.
    pub reads: Vec<u64>,
    /// Pages read a second by all of them since the request before this one; 0 in the first.
    pub reads_per_second: f64,
    /// The longest stall since stalls were reset, in nanoseconds; 0 if there was none of
    /// 50 µs (flat out) or 250 µs (of a guest that sleeps).
    pub longest_stall_ns: u64,
    /// How many stalls since then: each entry counts those of `at_least_ns` up to twice that.
    pub histogram: Vec<Bucket>,
    /// The last stalls since then, of all vCPUs that write, at most 256 of each, in order of time.
    pub stalls: Vec<StallSeen>,
    /// The longest stall that overlaps the time from the start of tracking until all pages were
    /// armed, the last time that tracking was started; none if it never was.
    pub tracking_stall_ns: Option<u64>,
}

/// How far the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// When that was seen, `CLOCK_REALTIME`, nanoseconds.
    pub realtime_ns: u64,
    /// Steps done by all vCPUs that write, since the guest's very beginning.
    pub steps: u64,
    /// Pages read by all vCPUs that only read, since then.
    pub reads: u64,
}

/// Stalls of about one length.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    /// The shortest of them.
    pub at_least_ns: u64,
    /// How many.
    pub count: u64,
}

/// A time in which a vCPU could not run although it wanted to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StallSeen {
    /// Which vCPU.
    pub vcpu: u16,
    /// When it began, `CLOCK_REALTIME`, nanoseconds.
    pub realtime_ns: u64,
    /// When it began, `CLOCK_MONOTONIC` of this host, nanoseconds; negative before its start.
    pub monotonic_ns: i64,
    /// How long it was.
    pub ns: u64,
}

impl Notes {
    /// Forgets the stalls so far. The guest's own memory is not touched.
    pub fn reset_stalls(&mut self, ram: &GuestRam, layout: &Layout) {
        let marks = blocks(ram, layout).map(|(_, block)| Mark {
            stalls: block.stalls.load(Ordering::Acquire),
            longest: block.longest.load(Ordering::Relaxed),
            histogram: block.histogram.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
        });
        self.marks = marks.collect();
    }

    /// Tracking has changed at `now`.
    pub fn tracking_changed(&mut self, phase: TrackingPhase, now: &Reading) {
        match phase {
            TrackingPhase::Started => {
                self.tracking = (Some(now.realtime), None);
                self.tracking_stall = Some(0);
            }
            TrackingPhase::WriteProtected => self.tracking.1 = Some(now.realtime),
            TrackingPhase::Stopped => self.tracking.1 = self.tracking.1.or(Some(now.realtime)),
        }
    }

    /// Looks for stalls in the start of tracking, before later ones take their places. To be
    /// called now and then, and before the guest moves.
    pub fn look_for_tracking_stall(&mut self, ram: &GuestRam, layout: &Layout, now: &Reading) {
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

    /// What the guest saw. What it did a second and its standing are the caller's to add.
    pub fn stats(&mut self, ram: &GuestRam, layout: &Layout, now: &Reading) -> Stats {
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
            .map(|(bucket, count)| Bucket { at_least_ns: now.nanoseconds(1 << bucket), count })
            .collect();
        stats
    }
}

/// Steps done by each vCPU that writes.
pub fn steps(ram: &GuestRam, layout: &Layout) -> Vec<u64> {
    blocks(ram, layout).map(|(_, block)| block.steps.load(Ordering::Relaxed)).collect()
}

/// Pages read by each vCPU that only reads.
pub fn reads(ram: &GuestRam, layout: &Layout) -> Vec<u64> {
    let readers = layout.writers()..layout.vcpus();
    readers.map(|vcpu| ControlBlock::of(ram, layout, vcpu).reads.load(Ordering::Relaxed)).collect()
}

/// All of what vCPUs counted. They may report anything, so it may overflow.
pub fn sum(counts: &[u64]) -> u64 {
    counts.iter().fold(0, |sum, count| sum.wrapping_add(*count))
}

/// The blocks of the vCPUs that write; only they note stalls.
fn blocks<'a>(ram: &'a GuestRam, layout: &'a Layout) -> impl Iterator<Item = (u16, &'a ControlBlock)> {
    (0..layout.writers()).map(|vcpu| (vcpu, ControlBlock::of(ram, layout, vcpu)))
}

/// The stalls that a vCPU's ring still holds, from number `from` on.
fn remembered<'a>(
    vcpu: u16,
    block: &'a ControlBlock,
    from: u64,
    now: &'a Reading,
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
