//! [`ControlBlock`]: the parameters of a vCPU, and its reports.

use std::sync::atomic::{AtomicU64, Ordering};

use memlane_kvm::ram::GuestRam;
use memlane_protocol::PAGE_SIZE;

use super::layout::{BLOCK_PAGES, GuestLayout};
use crate::workload::{Workload, WriteRate};

/// The number of stalls that a block remembers.
pub const RING: usize = 256;
/// The shortest gap between two steps that counts as a stall, in nanoseconds: an interrupt on the host sometimes takes
/// nearly as long.
pub const STALL_NS: u64 = 50_000;
/// The delay from which a late wake-up counts as a stall, in nanoseconds. To wake a thread takes up to about 0.1 ms, a
/// thousand times a second, and would drive real stalls out of the ring.
pub const LATE_NS: u64 = 250_000;
/// The number of reads after which a reader counts them. This is its only write to memory. It is so rare that what
/// slows writes does not slow the reader: it waits for this page once in a round of pre-copy, and not at each read.
pub const READS_PER_COUNT: u64 = 1024;
/// The number of steps, in `1 << 32` units, after which a flat-out guest looks at its parameters again.
const FLAT_OUT: u64 = 256 << 32;

/// A vCPU's pair of pages in guest RAM. The VMM writes the parameters before the first step, and only the guest writes
/// the rest. Times are ticks of the guest's clock: the TSC of a virtual machine, or the nanoseconds of a process.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct ControlBlock {
    /// The value 1 if the vCPU only reads. A reader uses only these parameters: the place of its part, and the random
    /// generator.
    pub reader: AtomicU64,
    /// The guest physical address of the first page of the part.
    pub base: AtomicU64,
    /// The number of pages in the part.
    pub pages: AtomicU64,
    /// The first page of the part that lies above the hole.
    pub split: AtomicU64,
    /// The number of bytes to add to the address of a page that lies above the hole.
    pub hole_bytes: AtomicU64,
    /// The number of hot pages.
    pub hot_pages: AtomicU64,
    /// The chance that a step goes to a hot page, in 65,536ths.
    pub hot_chance: AtomicU64,
    /// The value 1 if pages are written in order.
    pub sequential: AtomicU64,
    /// The number of steps due in each period, in `1 << 32` units.
    pub per_period: AtomicU64,
    /// The length of a period in ticks; 0 if there is no sleep between periods.
    pub period: AtomicU64,
    /// The length of the shortest gap that counts as a stall, in ticks.
    pub threshold: AtomicU64,
    /// The state of the random generator before the first step.
    pub random: AtomicU64,

    /// The part of a step that is due but not yet done, in `1 << 32` units.
    pub credit: AtomicU64,
    /// The time at which the guest's sleep ends, in ticks.
    pub deadline: AtomicU64,
    /// The number of steps done. A step is counted after its write.
    pub steps: AtomicU64,
    /// The number of pages that a reader has read, counted every [`READS_PER_COUNT`].
    pub reads: AtomicU64,

    /// The number of stalls seen.
    pub stalls: AtomicU64,
    /// The length of the longest stall, in ticks.
    pub longest: AtomicU64,
    /// The number of stalls that took from `2^n` ticks up to twice that.
    pub histogram: [AtomicU64; 64],
    /// The last [`RING`] stalls; stall `n` is in slot `n % RING`.
    pub ring: [Stall; RING],
}

/// A time in which the guest wanted to run and could not.
#[derive(Debug)]
#[repr(C)]
pub struct Stall {
    /// The time at which the stall began, in ticks.
    pub begin: AtomicU64,
    /// The length of the stall, in ticks.
    pub ticks: AtomicU64,
}

const _: () = assert!(size_of::<ControlBlock>() as u64 == BLOCK_PAGES * PAGE_SIZE);

impl ControlBlock {
    /// Returns the block of a vCPU in guest RAM.
    pub fn of<'a>(ram: &'a GuestRam, layout: &GuestLayout, vcpu: u16) -> &'a Self {
        let slice = ram.slices(layout.block(vcpu)).next().expect("the layout was made for this RAM");
        assert_eq!(slice.len, size_of::<Self>(), "blocks lie in the first region");
        // SAFETY: the slice has the block's size and lies page aligned in a mapping that lives as
        // long as the RAM is borrowed; all fields are atomics, which guest and VMM may write at any time.
        unsafe { &*slice.ptr.cast() }
    }

    /// Writes the parameters of a vCPU, for a clock of `khz`.
    pub fn set_up(&self, layout: &GuestLayout, workload: &Workload, vcpu: u16, khz: u32) {
        let part = layout.part(vcpu);
        let stepper = layout.stepper(workload, vcpu);
        let (hot_pages, hot_chance) = stepper.hot();
        let ticks = |ns: u64| ns * u64::from(khz) / 1_000_000;
        let (per_period, period, threshold) = match workload.rate {
            WriteRate::FlatOut => (FLAT_OUT, 0, ticks(STALL_NS)),
            WriteRate::PagesPerSecond(pages) => {
                let period = workload.tick.as_nanos() as u64;
                let each = (u128::from(pages) << 32) / u128::from(layout.writers());
                let each = each * u128::from(period) / 1_000_000_000;
                (u64::try_from(each).unwrap_or(FLAT_OUT), ticks(period), ticks(LATE_NS))
            }
        };
        for (field, value) in [
            (&self.reader, u64::from(layout.is_reader(vcpu))),
            (&self.base, layout.address_of(part.start)),
            (&self.pages, stepper.pages()),
            (&self.split, layout.low_pages().saturating_sub(part.start)),
            (&self.hole_bytes, if part.start < layout.low_pages() { layout.hole_bytes() } else { 0 }),
            (&self.hot_pages, hot_pages),
            (&self.hot_chance, hot_chance),
            (&self.sequential, u64::from(stepper.is_sequential())),
            (&self.per_period, per_period),
            (&self.period, period),
            (&self.threshold, threshold),
            (&self.random, stepper.position()[0]),
        ] {
            field.store(value, Ordering::Relaxed);
        }
    }

    /// Notes a stall, as the guest code does.
    pub fn note_stall(&self, begin: u64, ticks: u64) {
        let number = self.stalls.load(Ordering::Relaxed);
        let slot = &self.ring[number as usize % RING];
        slot.begin.store(begin, Ordering::Relaxed);
        slot.ticks.store(ticks, Ordering::Relaxed);
        self.histogram[ticks.max(1).ilog2() as usize].fetch_add(1, Ordering::Relaxed);
        self.longest.fetch_max(ticks, Ordering::Relaxed);
        self.stalls.store(number.wrapping_add(1), Ordering::Release);
    }
}
