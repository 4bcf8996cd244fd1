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

pub mod block;
pub mod clock;
pub mod code;
pub mod kvm;
pub mod long_mode;
pub mod process;
mod vcpu;

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::machine::Machine;

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
}

impl Layout {
    /// The layout of a guest with `ram_bytes` of memory, a multiple of 2 MiB. With `gap`, half
    /// of it lies above the hole, however little it is.
    pub fn new(ram_bytes: u64, gap: bool, vcpus: u16, workload: &Workload) -> Result<Self, String> {
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
        if ram_bytes > 256 << 30 {
            return Err("RAM can be 256GiB at most".into());
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
        Ok(Self { regions, vcpus, writers, working_set })
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

    /// The working set.
    pub fn working_set(&self) -> Range<u64> {
        self.working_set.clone()
    }

    /// The part of the working set that a vCPU writes; a reader has all of it to read.
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
    use crate::workload::{Fill, Pattern, Rate};

    fn layout(ram_bytes: u64, gap: bool, vcpus: u16, working_set_pages: u64) -> Result<Layout, String> {
        Layout::new(ram_bytes, gap, vcpus, &workload(working_set_pages, 0))
    }

    fn workload(working_set_pages: u64, readers: u16) -> Workload {
        let fill = Fill { zero: 100, random: 0, compressible: 0, mixed: 0 };
        let (pattern, rate) = (Pattern::Uniform, Rate::FlatOut);
        Workload { seed: 1, pattern, rate, working_set_pages, readers, fill }
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
    }
}
