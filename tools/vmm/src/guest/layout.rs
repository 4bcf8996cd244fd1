//! [`GuestLayout`]: where RAM lies in the guest's address space, and what lies where in RAM.
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
//! That is the order of their numbers. In a [spread](GuestLayout::spread) guest, pages from 512 on lie in pieces far
//! apart, and most of its memory is never touched.

use std::ops::Range;

use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::machine::MAX_RAM_BYTES;

use super::spread::SpreadLayout;
use crate::workload::{Stepper, Workload};

/// The number of pages of a control block.
pub const BLOCK_PAGES: u64 = 2;
/// The largest number of vCPUs that a guest has.
pub const MAX_VCPUS: u16 = 8;
/// The page of the guest's code.
pub const CODE_PAGE: u64 = 1;
/// The first page of the first control block.
pub const BLOCKS_PAGE: u64 = 2;
/// The first page of the page tables.
pub const TABLES_PAGE: u64 = BLOCKS_PAGE + MAX_VCPUS as u64 * BLOCK_PAGES;
/// The number of pages before the working set: 2 MiB.
pub const SYSTEM_PAGES: u64 = 512;

/// The amount of RAM below the hole that a PC's address space has for interrupt controllers and other devices, in
/// bytes.
const LOW_BYTES: u64 = 3 << 30;
/// The address at which RAM continues above the hole.
const HIGH_ADDRESS: u64 = 4 << 30;
/// The unit of the lengths of RAM and of its regions, in bytes.
const UNIT: u64 = 2 << 20;
/// The largest RAM of a guest that may touch all of it, in bytes.
const MOST_BYTES: u64 = 256 << 30;

/// The place of RAM in the guest's address space, and of what lies in RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestLayout {
    regions: Vec<(u64, u64)>,
    vcpus: u16,
    writers: u16,
    working_set: Range<u64>,
    spread: Option<SpreadLayout>,
}

impl GuestLayout {
    /// Makes the layout of a guest with `ram_bytes` of memory, a multiple of 2 MiB. With `gap`, half of it lies above
    /// the hole, even if it is little.
    pub fn new(ram_bytes: u64, gap: bool, vcpus: u16, workload: &Workload) -> Result<Self, String> {
        if ram_bytes > MOST_BYTES {
            return Err(format!(
                "RAM can be {} GiB at most, unless only some of it is resident",
                MOST_BYTES >> 30
            ));
        }
        Self::any(ram_bytes, gap, vcpus, workload)
    }

    /// Makes the layout of a guest that touches only `resident_pages` of its memory, besides the first 2 MiB. They lie
    /// in pieces from the beginning of the memory to its very end, each with its share of the working set. Only a
    /// process can have this layout, not a virtual machine.
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
        let spread = SpreadLayout::new(free, workload.working_set_pages, resident_pages)?;
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

    /// Returns the address and the length of each region of RAM, in bytes.
    pub fn regions(&self) -> &[(u64, u64)] {
        &self.regions
    }

    /// Returns the number of vCPUs.
    pub fn vcpus(&self) -> u16 {
        self.vcpus
    }

    /// Returns the number of vCPUs that write, which are the first ones.
    pub fn writers(&self) -> u16 {
        self.writers
    }

    /// Returns whether a vCPU only reads.
    pub fn is_reader(&self, vcpu: u16) -> bool {
        vcpu >= self.writers
    }

    /// Returns the number of pages of RAM.
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(|(_, bytes)| bytes / PAGE_SIZE).sum()
    }

    /// Returns the page that has a number. Numbers count the pages that may be touched, in the order of the module's
    /// table.
    pub fn page(&self, number: u64) -> u64 {
        match &self.spread {
            Some(spread) if number >= SYSTEM_PAGES => spread.page(number - SYSTEM_PAGES),
            _ => number,
        }
    }

    /// Returns the number of a page; `None` if the page is never touched.
    pub fn number(&self, page: u64) -> Option<u64> {
        match &self.spread {
            Some(spread) if page >= SYSTEM_PAGES => Some(SYSTEM_PAGES + spread.number(page)?),
            _ => Some(page),
        }
    }

    /// Returns the pages that may be touched, in order.
    pub fn touched(&self) -> Vec<Range<u64>> {
        match &self.spread {
            Some(spread) => std::iter::once(0..SYSTEM_PAGES).chain(spread.pieces()).collect(),
            None => std::iter::once(0..self.pages()).collect(),
        }
    }

    /// Returns where pages of consecutive numbers lie: the first number of each run, and its pages.
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

    /// Returns the numbers of the working set.
    pub fn working_set(&self) -> Range<u64> {
        self.working_set.clone()
    }

    /// Returns the numbers of the part of the working set that a vCPU writes. A reader reads the whole working set.
    pub fn part(&self, vcpu: u16) -> Range<u64> {
        if self.is_reader(vcpu) {
            return self.working_set();
        }
        let each = (self.working_set.end - self.working_set.start) / u64::from(self.writers);
        let first = self.working_set.start + u64::from(vcpu) * each;
        first..first + each
    }

    /// Returns the steps of a vCPU from the beginning.
    pub fn stepper(&self, workload: &Workload, vcpu: u16) -> Stepper {
        match self.is_reader(vcpu) {
            true => workload.reader(vcpu),
            false => workload.stepper(vcpu, self.writers),
        }
    }

    /// Returns the pages of a vCPU's control block.
    pub fn block(&self, vcpu: u16) -> Range<u64> {
        let first = BLOCKS_PAGE + u64::from(vcpu) * BLOCK_PAGES;
        first..first + BLOCK_PAGES
    }

    /// Returns the guest physical address of a page.
    pub fn address_of(&self, page: u64) -> u64 {
        let low = self.low_pages();
        if page < low { page * PAGE_SIZE } else { HIGH_ADDRESS + (page - low) * PAGE_SIZE }
    }

    /// Returns the number of pages before the hole.
    pub fn low_pages(&self) -> u64 {
        self.regions[0].1 / PAGE_SIZE
    }

    /// Returns the length of the address space between the last page before the hole and the first page after it, in
    /// bytes.
    pub fn hole_bytes(&self) -> u64 {
        HIGH_ADDRESS - self.regions[0].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::{Fill, Pattern, TICK, WriteRate};

    fn layout(ram_bytes: u64, gap: bool, vcpus: u16, working_set_pages: u64) -> Result<GuestLayout, String> {
        GuestLayout::new(ram_bytes, gap, vcpus, &workload(working_set_pages, 0))
    }

    fn workload(working_set_pages: u64, readers: u16) -> Workload {
        let fill = Fill { zero: 100, random: 0, compressible: 0, mixed: 0 };
        let (pattern, rate) = (Pattern::Uniform, WriteRate::FlatOut);
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
        let layout = GuestLayout::new(64 << 20, false, 4, &workload(1000, 2)).unwrap();
        assert_eq!((layout.vcpus(), layout.writers()), (4, 2));
        assert_eq!([0, 1, 2, 3].map(|vcpu| layout.part(vcpu)), [512..1012, 1012..1512, 512..1512, 512..1512]);
        assert_eq!([1, 2].map(|vcpu| layout.is_reader(vcpu)), [false, true]);
        for readers in [4, 5, u16::MAX] {
            let error = GuestLayout::new(64 << 20, false, 4, &workload(1000, readers)).unwrap_err();
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
        assert!(GuestLayout::spread(65 << 40, false, 1, &workload(64, 0), 128).is_err());
    }

    #[test]
    fn a_spread_guest_touches_its_pieces_and_nothing_else() {
        let layout = GuestLayout::spread(24 << 40, false, 2, &workload(640, 0), 6400).unwrap();
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
