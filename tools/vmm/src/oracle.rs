//! [`Oracle`]: knows from the workload alone what every byte of a guest's RAM must be.
//!
//! No second copy of RAM is kept: only the working set has a model, into which the steps are
//! replayed; all other pages are computed as they are compared.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::Range;

use memlane_kvm::ram::GuestRam;
use memlane_protocol::PAGE_SIZE;
use serde::{Deserialize, Serialize};

use crate::guest::{GuestLayout, SYSTEM_PAGES};
use crate::workload::{SLOTS, Step, Stepper, Workload};

/// The largest number of differences that a report lists.
const LISTED: usize = 16;
/// The number of steps for each slot of the working set from which replaying backwards is quicker.
const MANY: u64 = 8;
/// The number of pages that a thread compares at a time.
const PIECE_PAGES: u64 = 16 << 10;

type Page = [u64; SLOTS];

/// The contents that RAM must have after a number of steps.
pub struct Oracle {
    layout: GuestLayout,
    workload: Workload,
    image: BTreeMap<u64, Page>,
    stops_anywhere: bool,
    model: Vec<u64>,
    steppers: Vec<Stepper>,
}

/// The result of a comparison of RAM with the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OracleReport {
    /// Whether all of RAM is what it must be.
    pub equal: bool,
    /// The number of pages of RAM, all of which were compared. Holes in its file were taken as zeros, which the pages
    /// must hold that the guest never touches.
    pub pages: u64,
    /// The number of steps that all vCPUs that write have done together.
    pub steps: u64,
    /// The number of pages that are not what they must be.
    pub wrong_pages: u64,
    /// The first of the pages that differ.
    pub differences: Vec<Difference>,
}

/// A page that is not what it must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// The number of the page.
    pub page: u64,
    /// The guest physical address of the page.
    pub address: u64,
    /// The part of RAM that it belongs to.
    pub part: String,
    /// The offset in the page of the first byte that differs. Bytes are compared in groups of eight.
    pub offset: u64,
    /// The value that should be there.
    pub expected: u64,
    /// The value that is there.
    pub found: u64,
}

impl Oracle {
    /// Makes an oracle. If `stops_anywhere`, the guest may be stopped between a step's write and its count.
    pub fn new(
        layout: &GuestLayout,
        workload: &Workload,
        image: BTreeMap<u64, Page>,
        stops_anywhere: bool,
    ) -> Self {
        Self {
            layout: layout.clone(),
            workload: workload.clone(),
            image,
            stops_anywhere,
            model: Vec::new(),
            steppers: Vec::new(),
        }
    }

    /// Replays the model up to these step counts, one for each vCPU that writes. The size of the working set bounds the
    /// cost, however many steps there are.
    pub fn advance(&mut self, steps: &[u64]) {
        let back = self.steppers.iter().zip(steps).any(|(stepper, steps)| stepper.done() > *steps);
        if self.model.is_empty() || back {
            self.begin();
        }
        let each = (self.steppers[0].pages() as usize) * SLOTS;
        std::thread::scope(|scope| {
            for ((stepper, steps), part) in
                self.steppers.iter_mut().zip(steps).zip(self.model.chunks_mut(each))
            {
                scope.spawn(move || replay(stepper, *steps, part));
            }
        });
    }

    /// Compares all RAM of a paused guest with the model.
    pub fn compare(&self, ram: &GuestRam) -> std::io::Result<OracleReport> {
        let data = ram.data_extents(0..ram.pages())?;
        let pieces = pieces(&self.layout.touched(), &data);
        let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let next = std::sync::atomic::AtomicUsize::new(0);
        let work = || {
            let mut wrong = Wrong::default();
            while let Some((pages, is_data)) =
                pieces.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
            {
                self.compare_piece(ram, pages.clone(), *is_data, &mut wrong);
            }
            wrong
        };
        let mut wrong = Wrong::default();
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            for worker in workers {
                wrong.merge(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
        });
        wrong.listed.sort_by_key(|difference| difference.page);
        wrong.listed.truncate(LISTED);
        Ok(OracleReport {
            equal: wrong.pages == 0,
            pages: ram.pages(),
            steps: self.steppers.iter().map(Stepper::done).sum(),
            wrong_pages: wrong.pages,
            differences: wrong.listed,
        })
    }

    /// Resets the model to the state before the first step.
    fn begin(&mut self) {
        let working_set = self.layout.working_set();
        self.model = vec![0; (working_set.end - working_set.start) as usize * SLOTS];
        for (number, slots) in working_set.zip(self.model.as_chunks_mut::<SLOTS>().0) {
            self.workload.fill.write(self.workload.seed, self.layout.page(number), slots);
        }
        let writers = 0..self.layout.writers();
        self.steppers = writers.map(|vcpu| self.layout.stepper(&self.workload, vcpu)).collect();
    }

    fn compare_piece(&self, ram: &GuestRam, pages: Range<u64>, is_data: bool, wrong: &mut Wrong) {
        let (mut expected, mut found) = ([0; SLOTS], [0; SLOTS]);
        for slice in ram.slices(pages) {
            let numbers = slice.first_page..slice.first_page + slice.len as u64 / PAGE_SIZE;
            for (index, page) in numbers.enumerate() {
                if !self.expect(page, &mut expected) {
                    continue;
                }
                if is_data {
                    let at = slice.ptr.wrapping_add(index * PAGE_SIZE as usize).cast::<u64>();
                    // SAFETY: the page lies within the slice, which lives as long as the RAM is
                    // borrowed; the guest that could write it stands still.
                    unsafe { at.copy_to_nonoverlapping(found.as_mut_ptr(), SLOTS) };
                }
                if expected != found && !self.is_next_step(page, &mut expected, &found) {
                    wrong.note(self, page, &expected, &found);
                }
            }
        }
    }

    /// Computes what a page must hold; returns false for a page that the model does not know.
    fn expect(&self, page: u64, into: &mut Page) -> bool {
        let working_set = self.layout.working_set();
        if page < SYSTEM_PAGES {
            *into = self.image.get(&page).copied().unwrap_or([0; SLOTS]);
            return (0..self.layout.vcpus()).all(|vcpu| !self.layout.block(vcpu).contains(&page));
        }
        match self.layout.number(page) {
            Some(number) if working_set.contains(&number) => {
                let at = (number - working_set.start) as usize * SLOTS;
                into.copy_from_slice(&self.model[at..at + SLOTS]);
            }
            Some(_) => self.workload.fill.write(self.workload.seed, page, into),
            None => into.fill(0),
        }
        true
    }

    /// Returns whether the page is as it must be if its vCPU has written the next step too. A virtual machine may have
    /// done so without having counted the step.
    fn is_next_step(&self, page: u64, expected: &mut Page, found: &Page) -> bool {
        let Some(vcpu) = self.writer(page).filter(|_| self.stops_anywhere) else { return false };
        let step = self.steppers[usize::from(vcpu)].clone().next();
        if self.layout.page(self.layout.part(vcpu).start + step.page) != page {
            return false;
        }
        let counted = std::mem::replace(&mut expected[step.slot], step.value);
        if expected == found {
            return true;
        }
        expected[step.slot] = counted;
        false
    }

    fn writer(&self, page: u64) -> Option<u16> {
        let number = self.layout.number(page)?;
        (0..self.layout.writers()).find(|vcpu| self.layout.part(*vcpu).contains(&number))
    }

    fn name(&self, page: u64) -> String {
        match self.writer(page) {
            Some(vcpu) => format!("the working set of vCPU {vcpu}"),
            None if page < SYSTEM_PAGES => "code and page tables".into(),
            None => "pages that are never written".into(),
        }
    }
}

/// Brings a part of the working set, and the stepper that wrote it, to `steps`.
fn replay(stepper: &mut Stepper, steps: u64, part: &mut [u64]) {
    let place = |step: &Step| step.page as usize * SLOTS + step.slot;
    let begin = stepper.done();
    if steps - begin <= MANY * part.len() as u64 {
        while stepper.done() < steps {
            let step = stepper.next();
            part[place(&step)] = step.value;
        }
        return;
    }
    // Only the last write to each slot counts: go backwards until every slot has had one.
    let end = stepper.jump_to(steps);
    let mut back = end.clone();
    // Bits rather than bytes: most steps only look here, and it stays in the cache.
    let mut written = vec![0_u64; part.len().div_ceil(64)];
    let mut left = part.len();
    while left > 0 && back.done() > begin {
        let step = back.back();
        let place = place(&step);
        let bit = 1 << (place % 64);
        if written[place / 64] & bit == 0 {
            written[place / 64] |= bit;
            part[place] = step.value;
            left -= 1;
        }
    }
    *stepper = end;
}

#[derive(Default)]
struct Wrong {
    pages: u64,
    listed: Vec<Difference>,
}

impl Wrong {
    fn note(&mut self, oracle: &Oracle, page: u64, expected: &Page, found: &Page) {
        self.pages += 1;
        let slot = expected.iter().zip(found).position(|(expected, found)| expected != found);
        let (Some(slot), true) = (slot, self.listed.len() < LISTED) else { return };
        self.listed.push(Difference {
            page,
            address: oracle.layout.address_of(page),
            part: oracle.name(page),
            offset: slot as u64 * 8,
            expected: expected[slot],
            found: found[slot],
        });
    }

    fn merge(&mut self, other: Self) {
        self.pages += other.pages;
        self.listed.extend(other.listed);
    }
}

/// Returns pieces, each with whether it is data or a hole: all data, wherever it is, and the holes in what the guest
/// may have touched.
fn pieces(touched: &[Range<u64>], data: &[Range<u64>]) -> Vec<(Range<u64>, bool)> {
    let mut pieces = Vec::new();
    let mut add = |range: Range<u64>, is_data| {
        let starts = range.clone().step_by(PIECE_PAGES as usize);
        pieces.extend(starts.map(|start| (start..(start + PIECE_PAGES).min(range.end), is_data)));
    };
    for range in touched {
        let mut at = range.start;
        let from = data.partition_point(|extent| extent.end <= range.start);
        for extent in data[from..].iter().take_while(|extent| extent.start < range.end) {
            add(at..extent.start, false);
            at = extent.end;
        }
        add(at..range.end, false);
    }
    data.iter().for_each(|extent| add(extent.clone(), true));
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::{Fill, Pattern, TICK, WriteRate};

    #[test]
    fn replaying_backwards_gives_the_same() {
        let fill = Fill { zero: 100, random: 0, compressible: 0, mixed: 0 };
        for pattern in [Pattern::Uniform, Pattern::Sequential, Pattern::HotCold] {
            let workload = Workload {
                seed: 3,
                pattern,
                rate: WriteRate::FlatOut,
                tick: TICK,
                working_set_pages: 11,
                readers: 0,
                fill,
            };
            let (mut all, mut halves) = (vec![0; 11 * SLOTS], vec![0; 11 * SLOTS]);
            let (mut one, mut two) = (workload.stepper(0, 1), workload.stepper(0, 1));
            let steps = 100 * 11 * SLOTS as u64;
            replay(&mut one, steps, &mut all);
            for part in 1..=20 {
                replay(&mut two, steps / 20 * part, &mut halves);
            }
            assert_eq!(one, two);
            assert!(all == halves, "{pattern:?}");
        }
    }

    #[test]
    fn pieces_cover_data_and_what_was_touched_once() {
        let touched = [0..30, 50_000..100_000];
        let data = [0..10, 20..60_000, 70_000..70_001, 200_000..200_001];
        let pieces = pieces(&touched, &data);
        let within = |ranges: &[Range<u64>], page| ranges.iter().any(|range| range.contains(&page));
        let mut pages: Vec<(u64, bool)> =
            pieces.into_iter().flat_map(|(range, is_data)| range.map(move |page| (page, is_data))).collect();
        pages.sort_unstable();
        let expected = (0..200_001).filter(|page| within(&touched, *page) || within(&data, *page));
        assert!(pages.into_iter().eq(expected.map(|page| (page, within(&data, page)))));
    }
}
