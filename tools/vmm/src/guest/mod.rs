//! The guest: where things lie in its memory, and what it and its VMM tell each other there.
//!
//! ```text
//! page 0        nothing
//! page 1        code
//! page 2..18    control blocks, two pages for each vCPU
//! page 18..     page tables
//! page 512..    the working set, one part for each vCPU that writes
//! then          pages that are filled once and never written
//! ```
//!
//! That is the order of their numbers. In a [spread](Layout::spread) guest, pages from 512 on lie in pieces far
//! apart, and most of its memory is never touched.

pub mod block;
pub mod clock;
pub mod code;
pub mod kvm;
pub mod long_mode;
pub mod process;
mod spread;
mod vcpu;

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::machine::{MAX_RAM_BYTES, Machine};

use self::spread::Spread;
use crate::workload::{SLOTS, Stepper, Workload};

pub use block::{ControlBlock, Stall};
pub use clock::Reading;

/// Most vCPUs that a guest has.
pub const MAX_VCPUS: u16 = 8;
/// Page of the code.
pub const CODE_PAGE: u64 = 1;
/// First page of the first control block.
pub const BLOCKS_PAGE: u64 = 2;
/// First page of the page tables.
pub const TABLES_PAGE: u64 = BLOCKS_PAGE + MAX_VCPUS as u64 * block::BLOCK_PAGES;
/// Pages before the working set: 2 MiB.
pub const SYSTEM_PAGES: u64 = 512;

/// RAM below the hole that interrupt controllers and such have in a PC's address space.
const LOW_BYTES: u64 = 3 << 30;
/// Where RAM goes on above it.
const HIGH_ADDRESS: u64 = 4 << 30;
/// Lengths of RAM and regions are multiples of this.
const UNIT: u64 = 2 << 20;
/// Most RAM of a guest that may touch all of it.
const MOST_BYTES: u64 = 256 << 30;

/// A guest of either kind, as its VMM handles it.
pub trait Guest: Send + Sync {
    /// What it is, or for one that is awaited what this host could run.
    fn machine(&self) -> Machine;

    /// Its clock, which all vCPUs share.
    fn clock(&self) -> Reading;

    /// Whether a vCPU may run on after a step that its block does not count yet: a virtual
    /// machine can be stopped between the two.
    fn stops_anywhere(&self) -> bool;

    /// Pages that the VMM writes before the start, and nobody after that, by number.
    fn image(&self) -> BTreeMap<u64, [u64; SLOTS]>;

    /// Stops all vCPUs; they stand still on return. Does nothing to a guest that stands still.
    fn pause(&self) -> Result<(), String>;

    /// Lets the vCPUs run. Does nothing to a running guest.
    fn resume(&self) -> Result<(), String>;

    /// Everything but RAM, of a guest that stands still, together with data of the VMM's own.
    fn save(&self, own: Vec<u8>) -> Result<Vec<u8>, String>;

    /// Takes over what [`Guest::save`] gave, and returns the VMM's own data. The guest stands
    /// still until it is resumed.
    fn load(&self, state: &[u8]) -> Result<Vec<u8>, String>;

    /// Waits for a vCPU to fail, at most `patience`; tells why.
    fn failure(&self, patience: Duration) -> Option<String>;
}

/// Where RAM lies in the guest's address space, and what lies where in RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    regions: Vec<(u64, u64)>,
    vcpus: u16,
    writers: u16,
    working_set: Range<u64>,
    spread: Option<Spread>,
}

impl Layout {
    /// The layout of a guest with `ram_bytes` of memory, a multiple of 2 MiB. With `gap`, half
    /// of it lies above the hole, however little it is.
    pub fn new(ram_bytes: u64, gap: bool, vcpus: u16, workload: &Workload) -> Result<Self, String> {
        if ram_bytes > MOST_BYTES {
            return Err(format!(
                "RAM can be {} GiB at most, unless only some of it is resident",
                MOST_BYTES >> 30
            ));
        }
        Self::any(ram_bytes, gap, vcpus, workload)
    }

    /// The same of a guest that touches `resident_pages` of its memory and never any other, besides the first
    /// 2 MiB: in pieces from its beginning to its very end, each with its share of the
    /// working set. No virtual machine can be that.
    pub fn spread(
        ram_bytes: u64,
        gap: bool,
        vcpus: u16,
        workload: &Workload,
        resident_pages: u64,
    ) -> Result<Self, String> {
        if ram_bytes > MAX_RAM_BYTES {
            return Err(format!("RAM can be {} TiB at most", MAX_RAM_BYTES >> 40));
        }
        let layout = Self::any(ram_bytes, gap, vcpus, workload)?;
        let free = SYSTEM_PAGES..layout.pages();
        let spread = Spread::new(free, workload.working_set_pages, resident_pages)?;
        Ok(Self { spread: Some(spread), ..layout })
    }

    fn any(ram_bytes: u64, gap: bool, vcpus: u16, workload: &Workload) -> Result<Self, String> {
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(format!("a guest has 1 to {MAX_VCPUS} vCPUs, not {vcpus}"));
        }
        let readers = workload.readers;
        let Some(writers @ 1..) = vcpus.checked_sub(readers) else {
            return Err(format!(
                "at least one vCPU must write: of {vcpus}, at most {} can be readers, not {readers}",
                vcpus - 1
            ));
        };
        if !ram_bytes.is_multiple_of(UNIT) || ram_bytes < 2 * UNIT {
            return Err("RAM must be a multiple of 2MiB, and at least 4MiB".into());
        }
        let low = if gap { (ram_bytes / 2).next_multiple_of(UNIT) } else { ram_bytes }.min(LOW_BYTES);
        let mut regions = vec![(0, low)];
        if ram_bytes > low {
            regions.push((HIGH_ADDRESS, ram_bytes - low));
        }
        let free = ram_bytes / PAGE_SIZE - SYSTEM_PAGES;
        if workload.working_set_pages < u64::from(writers) || workload.working_set_pages > free {
            return Err(format!(
                "the working set must have a page for each vCPU that writes and leave 2MiB of RAM to the system: \
                 {writers} to {free} pages of 4KiB, not {}",
                workload.working_set_pages
            ));
        }
        let working_set = SYSTEM_PAGES..SYSTEM_PAGES + workload.working_set_pages;
        Ok(Self { regions, vcpus, writers, working_set, spread: None })
    }

    /// Address and length of each region of RAM, in bytes.
    pub fn regions(&self) -> &[(u64, u64)] {
        &self.regions
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> u16 {
        self.vcpus
    }

    /// Number of vCPUs that write, which are the first ones.
    pub fn writers(&self) -> u16 {
        self.writers
    }

    /// Whether a vCPU only reads.
    pub fn is_reader(&self, vcpu: u16) -> bool {
        vcpu >= self.writers
    }

    /// Pages of RAM.
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(|(_, bytes)| bytes / PAGE_SIZE).sum()
    }

    /// The page of a number: of those that may be touched, in the order told above.
    pub fn page(&self, number: u64) -> u64 {
        match &self.spread {
            Some(spread) if number >= SYSTEM_PAGES => spread.page(number - SYSTEM_PAGES),
            _ => number,
        }
    }

    /// The number of a page; `None` if it is never touched.
    pub fn number(&self, page: u64) -> Option<u64> {
        match &self.spread {
            Some(spread) if page >= SYSTEM_PAGES => Some(SYSTEM_PAGES + spread.number(page)?),
            _ => Some(page),
        }
    }

    /// The pages that may be touched, in order.
    pub fn touched(&self) -> Vec<Range<u64>> {
        match &self.spread {
            Some(spread) => std::iter::once(0..SYSTEM_PAGES).chain(spread.pieces()).collect(),
            None => std::iter::once(0..self.pages()).collect(),
        }
    }

    /// Where pages of consecutive numbers lie: the first number of each run, and its pages.
    pub fn runs(&self, numbers: Range<u64>) -> Vec<(u64, Range<u64>)> {
        if self.spread.is_none() {
            return vec![(numbers.start, numbers)];
        }
        let mut runs: Vec<(u64, Range<u64>)> = Vec::new();
        for number in numbers {
            let page = self.page(number);
            match runs.last_mut() {
                Some((_, run)) if run.end == page => run.end += 1,
                _ => runs.push((number, page..page + 1)),
            }
        }
        runs
    }

    /// Numbers of the working set.
    pub fn working_set(&self) -> Range<u64> {
        self.working_set.clone()
    }

    /// Numbers of the part of the working set that a vCPU writes; a reader has all of it to read.
    pub fn part(&self, vcpu: u16) -> Range<u64> {
        if self.is_reader(vcpu) {
            return self.working_set();
        }
        let each = (self.working_set.end - self.working_set.start) / u64::from(self.writers);
        let first = self.working_set.start + u64::from(vcpu) * each;
        first..first + each
    }

    /// The steps of a vCPU from the beginning.
    pub fn stepper(&self, workload: &Workload, vcpu: u16) -> Stepper {
        match self.is_reader(vcpu) {
            true => workload.reader(vcpu),
            false => workload.stepper(vcpu, self.writers),
        }
    }

    /// The pages of a vCPU's control block.
    pub fn block(&self, vcpu: u16) -> Range<u64> {
        let first = BLOCKS_PAGE + u64::from(vcpu) * block::BLOCK_PAGES;
        first..first + block::BLOCK_PAGES
    }

    /// The guest physical address of a page.
    pub fn address_of(&self, page: u64) -> u64 {
        let low = self.low_pages();
        if page < low { page * PAGE_SIZE } else { HIGH_ADDRESS + (page - low) * PAGE_SIZE }
    }

    /// Pages before the hole.
    pub fn low_pages(&self) -> u64 {
        self.regions[0].1 / PAGE_SIZE
    }

    /// Bytes of address space between the last page before the hole and the first after it.
    pub fn hole_bytes(&self) -> u64 {
        HIGH_ADDRESS - self.regions[0].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::{Fill, Pattern, Rate, TICK};

    fn layout(ram_bytes: u64, gap: bool, vcpus: u16, working_set_pages: u64) -> Result<Layout, String> {
        Layout::new(ram_bytes, gap, vcpus, &workload(working_set_pages, 0))
    }

    fn workload(working_set_pages: u64, readers: u16) -> Workload {
        let fill = Fill { zero: 100, random: 0, compressible: 0, mixed: 0 };
        let (pattern, rate) = (Pattern::Uniform, Rate::FlatOut);
        Workload { seed: 1, pattern, rate, tick: TICK, working_set_pages, readers, fill }
    }

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(layout(1 << 30, false, 1, 9).unwrap().regions(), [(0, 1 << 30)]);
        assert_eq!(layout(1 << 30, true, 1, 9).unwrap().regions(), [(0, 1 << 29), (4 << 30, 1 << 29)]);
        assert_eq!(layout(8 << 30, false, 1, 9).unwrap().regions(), [(0, 3 << 30), (4 << 30, 5 << 30)]);
        assert_eq!(layout(8 << 30, true, 1, 9).unwrap().regions(), [(0, 3 << 30), (4 << 30, 5 << 30)]);
        let small = layout(6 << 20, true, 1, 9).unwrap();
        assert_eq!(small.regions(), [(0, 4 << 20), (4 << 30, 2 << 20)]);
        assert_eq!(small.address_of(1023), (4 << 20) - 4096);
        assert_eq!(small.address_of(1024), 4 << 30);
    }

    #[test]
    fn parts_do_not_overlap() {
        let layout = layout(64 << 20, false, 3, 1000).unwrap();
        assert_eq!(layout.part(0), 512..845);
        assert_eq!(layout.part(2).end, 512 + 999);
        assert!(layout.block(7).end <= TABLES_PAGE);
    }

    #[test]
    fn readers_have_no_part_but_all() {
        let layout = Layout::new(64 << 20, false, 4, &workload(1000, 2)).unwrap();
        assert_eq!((layout.vcpus(), layout.writers()), (4, 2));
        assert_eq!([0, 1, 2, 3].map(|vcpu| layout.part(vcpu)), [512..1012, 1012..1512, 512..1512, 512..1512]);
        assert_eq!([1, 2].map(|vcpu| layout.is_reader(vcpu)), [false, true]);
        for readers in [4, 5, u16::MAX] {
            let error = Layout::new(64 << 20, false, 4, &workload(1000, readers)).unwrap_err();
            assert!(error.contains("at most 3 can be readers"), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (ram, vcpus, pages) in [
            (4 << 20, 0, 9),
            (4 << 20, 9, 9),
            (3 << 20, 1, 9),
            (2 << 20, 1, 9),
            (4 << 20, 2, 1),
            (4 << 20, 1, 513),
        ] {
            assert!(layout(ram, false, vcpus, pages).is_err(), "{ram} {vcpus} {pages}");
        }
        assert!(layout(512 << 30, false, 1, 9).is_err());
        assert!(Layout::spread(65 << 40, false, 1, &workload(64, 0), 128).is_err());
    }

    #[test]
    fn a_spread_guest_touches_its_pieces_and_nothing_else() {
        let layout = Layout::spread(24 << 40, false, 2, &workload(640, 0), 6400).unwrap();
        let touched = layout.touched();
        assert_eq!(touched[0], 0..SYSTEM_PAGES);
        assert_eq!(touched.last().unwrap().end, layout.pages());
        assert!(touched.windows(2).all(|pair| pair[0].end <= pair[1].start));
        let pages: u64 = touched.iter().map(|piece| piece.end - piece.start).sum();
        assert_eq!(pages, SYSTEM_PAGES + 6400);
        let mut numbers: Vec<u64> =
            touched.into_iter().flatten().map(|page| layout.number(page).unwrap()).collect();
        assert!(numbers.iter().all(|number| layout.number(layout.page(*number)) == Some(*number)));
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(0..SYSTEM_PAGES + 6400));
        assert_eq!(layout.number(layout.pages() / 2 + 6400), None);
        // Either vCPU writes all over its half, and the second one up to the last piece.
        assert!(layout.page(layout.part(1).end - 1) > layout.pages() - 101);
    }
}
