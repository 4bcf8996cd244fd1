//! Post-copy at the destination: which pages are missing, and placing them whole.
//!
//! The guest may be running. So pages are received beside its memory and placed with `UFFDIO_COPY`,
//! which shows a page only when all of it is there and wakes whoever waits for it. What comes again is
//! dropped: the guest may have written to the page since. A page that is there though it is missing was
//! brought into being by somebody else, with zeros or worse, and the guest may have read that: then the
//! guest's memory is not right any more, and the migration fails.

mod assemble;
mod pages;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use memlane_kvm::userfault::{Faults, IfPresent, PlaceError, Placed, Userfault, is_already_present, is_gone};
use memlane_kvm::vmm_mapping::VmmMapping;
use memlane_protocol::wire::control::FetchReport;
use memlane_protocol::wire::frame::Run;
use memlane_protocol::{PAGE_SIZE, PageSet};

use self::assemble::{Piece, assemble};
use self::pages::{Access, Pages};
use super::observer::FaultObserver;
use crate::Bell;
use crate::postcopy::latency::Latencies;

/// What the lanes of one migration share at the destination while pages are missing there.
pub struct PostcopyIncoming {
    userfault: Userfault,
    memory: Arc<VmmMapping>,
    pages: Pages,
    /// Pages that have not been placed, once they are all known.
    remaining: AtomicU64,
    /// All missing pages are known.
    known: AtomicBool,
    /// Why the guest's memory is not what it should be.
    broken: OnceLock<String>,
    /// Rung when nothing is missing any more, and when memory is [broken](Self::broken).
    bell: Bell,
    latencies: Latencies,
    observer: Arc<dyn FaultObserver>,
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

impl PostcopyIncoming {
    /// For the memory of the VMM whose `userfault` this is: all of it is registered.
    pub fn new(
        userfault: Userfault,
        memory: Arc<VmmMapping>,
        bell: Bell,
        observer: Arc<dyn FaultObserver>,
    ) -> io::Result<Self> {
        let pages = memory.ram().pages();
        let placing = Self {
            userfault,
            pages: Pages::new(pages),
            remaining: AtomicU64::new(0),
            known: AtomicBool::new(false),
            broken: OnceLock::new(),
            bell,
            observer,
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
        self.pages.add(pages.clone());
        self.memory.ram().punch(pages)
    }

    /// From here on no page is missing but those that were added, and pages may be placed.
    pub fn all_known(&self) {
        self.remaining.store(self.pages.missing().count(), Ordering::Release);
        self.known.store(true, Ordering::Release);
        if self.remaining() == 0 {
            (self.bell)();
        }
    }

    /// Sees that nothing is there of what is missing: an access would find it, and wait for nothing. It
    /// costs a system call for each run of missing pages, and may be done while pages are being placed. Of huge
    /// pages nobody can tell whether they are there; they are found when they are placed.
    ///
    /// # Errors
    ///
    /// The first page that is there, in words; or that the kernel cannot be asked.
    pub fn see_holes(&self) -> io::Result<()> {
        let ram = self.memory.ram();
        for run in self.pages.missing().runs() {
            let small = self.memory.pieces(run).filter(|(_, pages)| self.memory.unit_of(pages.start) == 1);
            for (_, mut rest) in small {
                while let Some(page) = ram.next_data(rest.clone())? {
                    // It is there; if it is missing now, it was so too when it came into being.
                    if self.pages.is_missing(page) {
                        return Err(self.break_by(there(page)));
                    }
                    rest.start = page + 1;
                }
            }
        }
        Ok(())
    }

    /// Whether all missing pages are known.
    pub fn is_known(&self) -> bool {
        self.known.load(Ordering::Acquire)
    }

    /// Why the guest's memory is not right, and never will be, if that is so.
    pub fn broken(&self) -> Option<&str> {
        self.broken.get().map(String::as_str)
    }

    /// The pages that have not been placed.
    pub fn missing(&self) -> PageSet {
        self.pages.unplaced()
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

    /// Places what a frame brought, as far as it is missing: `payload` holds the bytes of all runs with data,
    /// in order.
    pub fn place(&self, runs: &[Run], payload: &[u8], by: By) -> io::Result<()> {
        if runs.is_empty() {
            return Ok(()); // the source is there, that is all
        }
        if !self.is_known() {
            return Err(invalid("pages came before it was known which are missing"));
        }
        if let Some(reason) = self.broken() {
            return Err(io::Error::other(reason));
        }
        let mut rest = payload;
        for piece in assemble(&self.memory, runs)? {
            match piece {
                Piece::Data(pages) => {
                    let (bytes, left) = rest.split_at(bytes_of(&pages));
                    rest = left;
                    self.fill(&pages, by, |run| {
                        let before = bytes_of(&(pages.start..run.start));
                        self.copy(run, &bytes[before..][..bytes_of(run)], IfPresent::Fail)
                    })?;
                }
                Piece::Zero(pages) => self.fill(&pages, by, |run| self.zero(run, IfPresent::Fail))?,
                Piece::Mixed(pages, parts) => {
                    let mut whole = vec![0; bytes_of(&pages)];
                    for part in parts {
                        let (bytes, left) = rest.split_at(bytes_of(&part));
                        rest = left;
                        let at = ((part.start - pages.start) * PAGE_SIZE) as usize;
                        whole[at..at + bytes.len()].copy_from_slice(bytes);
                    }
                    self.fill(&pages, by, |run| self.copy(run, &whole, IfPresent::Fail))?;
                }
                Piece::Hole(pages) => self.leave_hole(&pages)?,
            }
        }
        Ok(())
    }

    /// An access to `address` waits: makes its page zero if it is not missing; otherwise returns the
    /// page to ask for, unless that was done before, or it is being placed.
    pub fn fault(&self, address: u64) -> io::Result<Option<u64>> {
        let Some(page) = self.memory.page_at(address) else { return Ok(None) };
        let unit = self.memory.whole(page..page + 1);
        match self.pages.access(&unit) {
            // Several may wait for one hole, and be told of one after another.
            Access::There => match self.zero(&unit, IfPresent::Skip) {
                Ok(_) => Ok(None),
                Err(unplaced) => Err(self.judge(unplaced.source)),
            },
            Access::Known => Ok(None),
            access => {
                self.faults.fetch_add(1, Ordering::Relaxed);
                Ok((access == Access::Ask).then_some(unit.start))
            }
        }
    }

    /// Pages that are waited for, each once.
    pub fn wanted(&self) -> Vec<u64> {
        self.pages.wanted()
    }

    /// Accesses to missing pages fail from now on, loudly: they will never come.
    pub fn poison(&self) -> io::Result<u64> {
        let mut poisoned = 0;
        for run in self.missing().runs() {
            if self.broken().is_some() {
                // What is there and should not be is to fail as well.
                self.memory.ram().punch(run.clone())?;
            }
            for (addresses, pages) in self.memory.pieces(run.clone()) {
                let done = self.userfault.poison(addresses, self.unit_bytes(&pages));
                done.map_err(|unplaced| unplaced.source)?;
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

    /// Who is told how long accesses waited.
    pub(crate) fn observer(&self) -> &dyn FaultObserver {
        &*self.observer
    }

    /// Where faults are read from.
    pub fn userfault(&self) -> &Userfault {
        &self.userfault
    }

    /// Has `place` place those of `pages` that are missing, run by run.
    fn fill(
        &self,
        pages: &Range<u64>,
        by: By,
        place: impl Fn(&Range<u64>) -> Result<Placed, PlaceError>,
    ) -> io::Result<()> {
        let mut rest = pages.clone();
        while let Some(run) = self.pages.claim(rest.clone()) {
            rest.start = run.end;
            let counter = if by == By::Fault { &self.fetched } else { &self.streamed };
            self.finish(&run, place(&run), Some(counter))?;
        }
        Ok(())
    }

    /// A run that was claimed is in place, as far as `outcome` tells, and missing again where it is not. Its
    /// pages are counted if they have come.
    fn finish(
        &self,
        run: &Range<u64>,
        outcome: Result<Placed, PlaceError>,
        counter: Option<&AtomicU64>,
    ) -> io::Result<()> {
        let (placed, error) = match outcome {
            Ok(placed) => (placed, None),
            Err(PlaceError { placed, source }) => (placed, Some(source)),
        };
        let end = run.start + placed.bytes / PAGE_SIZE;
        if end > run.start {
            for waited in self.pages.placed(run.start..end) {
                self.latencies.add(waited);
                self.observer.waited(waited);
            }
            if let Some(counter) = counter {
                counter.fetch_add(end - run.start, Ordering::Relaxed);
            }
            self.fewer(end - run.start);
        }
        match error {
            None => Ok(()),
            Some(error) => Err(self.failed(end..run.end, error)),
        }
    }

    /// These pages could not be placed.
    fn failed(&self, pages: Range<u64>, error: io::Error) -> io::Error {
        if is_already_present(&error) {
            self.pages.give_back(pages.clone());
            return self.break_by(there(pages.start));
        }
        self.release(pages);
        self.judge(error)
    }

    /// What was claimed is missing again, and whoever waits for it is told of anew.
    fn release(&self, pages: Range<u64>) {
        self.pages.give_back(pages.clone());
        for (addresses, _) in self.memory.pieces(pages) {
            // Of a process that has ended nobody waits.
            let _ = self.userfault.wake(addresses);
        }
    }

    /// The kernel did not place a page: perhaps since there is no memory any more to place it in.
    fn judge(&self, error: io::Error) -> io::Error {
        match self.memory.ram().check() {
            Err(lost) => self.break_by(lost.to_string()),
            Ok(()) => error,
        }
    }

    /// The guest's memory is not right, and will not be.
    fn break_by(&self, reason: String) -> io::Error {
        let reason = self.broken.get_or_init(|| reason);
        (self.bell)();
        io::Error::other(reason.as_str())
    }

    fn copy(&self, pages: &Range<u64>, bytes: &[u8], if_there: IfPresent) -> Result<Placed, PlaceError> {
        let (addresses, _) = self.memory.pieces(pages.clone()).next().expect("a piece has pages");
        self.userfault.copy(addresses.start, bytes, self.unit_bytes(pages), if_there)
    }

    fn zero(&self, pages: &Range<u64>, if_there: IfPresent) -> Result<Placed, PlaceError> {
        let unit = self.unit_bytes(pages);
        let (addresses, _) = self.memory.pieces(pages.clone()).next().expect("a piece has pages");
        if unit == PAGE_SIZE {
            return self.userfault.zero(addresses, if_there);
        }
        // The kernel has no huge page of zeros.
        let (zeros, mut all) = (vec![0; unit as usize], Placed::default());
        for address in addresses.step_by(unit as usize) {
            match self.userfault.copy(address, &zeros, unit, if_there) {
                Ok(placed) => all += placed,
                Err(PlaceError { placed, source }) => {
                    all += placed;
                    return Err(PlaceError { placed: all, source });
                }
            }
        }
        Ok(all)
    }

    /// Bytes of the pages' own size; they lie in one region.
    fn unit_bytes(&self, pages: &Range<u64>) -> u64 {
        self.memory.unit_of(pages.start) * PAGE_SIZE
    }

    /// These pages are holes at the source, and take no memory here unless an access waits for them.
    fn leave_hole(&self, pages: &Range<u64>) -> io::Result<()> {
        let (left, waited_for) = self.pages.leave(pages.clone());
        self.fewer(left);
        let mut waited_for = waited_for.into_iter();
        while let Some(run) = waited_for.next() {
            if let Err(error) = self.finish(&run, self.zero(&run, IfPresent::Fail), None) {
                waited_for.for_each(|run| self.release(run));
                return Err(error);
            }
        }
        Ok(())
    }

    /// So many pages more are not missing any more.
    fn fewer(&self, pages: u64) {
        if pages > 0 && self.remaining.fetch_sub(pages, Ordering::AcqRel) == pages {
            (self.bell)();
        }
    }
}

/// What is wrong where a page is there and should not be.
fn there(page: u64) -> String {
    format!(
        "page {page} of the guest's memory holds something here though it has not come from the source: something \
         else on this host writes to that memory, or maps it"
    )
}

fn bytes_of(pages: &Range<u64>) -> usize {
    ((pages.end - pages.start) * PAGE_SIZE) as usize
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests;
