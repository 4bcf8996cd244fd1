//! [`ControlBlock`]: what a vCPU is told to do, and what it reports.

use std::sync::atomic::{AtomicU64, Ordering};

use memlane_kvm::ram::GuestRam;
use memlane_protocol::PAGE_SIZE;

use super::Layout;
use crate::workload::{Rate, Workload};

/// Pages of a control block.
pub const BLOCK_PAGES: u64 = 2;
/// Stalls that a block remembers.
pub const RING: usize = 256;
/// Shorter gaps between two steps are no stalls: an interrupt on the host takes this long at times.
pub const STALL_NS: u64 = 50_000;
/// Sleeps that last longer than asked for by less than this are no stalls: to wake a thread takes
/// up to about 0.1 ms, a thousand times a second, and would drive real stalls out of the ring.
pub const LATE_NS: u64 = 250_000;
/// Reads after which a reader counts them. It is its only write to memory, rare enough that what slows writes does not
/// slow it: it waits for this page once in a round of pre-copy, and not at each read.
pub const READS_PER_COUNT: u64 = 1024;
/// Steps in `1 << 32` units, before a flat-out guest looks at its parameters again.
const FLAT_OUT: u64 = 256 << 32;

/// A vCPU's page pair in guest RAM. The VMM writes the parameters before the first step; all
/// else is written by the guest alone. Times are ticks of the guest's clock, which is the TSC of
/// a virtual machine, and nanoseconds of a process.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct ControlBlock {
    /// 1 of a vCPU that only reads. Of what follows it knows the place of its part and the random generator.
    pub reader: AtomicU64,
    /// Guest physical address of the first page of the part.
    pub base: AtomicU64,
    /// Pages in the part.
    pub pages: AtomicU64,
    /// First page of the part that lies above the hole.
    pub split: AtomicU64,
    /// Bytes to add to the addresses of these.
    pub hole_bytes: AtomicU64,
    /// Hot pages.
    pub hot_pages: AtomicU64,
    /// Their chance in 65,536ths.
    pub hot_chance: AtomicU64,
    /// 1 if pages are written in order.
    pub sequential: AtomicU64,
    /// Steps due each period, in `1 << 32` units.
    pub per_period: AtomicU64,
    /// Ticks of a period; 0 if there is no sleep between periods.
    pub period: AtomicU64,
    /// Ticks of the shortest gap that counts as stall.
    pub threshold: AtomicU64,
    /// State of the random generator before the first step.
    pub random: AtomicU64,

    /// Part of a step that is due but not yet done, in `1 << 32` units.
    pub credit: AtomicU64,
    /// When the sleep ends that the guest asked for.
    pub deadline: AtomicU64,
    /// Steps done. The step's write comes before this is counted.
    pub steps: AtomicU64,
    /// Pages that a reader has read, counted every [`READS_PER_COUNT`].
    pub reads: AtomicU64,

    /// Stalls seen.
    pub stalls: AtomicU64,
    /// Ticks of the longest.
    pub longest: AtomicU64,
    /// How many stalls took `2^n` ticks, or up to twice that.
    pub histogram: [AtomicU64; 64],
    /// The last [`RING`] stalls; stall `n` is in slot `n % RING`.
    pub ring: [Stall; RING],
}

/// A time in which the guest wanted to run and could not.
#[derive(Debug)]
#[repr(C)]
pub struct Stall {
    /// When it began.
    pub begin: AtomicU64,
    /// Ticks that it took.
    pub ticks: AtomicU64,
}

const _: () = assert!(size_of::<ControlBlock>() as u64 == BLOCK_PAGES * PAGE_SIZE);

impl ControlBlock {
    /// The block of a vCPU in guest RAM.
    pub fn of<'a>(ram: &'a GuestRam, layout: &Layout, vcpu: u16) -> &'a Self {
        let slice = ram.slices(layout.block(vcpu)).next().expect("the layout was made for this RAM");
        assert_eq!(slice.len, size_of::<Self>(), "blocks lie in the first region");
        // SAFETY: the slice has the block's size and lies page aligned in a mapping that lives as
        // long as the RAM is borrowed; all fields are atomics, which guest and VMM may write at any time.
        unsafe { &*slice.ptr.cast() }
    }

    /// Tells a vCPU what to do, for a clock of `khz`.
    pub fn set_up(&self, layout: &Layout, workload: &Workload, vcpu: u16, khz: u32) {
        let part = layout.part(vcpu);
        let stepper = layout.stepper(workload, vcpu);
        let (hot_pages, hot_chance) = stepper.hot();
        let ticks = |ns: u64| ns * u64::from(khz) / 1_000_000;
        let (per_period, period, threshold) = match workload.rate {
            Rate::FlatOut => (FLAT_OUT, 0, ticks(STALL_NS)),
            Rate::PagesPerSecond(pages) => {
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
