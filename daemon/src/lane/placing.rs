//! Post-copy at the destination: which pages are missing, and placing them whole.
//!
//! The guest may be running. So pages are received beside its memory and placed with `UFFDIO_COPY`,
//! which shows a page only when all of it is there and wakes whoever waits for it. A page that is
//! there already stays as it is: the guest may have written to it since.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memlane_kvm::foreign_ram::ForeignRam;
use memlane_kvm::userfault::{Faults, Userfault, is_gone};
use memlane_protocol::wire::control::FetchReport;
use memlane_protocol::wire::frame::{Content, Run};
use memlane_protocol::{PAGE_SIZE, PageSet};
use tokio::sync::Notify;

use super::latency::Latencies;
use crate::metrics;

/// What the lanes of one migration share at the destination while pages are missing there.
pub struct Placing {
    userfault: Userfault,
    memory: Arc<ForeignRam>,
    /// Pages that are missing. One is taken out only after it was placed: whatever is not in this
    /// set is a hole, and reads as zeros.
    missing: PageSet,
    /// Pages that an access waits for and that were asked for.
    wanted: PageSet,
    /// Since when, in own pages of the region.
    waiting: Mutex<HashMap<u64, Instant>>,
    /// Pages of [`missing`](Self::missing), once they are all known.
    remaining: AtomicU64,
    /// All missing pages are known.
    known: AtomicBool,
    /// Rung when nothing is missing any more.
    pub bell: Notify,
    latencies: Latencies,
    faults: AtomicU64,
    fetched: AtomicU64,
    streamed: AtomicU64,
}

/// How a page comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// An access waited for it, and it was asked for.
    Fault,
    /// In the stream of all that is missing.
    Stream,
}

impl Placing {
    /// For the memory of the VMM whose `userfault` this is: all of it is registered.
    pub fn new(userfault: Userfault, memory: Arc<ForeignRam>) -> io::Result<Self> {
        let pages = memory.ram().pages();
        let placing = Self {
            userfault,
            missing: PageSet::new(pages),
            wanted: PageSet::new(pages),
            waiting: Mutex::default(),
            remaining: AtomicU64::new(0),
            known: AtomicBool::new(false),
            bell: Notify::new(),
            latencies: Latencies::default(),
            faults: AtomicU64::new(0),
            fetched: AtomicU64::new(0),
            streamed: AtomicU64::new(0),
            memory,
        };
        let mut pieces = placing.memory.pieces(0..pages);
        let registered =
            pieces.try_for_each(|(addresses, _)| placing.userfault.register(addresses, Faults::Missing));
        drop(pieces);
        match registered {
            Ok(()) => Ok(placing),
            Err(error) => {
                // Its VMM keeps a copy: what is registered would wait for ever.
                let _ = placing.end();
                Err(error)
            }
        }
    }

    /// Adds pages that are missing: grown to whole pages of their regions, they are dropped here, so
    /// that an access to them faults.
    pub fn add_missing(&self, pages: Range<u64>) -> io::Result<()> {
        let pages = self.memory.whole(pages);
        self.missing.insert_range(pages.clone());
        self.memory.ram().punch(pages)
    }

    /// From here on no page is missing but those that were added, and pages may be placed.
    pub fn all_known(&self) {
        self.remaining.store(self.missing.count(), Ordering::Release);
        self.known.store(true, Ordering::Release);
        if self.remaining() == 0 {
            self.bell.notify_one();
        }
    }

    /// Whether all missing pages are known.
    pub fn is_known(&self) -> bool {
        self.known.load(Ordering::Acquire)
    }

    /// The pages that are missing now.
    pub fn missing(&self) -> &PageSet {
        &self.missing
    }

    /// How many these are.
    pub fn remaining(&self) -> u64 {
        self.remaining.load(Ordering::Acquire)
    }

    /// Pages of the guest.
    pub fn pages(&self) -> u64 {
        self.memory.ram().pages()
    }

    /// How it goes; the time is the caller's to add.
    pub fn report(&self) -> FetchReport {
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        FetchReport {
            remaining_pages: self.remaining(),
            faults: self.faults.load(Ordering::Relaxed),
            fault_p50_nanoseconds: nanoseconds(self.latencies.quantile(0.5)),
            fault_p99_nanoseconds: nanoseconds(self.latencies.quantile(0.99)),
            fault_max_nanoseconds: nanoseconds(self.latencies.longest()),
            pages_fetched: self.fetched.load(Ordering::Relaxed),
            pages_streamed: self.streamed.load(Ordering::Relaxed),
            nanoseconds: 0,
        }
    }

    /// Places what a frame brought: `payload` holds the bytes of all runs with data, in order.
    pub fn place(&self, runs: &[Run], payload: &[u8], by: By) -> io::Result<()> {
        if runs.is_empty() {
            return Ok(()); // the source is there, that is all
        }
        if !self.is_known() {
            return Err(invalid("pages came before it was known which are missing"));
        }
        let mut rest = payload;
        for piece in assemble(&self.memory, runs)? {
            match piece {
                Piece::Data(pages) => {
                    let (bytes, left) = rest.split_at(bytes_of(&pages));
                    rest = left;
                    self.copy(&pages, bytes)?;
                    self.done(&pages, by);
                }
                Piece::Zero(pages) => {
                    self.zero(&pages)?;
                    self.done(&pages, by);
                }
                Piece::Mixed(pages, parts) => {
                    let mut whole = vec![0; bytes_of(&pages)];
                    for part in parts {
                        let (bytes, left) = rest.split_at(bytes_of(&part));
                        rest = left;
                        let at = ((part.start - pages.start) * PAGE_SIZE) as usize;
                        whole[at..at + bytes.len()].copy_from_slice(bytes);
                    }
                    self.copy(&pages, &whole)?;
                    self.done(&pages, by);
                }
                Piece::Hole(pages) => self.leave_hole(&pages)?,
            }
        }
        Ok(())
    }

    /// An access to `address` waits: makes its page zero if it is not missing; otherwise returns the
    /// page to ask for, unless that was done before.
    pub fn fault(&self, address: u64) -> io::Result<Option<u64>> {
        let Some(page) = self.memory.page_at(address) else { return Ok(None) };
        let unit = self.memory.whole(page..page + 1);
        if !self.missing.contains(unit.start) {
            self.zero(&unit)?;
            return Ok(None);
        }
        if self.wanted.insert_range(unit.clone()) == 0 {
            return Ok(None);
        }
        self.waiting().insert(unit.start, Instant::now());
        self.faults.fetch_add(1, Ordering::Relaxed);
        // It may have been placed since it was looked at, by somebody who saw nobody waiting.
        if !self.missing.contains(unit.start) {
            let zeroed = self.zero(&unit);
            self.answer(&unit);
            return zeroed.map(|()| None);
        }
        Ok(Some(unit.start))
    }

    /// Pages that are waited for, each once.
    pub fn wanted(&self) -> Vec<u64> {
        self.waiting().keys().copied().collect()
    }

    /// Accesses to missing pages fail from now on, loudly: they will never come.
    pub fn poison(&self) -> io::Result<u64> {
        let mut poisoned = 0;
        for run in self.missing.runs() {
            for (addresses, pages) in self.memory.pieces(run.clone()) {
                self.userfault.poison(addresses, self.unit_bytes(&pages))?;
                poisoned += pages.end - pages.start;
            }
        }
        Ok(poisoned)
    }

    /// Nothing is missing any more: memory behaves as any other from now on. Of a process that has
    /// ended there is nothing to let go of.
    pub fn end(&self) -> io::Result<()> {
        let mut pieces = self.memory.pieces(0..self.pages());
        pieces.try_for_each(|(addresses, _)| match self.userfault.unregister(addresses) {
            Err(error) if !is_gone(&error) => Err(error),
            _ => Ok(()),
        })
    }

    /// Where faults are read from.
    pub fn userfault(&self) -> &Userfault {
        &self.userfault
    }

    fn copy(&self, pages: &Range<u64>, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        for (addresses, _) in self.memory.pieces(pages.clone()) {
            let (bytes, left) = rest.split_at((addresses.end - addresses.start) as usize);
            rest = left;
            self.userfault.copy(addresses.start, bytes, self.unit_bytes(pages))?;
        }
        Ok(())
    }

    fn zero(&self, pages: &Range<u64>) -> io::Result<()> {
        let unit = self.unit_bytes(pages);
        if unit != PAGE_SIZE {
            // The kernel has no huge page of zeros.
            let zeros = vec![0; unit as usize];
            let units = pages.clone().step_by((unit / PAGE_SIZE) as usize);
            return units
                .map(|first| first..first + unit / PAGE_SIZE)
                .try_for_each(|page| self.copy(&page, &zeros));
        }
        for (addresses, _) in self.memory.pieces(pages.clone()) {
            self.userfault.zero(addresses)?;
        }
        Ok(())
    }

    /// Bytes of the pages' own size; they lie in one region.
    fn unit_bytes(&self, pages: &Range<u64>) -> u64 {
        self.memory.unit_of(pages.start) * PAGE_SIZE
    }

    /// These pages are holes at the source, and take no memory here unless an access waits for them.
    fn leave_hole(&self, pages: &Range<u64>) -> io::Result<()> {
        self.forget_missing(pages);
        let mut from = pages.start;
        while let Some(run) = self.wanted.next_run(from, pages.end.saturating_sub(from)) {
            let run = run.start..run.end.min(pages.end);
            if run.is_empty() {
                break;
            }
            self.zero(&run)?;
            from = run.end;
        }
        self.answer(pages);
        Ok(())
    }

    /// These pages are in place.
    fn done(&self, pages: &Range<u64>, by: By) {
        let counter = if by == By::Fault { &self.fetched } else { &self.streamed };
        counter.fetch_add(self.forget_missing(pages), Ordering::Relaxed);
        self.answer(pages);
    }

    /// These pages are not missing any more; returns how many of them were.
    fn forget_missing(&self, pages: &Range<u64>) -> u64 {
        let gone = self.missing.remove_range(pages.clone());
        if gone > 0 && self.remaining.fetch_sub(gone, Ordering::AcqRel) == gone {
            self.bell.notify_one();
        }
        gone
    }

    /// Nobody waits for these pages any more.
    fn answer(&self, pages: &Range<u64>) {
        if self.wanted.next_run(pages.start, pages.end - pages.start).is_none_or(|run| run.start >= pages.end)
        {
            return;
        }
        let mut waiting = self.waiting();
        waiting.retain(|page, since| {
            let answered = pages.contains(page);
            if answered {
                self.latencies.add(since.elapsed());
                metrics::fault(since.elapsed());
            }
            !answered
        });
        self.wanted.remove_range(pages.clone());
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Instant>> {
        // The map is whole whenever somebody may panic.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part of a frame that is placed in one go.
enum Piece {
    /// Whole pages, all of them with bytes.
    Data(Range<u64>),
    /// Whole pages of zeros.
    Zero(Range<u64>),
    /// One huge page that is zero but for the bytes of these parts.
    Mixed(Range<u64>, Vec<Range<u64>>),
    /// Whole pages that are holes at the source.
    Hole(Range<u64>),
}

/// A huge page of which not all runs have been seen.
struct Open {
    unit: Range<u64>,
    /// Seen up to here.
    end: u64,
    parts: Vec<Range<u64>>,
    holes: bool,
}

/// Cuts the runs of a frame into pieces, in the order of their bytes. Of a huge page a frame must
/// hold all or nothing.
fn assemble(memory: &ForeignRam, runs: &[Run]) -> io::Result<Vec<Piece>> {
    let torn = || invalid("a frame holds a part of a huge page");
    let mut pieces = Vec::with_capacity(runs.len());
    let mut open: Option<Open> = None;
    for run in runs {
        for (_, mut pages) in memory.pieces(run.pages.clone()) {
            if memory.unit_of(pages.start) == 1 {
                if open.is_some() {
                    return Err(torn());
                }
                pieces.push(match run.content {
                    Content::Data => Piece::Data(pages),
                    Content::Zero => Piece::Zero(pages),
                    Content::Hole => Piece::Hole(pages),
                });
                continue;
            }
            while !pages.is_empty() {
                let unit = memory.whole(pages.start..pages.start + 1);
                let part = pages.start..pages.end.min(unit.end);
                pages.start = part.end;
                let mut page = open.take().unwrap_or_else(|| Open {
                    end: unit.start,
                    unit: unit.clone(),
                    parts: Vec::new(),
                    holes: true,
                });
                if page.unit != unit || page.end != part.start {
                    return Err(torn());
                }
                page.end = part.end;
                page.holes &= run.content == Content::Hole;
                if run.content == Content::Data {
                    page.parts.push(part);
                }
                if page.end < unit.end {
                    open = Some(page);
                    continue;
                }
                pieces.push(match page.parts.as_slice() {
                    [] if page.holes => Piece::Hole(unit),
                    [] => Piece::Zero(unit),
                    [only] if *only == unit => Piece::Data(unit),
                    _ => Piece::Mixed(unit, page.parts),
                });
            }
        }
    }
    if open.is_some() { Err(torn()) } else { Ok(pieces) }
}

fn bytes_of(pages: &Range<u64>) -> usize {
    ((pages.end - pages.start) * PAGE_SIZE) as usize
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests;
