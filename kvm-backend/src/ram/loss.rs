//! Memory that is taken away: a fault there becomes an error of that one guest, and not the end of the process.
//!
//! A file on tmpfs or hugetlbfs cannot be sealed against shrinking. Whoever else has it may truncate it, and touching
//! what is no longer there raises `SIGBUS`; so does a page that the kernel cannot provide, or that the machine cannot
//! read any more. A process that holds many guests' memory installs a handler for that ([`contain_faults`]). It marks
//! the guest as lost, puts empty memory of this process in the place of the region, and lets the access go on. What is
//! read from then on is not the guest's: whoever has read or written guest memory asks [`GuestRam::intact`] before he
//! makes anything of it.

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use libc::{c_int, c_void, siginfo_t};
use rustix::mm::{MapFlags, ProtFlags};

use super::{GuestRam, Mapped};
use crate::error::RamLost;

/// Nothing is lost.
const WHOLE: u8 = 0;
/// The kernel has no page where there should be one.
const NO_PAGE: u8 = 1;
/// The machine cannot read a page any more.
const BROKEN: u8 = 2;

/// Mappings that are looked through together.
const BLOCK: usize = 64;

/// Where guests' memory lies in this process. Read by a signal handler, and so without locks: blocks are added at the
/// end of a list and never taken away.
static FIRST: Block = Block::new();
/// Held while that changes.
static CHANGING: Mutex<()> = Mutex::new(());

#[derive(Debug)]
struct Block {
    places: [Place; BLOCK],
    next: AtomicPtr<Block>,
}

/// One mapping, or none (0 bytes).
#[derive(Debug)]
struct Place {
    /// Odd while the others change: the handler then passes it over. It cannot be the one that it looks for, since
    /// that belongs to memory that is being used.
    version: AtomicUsize,
    start: AtomicUsize,
    bytes: AtomicUsize,
    /// What is to be told of a loss. It lives as long as the mapping is here.
    loss: AtomicPtr<AtomicU8>,
}

/// The regions of one guest's memory, where a fault in them is to be that guest's. Ends when it is dropped, which
/// must be before they are unmapped.
#[derive(Debug)]
pub(super) struct Guarded {
    places: Vec<&'static Place>,
    loss: Arc<AtomicU8>,
}

impl Guarded {
    /// Guards these mappings.
    pub(super) fn new(mapped: &[Mapped]) -> Self {
        let loss = Arc::new(AtomicU8::new(WHOLE));
        let changing = lock();
        let places = mapped.iter().map(|mapped| {
            let place = free_place(&changing);
            place.set(mapped.mapping.as_ptr() as usize, mapped.mapping.size(), &loss);
            place
        });
        let places = places.collect();
        drop(changing);
        Self { places, loss }
    }
}

impl Guarded {
    /// Ends it while the mappings are still there.
    pub(super) fn end(&mut self) {
        let _changing = lock();
        for place in self.places.drain(..) {
            place.set(0, 0, &self.loss);
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.end();
    }
}

impl GuestRam {
    /// Whether the memory is still the guest's, as far as faults have shown: to be asked after it was read or
    /// written, before anything is made of that. It costs next to nothing.
    ///
    /// # Errors
    ///
    /// [`RamLost`], once a fault was [contained](contain_faults) or [noted](Self::note_fault); for good.
    pub fn intact(&self) -> io::Result<()> {
        // What was read before this must not be read after the mark is looked at: the mark is set before anything
        // else comes into the memory's place.
        fence(Ordering::Acquire);
        match self.guarded.loss.load(Ordering::Relaxed) {
            WHOLE => Ok(()),
            loss => Err(self.lost(loss)),
        }
    }

    /// As [`intact`](Self::intact), and asks whether all files are as long as they were: one may be cut where nobody
    /// has looked since, and what lies beyond its end looks like a hole.
    pub fn check(&self) -> io::Result<()> {
        self.intact()?;
        (0..self.regions.len()).try_for_each(|index| self.check_length(index))
    }

    /// A system call failed with `EFAULT` on this memory: to the kernel a fault is an error and no signal.
    pub fn note_fault(&self) {
        note(&self.guarded.loss, NO_PAGE);
    }

    /// Whether the file behind region `index` is as long as it was.
    pub(super) fn check_length(&self, index: usize) -> io::Result<()> {
        if self.is_cut(index)? {
            self.note_fault();
            return Err(io::Error::other(RamLost::Truncated));
        }
        Ok(())
    }

    fn is_cut(&self, index: usize) -> io::Result<bool> {
        let region = &self.regions[index];
        let found = rustix::fs::fstat(&*self.mapped[index].file)?.st_size;
        Ok(u64::try_from(found).is_ok_and(|found| found < region.offset + region.bytes))
    }

    fn lost(&self, loss: u8) -> io::Error {
        let is_cut = (0..self.regions.len()).any(|index| self.is_cut(index).unwrap_or(true));
        io::Error::other(match loss {
            _ if is_cut => RamLost::Truncated,
            BROKEN => RamLost::Hardware,
            _ => RamLost::NoPage,
        })
    }
}

/// Has faults in guests' memory be errors of these guests from now on: see [`GuestRam::intact`]. To be called once,
/// by a process that holds the memory of guests that run elsewhere; a VMM is better off with the signal.
///
/// # Errors
///
/// If the handler cannot be installed.
pub fn contain_faults() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: an action of zeros is a valid one: the default, with no flags and an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_fault as *const () as usize;
        // A thread may have a stack for signals; another SIGBUS meanwhile ends the process.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the action is complete, and its handler does only what a signal handler may; see there.
        match unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or_default()),
        }
    });
    (*installed).map_err(io::Error::from_raw_os_error)
}

/// Handles `SIGBUS`. It may have interrupted anything, even an allocation or a holder of a lock: all that is done
/// here is to load and store atomics, and two system calls which signal-safety(7) allows or which do not touch this
/// process's state beyond the mapping itself (`mmap` without libc's wrapper, so that `errno` stays).
extern "C" fn on_fault(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a siginfo of this signal, in which faults have an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // Positive where the kernel sent it; otherwise somebody did, and there is no address.
    if code > 0 && contain(address, code) {
        return;
    }
    // As if there were no handler: a fault happens again as soon as this returns, and ends the process.
    // SAFETY: both are allowed in signal handlers, and touch no memory of ours.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        if code <= 0 {
            libc::raise(signal);
        }
    }
}

/// Puts empty memory in the place of the region that `address` lies in, if it lies in one.
fn contain(address: usize, code: c_int) -> bool {
    let mut block = Some(&FIRST);
    while let Some(Block { places, next }) = block {
        for place in places {
            let Some((start, bytes, loss)) = place.read() else { continue };
            if address.wrapping_sub(start) >= bytes {
                continue;
            }
            // SAFETY: the access that failed is one to this region. So somebody uses its memory, whose owner lives,
            // and the mark with it.
            let loss = unsafe { &*loss };
            let broken = code == libc::BUS_MCEERR_AR || code == libc::BUS_MCEERR_AO;
            // Before anybody can read what is not the guest's.
            note(loss, if broken { BROKEN } else { NO_PAGE });
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
            // All of the region, or there would be a mapping more for each page that is touched. Another thread may
            // be here for the same region: the later one replaces zeros by zeros.
            // SAFETY: exactly a mapping of ours, which stays ours and as long and as accessible. What was read from
            // it before keeps its meaning; what is read later is known to mean nothing (`intact`).
            let mapped = unsafe {
                rustix::mm::mmap_anonymous(
                    ptr::with_exposed_provenance_mut::<c_void>(start),
                    bytes,
                    protection,
                    flags,
                )
            };
            return mapped.is_ok();
        }
        // SAFETY: null, or a block that is never freed.
        block = unsafe { next.load(Ordering::Acquire).as_ref() };
    }
    false
}

/// Keeps the first loss.
fn note(mark: &AtomicU8, loss: u8) {
    let _ = mark.compare_exchange(WHOLE, loss, Ordering::SeqCst, Ordering::SeqCst);
}

fn lock() -> MutexGuard<'static, ()> {
    CHANGING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A place that holds no mapping; the lock is held.
fn free_place(_changing: &MutexGuard<'_, ()>) -> &'static Place {
    let mut block: &'static Block = &FIRST;
    loop {
        if let Some(place) = block.places.iter().find(|place| place.bytes.load(Ordering::SeqCst) == 0) {
            return place;
        }
        // SAFETY: null, or a block that is never freed.
        block = match unsafe { block.next.load(Ordering::Acquire).as_ref() } {
            Some(next) => next,
            None => {
                let next = Box::leak(Box::new(Block::new()));
                block.next.store(next, Ordering::Release);
                next
            }
        };
    }
}

impl Block {
    const fn new() -> Self {
        Self { places: [const { Place::new() }; BLOCK], next: AtomicPtr::new(ptr::null_mut()) }
    }
}

impl Place {
    const fn new() -> Self {
        let (start, bytes) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { version: AtomicUsize::new(0), start, bytes, loss: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Changes it, under the lock.
    fn set(&self, start: usize, bytes: usize, loss: &Arc<AtomicU8>) {
        self.version.fetch_add(1, Ordering::SeqCst);
        self.start.store(start, Ordering::SeqCst);
        self.bytes.store(bytes, Ordering::SeqCst);
        self.loss.store(Arc::as_ptr(loss).cast_mut(), Ordering::SeqCst);
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// What it holds; `None` if that is nothing, or is changing.
    fn read(&self) -> Option<(usize, usize, *const AtomicU8)> {
        let version = self.version.load(Ordering::SeqCst);
        let (start, bytes) = (self.start.load(Ordering::SeqCst), self.bytes.load(Ordering::SeqCst));
        let loss = self.loss.load(Ordering::SeqCst).cast_const();
        let steady = version.is_multiple_of(2) && self.version.load(Ordering::SeqCst) == version;
        (steady && bytes > 0).then_some((start, bytes, loss))
    }
}

#[cfg(test)]
mod tests;
