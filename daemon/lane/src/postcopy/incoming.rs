//! Post-copy at the destination: knows the missing pages, and places each of them whole.
//!
//! The guest may run meanwhile. So pages are received beside its memory and placed with `UFFDIO_COPY`, which shows a page
//! only when it is complete, and wakes the threads that wait for it. A page that comes a second time is dropped, because
//! the guest may have written to it since. If a page is present although it should be missing, another program has
//! written to it, and the guest may have read wrong contents: then the guest's memory is damaged, and the migration fails.

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

/// The state that the lanes of one migration share at the destination while pages are missing there.
pub struct PostcopyIncoming {
    userfault: Userfault,
    /// What is done where a huge page is present that should be missing.
    if_present: IfPresent,
    memory: Arc<VmmMapping>,
    pages: Pages,
    /// So many pages are not placed yet. This is set once all missing pages are known.
    remaining: AtomicU64,
    /// All missing pages are known.
    known: AtomicBool,
    /// The guest's memory is damaged, for this reason.
    broken: OnceLock<String>,
    /// This bell is rung when no page is missing any more, and when the memory is [broken](Self::broken).
    bell: Bell,
    latencies: Latencies,
    observer: Arc<dyn FaultObserver>,
    faults: AtomicU64,
    fetched: AtomicU64,
    streamed: AtomicU64,
}

/// The way in which a page comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// An access waited for the page, and it was requested.
    Fault,
    /// The page came in the stream of all missing pages.
    Stream,
}

impl PostcopyIncoming {
    /// Makes the state, and registers all memory of the guest with `userfault`, which belongs to the guest's VMM.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses to register the memory.
    pub fn new(
        userfault: Userfault,
        memory: Arc<VmmMapping>,
        bell: Bell,
        observer: Arc<dyn FaultObserver>,
    ) -> io::Result<Self> {
        let pages = memory.ram().pages();
        let incoming = Self {
            userfault,
            if_present: IfPresent::Fail,
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
        let mut pieces = incoming.memory.pieces(0..pages);
        let registered =
            pieces.try_for_each(|(addresses, _)| incoming.userfault.register(addresses, Faults::Missing));
        drop(pieces);
        match registered {
            Ok(()) => Ok(incoming),
            Err(error) => {
                // The VMM keeps a copy of the descriptor, so accesses to registered memory would wait for ever.
                let _ = incoming.end();
                Err(error)
            }
        }
    }

    /// Makes the state again after a crash of the daemon that had it, from `userfault`, of which the guest's VMM kept a
    /// copy. All pages that memory does not hold are missing, and known to be. Those among them that are holes at the
    /// source as well are told to be when they come.
    ///
    /// This is right as pages are placed whole, and as nobody else can have allocated one: each access waits.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not tell what memory holds, or refuses to register it.
    pub fn again(
        userfault: Userfault,
        memory: Arc<VmmMapping>,
        bell: Bell,
        observer: Arc<dyn FaultObserver>,
    ) -> io::Result<Self> {
        let mut incoming = Self::new(userfault, memory, bell, observer)?;
        // The kernel does not tell which huge pages are held. One of zeros that is held was placed before.
        incoming.if_present = IfPresent::Skip;
        let all = 0..incoming.pages();
        for hole in incoming.memory.ram().holes(all.clone())? {
            incoming.pages.add(hole);
        }
        incoming.all_known();
        // The kernel has reported accesses to a daemon that is no more. It reports them again.
        for (addresses, _) in incoming.memory.pieces(all) {
            incoming.userfault.wake(addresses)?;
        }
        Ok(incoming)
    }

    /// Adds missing pages, extended to whole pages of their regions, and drops their memory here, so that an access to
    /// them faults.
    ///
    /// # Errors
    ///
    /// Fails if the kernel cannot drop the memory.
    pub fn add_missing(&self, pages: Range<u64>) -> io::Result<()> {
        let pages = self.memory.whole(pages);
        self.pages.add(pages.clone());
        self.memory.ram().punch(pages)
    }

    /// Declares that all missing pages were added. From now on pages may be placed.
    pub fn all_known(&self) {
        self.remaining.store(self.pages.missing().count(), Ordering::Release);
        self.known.store(true, Ordering::Release);
        if self.remaining() == 0 {
            (self.bell)();
        }
    }

    /// Verifies that no missing page is present in memory: an access to it would not wait. This costs a system call for
    /// each run of missing pages, and may be called while pages are being placed. The kernel cannot tell for huge pages;
    /// a huge page that is present is found when it is placed.
    ///
    /// # Errors
    ///
    /// Fails if a missing page is present, and names the first one, or if the kernel cannot be asked.
    pub fn verify_holes(&self) -> io::Result<()> {
        let ram = self.memory.ram();
        for run in self.pages.missing().runs() {
            let small = self.memory.pieces(run).filter(|(_, pages)| self.memory.unit_of(pages.start) == 1);
            for (_, mut rest) in small {
                while let Some(page) = ram.next_data(rest.clone())? {
                    // The page is present. If it is missing now, it was already missing when it was allocated.
                    if self.pages.is_missing(page) {
                        return Err(self.mark_broken(unexpected_page(page)));
                    }
                    rest.start = page + 1;
                }
            }
        }
        Ok(())
    }

    /// Returns whether all missing pages are known.
    pub fn is_known(&self) -> bool {
        self.known.load(Ordering::Acquire)
    }

    /// Returns why the guest's memory is damaged for good, if it is.
    pub fn broken(&self) -> Option<&str> {
        self.broken.get().map(String::as_str)
    }

    /// Returns the pages that are not placed yet.
    pub fn missing(&self) -> PageSet {
        self.pages.unplaced()
    }

    /// Returns the number of pages that are not placed yet.
    pub fn remaining(&self) -> u64 {
        self.remaining.load(Ordering::Acquire)
    }

    /// Returns the number of pages of the guest.
    pub fn pages(&self) -> u64 {
        self.memory.ram().pages()
    }

    /// Reports the progress. The caller adds the time.
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

    /// Places the pages of a frame that are missing. `payload` holds the bytes of all runs with data, in order.
    ///
    /// # Errors
    ///
    /// Fails if the frame holds a part of a huge page, if missing pages are not all known yet, if the memory is
    /// [broken](Self::broken), or if the kernel cannot place a page.
    pub(crate) fn place(&self, runs: &[Run], payload: &[u8], by: By) -> io::Result<()> {
        if runs.is_empty() {
            return Ok(()); // The frame is a keepalive of the source.
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
                        self.copy(run, &bytes[before..][..bytes_of(run)], self.if_present(run))
                    })?;
                }
                Piece::Zero(pages) => self.fill(&pages, by, |run| self.zero(run, self.if_present(run)))?,
                Piece::Mixed(pages, parts) => {
                    let mut whole = vec![0; bytes_of(&pages)];
                    for part in parts {
                        let (bytes, left) = rest.split_at(bytes_of(&part));
                        rest = left;
                        let at = ((part.start - pages.start) * PAGE_SIZE) as usize;
                        whole[at..at + bytes.len()].copy_from_slice(bytes);
                    }
                    self.fill(&pages, by, |run| self.copy(run, &whole, self.if_present(run)))?;
                }
                Piece::Hole(pages) => self.leave_hole(&pages)?,
            }
        }
        Ok(())
    }

    /// Handles an access to `address` that waits. If the page is not missing, makes it zero. Otherwise returns the page to
    /// request, unless it was requested before or is being placed.
    ///
    /// # Errors
    ///
    /// Fails if the kernel cannot place a page of zeros.
    pub fn fault(&self, address: u64) -> io::Result<Option<u64>> {
        let Some(page) = self.memory.page_at(address) else { return Ok(None) };
        let unit = self.memory.whole(page..page + 1);
        match self.pages.access(&unit) {
            // Several threads may wait for one hole, and the kernel reports them one after another.
            Access::Present => match self.zero(&unit, IfPresent::Skip) {
                Ok(_) => Ok(None),
                Err(unplaced) => Err(self.judge(unplaced.source)),
            },
            Access::Known => Ok(None),
            access => {
                self.faults.fetch_add(1, Ordering::Relaxed);
                Ok((access == Access::Request).then_some(unit.start))
            }
        }
    }

    /// Returns the pages that accesses wait for, each once.
    pub fn awaited(&self) -> Vec<u64> {
        self.pages.awaited()
    }

    /// Makes accesses to missing pages fail from now on with a memory error (SIGBUS), because the pages will never come.
    /// Returns the number of these pages.
    ///
    /// # Errors
    ///
    /// Fails if the kernel cannot mark the pages.
    pub fn poison(&self) -> io::Result<u64> {
        let mut poisoned = 0;
        for run in self.missing().runs() {
            if self.broken().is_some() {
                // Pages that are present and should be missing must fail as well.
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

    /// Ends post-copy: the memory behaves as any other from now on. If the VMM's process has ended, this does nothing.
    ///
    /// # Errors
    ///
    /// Fails if the kernel cannot unregister the memory.
    pub fn end(&self) -> io::Result<()> {
        let mut pieces = self.memory.pieces(0..self.pages());
        pieces.try_for_each(|(addresses, _)| match self.userfault.unregister(addresses) {
            Err(error) if !is_gone(&error) => Err(error),
            _ => Ok(()),
        })
    }

    /// Returns the observer of accesses.
    pub(crate) fn observer(&self) -> &dyn FaultObserver {
        &*self.observer
    }

    /// Returns the userfaultfd from which accesses are read.
    pub fn userfault(&self) -> &Userfault {
        &self.userfault
    }

    /// Places those of `pages` that are missing with `place`, run by run.
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

    /// Notes the outcome of placing a claimed run. Pages that were placed are counted by `counter`, and the others are
    /// missing again.
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
        let end = run.start + (placed.bytes + placed.already) / PAGE_SIZE;
        if end > run.start {
            for waited in self.pages.placed(run.start..end) {
                self.latencies.add(waited);
                self.observer.waited(waited);
            }
            if let Some(counter) = counter {
                counter.fetch_add(end - run.start, Ordering::Relaxed);
            }
            self.subtract_remaining(end - run.start);
        }
        match error {
            None => Ok(()),
            Some(error) => Err(self.failed(end..run.end, error)),
        }
    }

    /// Makes pages missing again that could not be placed, and returns the reason.
    fn failed(&self, pages: Range<u64>, error: io::Error) -> io::Error {
        if is_already_present(&error) {
            self.pages.give_back(pages.clone());
            return self.mark_broken(unexpected_page(pages.start));
        }
        self.release(pages);
        self.judge(error)
    }

    /// Makes claimed pages missing again, and wakes the threads that wait for them, so that the kernel reports their
    /// accesses again.
    fn release(&self, pages: Range<u64>) {
        self.pages.give_back(pages.clone());
        for (addresses, _) in self.memory.pieces(pages) {
            // This fails if the process has ended, and then no thread waits.
            let _ = self.userfault.wake(addresses);
        }
    }

    /// Finds out why the kernel did not place a page: perhaps the memory is gone.
    fn judge(&self, error: io::Error) -> io::Error {
        match self.memory.ram().check() {
            Err(lost) => self.mark_broken(lost.to_string()),
            Ok(()) => error,
        }
    }

    /// Marks the guest's memory as damaged for good.
    fn mark_broken(&self, reason: String) -> io::Error {
        let reason = self.broken.get_or_init(|| reason);
        (self.bell)();
        io::Error::other(reason.as_str())
    }

    /// Returns what is done where one of `pages`, which lie in one region, is present although it should be missing.
    fn if_present(&self, pages: &Range<u64>) -> IfPresent {
        if self.unit_bytes(pages) == PAGE_SIZE { IfPresent::Fail } else { self.if_present }
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
        // The kernel cannot place a huge page of zeros by itself.
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

    /// Returns the size in bytes of a page of the region in which `pages` lie.
    fn unit_bytes(&self, pages: &Range<u64>) -> u64 {
        self.memory.unit_of(pages.start) * PAGE_SIZE
    }

    /// Leaves pages as holes that are holes at the source. Those that accesses wait for become zeros.
    fn leave_hole(&self, pages: &Range<u64>) -> io::Result<()> {
        let (left, waited_for) = self.pages.leave(pages.clone());
        self.subtract_remaining(left);
        let mut waited_for = waited_for.into_iter();
        while let Some(run) = waited_for.next() {
            if let Err(error) = self.finish(&run, self.zero(&run, self.if_present(&run)), None) {
                waited_for.for_each(|run| self.release(run));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Subtracts pages from the number of remaining ones, and rings the bell when none remains.
    fn subtract_remaining(&self, pages: u64) {
        if pages > 0 && self.remaining.fetch_sub(pages, Ordering::AcqRel) == pages {
            (self.bell)();
        }
    }
}

/// Describes the damage if a page is present that should be missing.
fn unexpected_page(page: u64) -> String {
    format!(
        "page {page} of the guest's memory has contents here although it has not come from the source: another program \
         on this host writes to that memory, or maps it"
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
