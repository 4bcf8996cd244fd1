//! A handler for `SIGBUS`: a fault in a guest's memory becomes an error of that one guest, and not the end of the
//! process.
//!
//! A file on tmpfs or hugetlbfs cannot be sealed against shrinking. Another process that has it may truncate it,
//! and touching what is no longer there raises `SIGBUS` (mmap(2)); so does a page that the kernel cannot provide,
//! or that the machine cannot read any more. A process that maps the memory of many guests installs a handler for
//! that ([`install_sigbus_handler`]). The handler marks the guest's memory as faulted, maps empty memory of this
//! process in the place of the region, and lets the access go on. What is read from then on is not the guest's:
//! code that has read or written guest memory calls [`GuestRam::intact`] before it uses the result.

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use libc::{c_int, c_void, siginfo_t};
use rustix::mm::{MapFlags, ProtFlags};

use super::{GuestRam, Mapped};
use crate::error::RamFault;

/// No fault was seen.
const INTACT: u8 = 0;
/// The kernel had no page where there should be one.
const NO_PAGE: u8 = 1;
/// The machine could not read a page.
const HARDWARE: u8 = 2;

/// The number of slots in a block of the list.
const BLOCK_SLOTS: usize = 64;

/// The list of the mappings of guests' memory in this process. A signal handler reads it, and so without locks:
/// blocks are added at the end of the list and never taken away.
static FIRST: Block = Block::new();
/// The lock that is held while the list changes.
static CHANGING: Mutex<()> = Mutex::new(());

#[derive(Debug)]
struct Block {
    slots: [Slot; BLOCK_SLOTS],
    next: AtomicPtr<Block>,
}

/// A slot of the list, which holds one mapping or none (0 bytes).
#[derive(Debug)]
struct Slot {
    /// A sequence number, which is odd while the other fields change: the handler then passes the slot over. It
    /// cannot be the slot that the handler looks for, since that one belongs to memory that is being used.
    version: AtomicUsize,
    start: AtomicUsize,
    bytes: AtomicUsize,
    /// The guest's mark that a fault sets. It lives as long as the mapping is in the slot.
    fault: AtomicPtr<AtomicU8>,
}

/// Keeps the regions of one guest's memory in the list, so that a fault in them is that guest's. The value must be
/// dropped before the regions are unmapped.
#[derive(Debug)]
pub(super) struct SigbusGuard {
    slots: Vec<&'static Slot>,
    fault: Arc<AtomicU8>,
}

impl SigbusGuard {
    /// Adds these mappings to the list.
    pub(super) fn new(mapped: &[Mapped]) -> Self {
        let fault = Arc::new(AtomicU8::new(INTACT));
        let changing = lock();
        let slots = mapped.iter().map(|mapped| {
            let slot = free_slot(&changing);
            slot.set(mapped.mapping.as_ptr() as usize, mapped.mapping.size(), &fault);
            slot
        });
        let slots = slots.collect();
        drop(changing);
        Self { slots, fault }
    }

    /// Takes the mappings out of the list, while they are still there.
    pub(super) fn end(&mut self) {
        let _changing = lock();
        for slot in self.slots.drain(..) {
            slot.set(0, 0, &self.fault);
        }
    }
}

impl Drop for SigbusGuard {
    fn drop(&mut self) {
        self.end();
    }
}

impl GuestRam {
    /// Checks that the memory is still the guest's, as far as faults have shown. It is to be called after memory
    /// was read or written, before the result is used, and costs next to nothing.
    ///
    /// # Errors
    ///
    /// The error holds a [`RamFault`]. From the first fault that [the handler](install_sigbus_handler) has seen or
    /// that was [noted](Self::note_fault), every later call fails.
    pub fn intact(&self) -> io::Result<()> {
        // What was read before this must not be read after the mark is: the mark is set before empty memory is
        // mapped in the place of the guest's.
        fence(Ordering::Acquire);
        match self.sigbus_guard.fault.load(Ordering::Relaxed) {
            INTACT => Ok(()),
            fault => Err(self.explain_fault(fault)),
        }
    }

    /// Checks as [`intact`](Self::intact) does, and that no file was truncated: a file may be truncated where it
    /// was not touched since, and what lies beyond its end looks like a hole. It costs a system call for each
    /// region.
    ///
    /// # Errors
    ///
    /// The error holds a [`RamFault`], or the kernel refused.
    pub fn check(&self) -> io::Result<()> {
        self.intact()?;
        (0..self.regions.len()).try_for_each(|index| self.check_length(index))
    }

    /// Notes that a system call on this memory failed with `EFAULT`: in the kernel a fault is an error and no
    /// signal. Every later call of [`intact`](Self::intact) fails.
    pub fn note_fault(&self) {
        note(&self.sigbus_guard.fault, NO_PAGE);
    }

    /// Checks that the file behind region `index` was not truncated, and notes a fault if it was.
    pub(super) fn check_length(&self, index: usize) -> io::Result<()> {
        if self.is_truncated(index)? {
            self.note_fault();
            return Err(io::Error::other(RamFault::Truncated));
        }
        Ok(())
    }

    fn is_truncated(&self, index: usize) -> io::Result<bool> {
        let region = &self.regions[index];
        let found = rustix::fs::fstat(&*self.mapped[index].file)?.st_size;
        Ok(u64::try_from(found).is_ok_and(|found| found < region.offset + region.bytes))
    }

    /// Returns the error for a mark that was set, as far as the reason can be found out now.
    fn explain_fault(&self, fault: u8) -> io::Error {
        let is_truncated = (0..self.regions.len()).any(|index| self.is_truncated(index).unwrap_or(true));
        io::Error::other(match fault {
            _ if is_truncated => RamFault::Truncated,
            HARDWARE => RamFault::Hardware,
            _ => RamFault::NoPage,
        })
    }
}

/// Installs a handler for `SIGBUS` (sigaction(2)), so that faults in guests' memory become errors of these guests.
///
/// See [`GuestRam::intact`] for the errors. The handler is for a process that maps the memory of guests which run
/// elsewhere; a VMM is better off with the signal. Later calls do nothing.
///
/// # Errors
///
/// The handler could not be installed.
pub fn install_sigbus_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: an action of zeros is a valid one: the default, with no flags and an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_sigbus as *const () as usize;
        // A thread may have a stack for signals. Another SIGBUS while the handler runs ends the process.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the action is complete, and its handler does only what a signal handler may (see `on_sigbus`).
        match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or_default()),
        }
    });
    (*installed).map_err(io::Error::from_raw_os_error)
}

/// Handles `SIGBUS`. The signal may have interrupted anything, even an allocation or a holder of a lock. So the
/// handler only loads and stores atomics, and makes system calls that signal-safety(7) allows or that touch
/// nothing of this process but the mapping itself (`mmap` without libc's wrapper, so that `errno` stays).
extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo of this signal, which holds an address if it reports a fault.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // The code is positive if the kernel sent the signal. Otherwise a process sent it, and there is no address.
    if code > 0 && replace_region(address, code) {
        return;
    }
    // It goes on as if there were no handler: a fault happens again as soon as this returns, and ends the process.
    // SAFETY: signal handlers may call both functions (signal-safety(7)), which touch no memory of ours.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        if code <= 0 {
            libc::raise(signal);
        }
    }
}

/// Marks the guest in whose region `address` lies as faulted, and maps empty memory in the place of the region.
/// Returns false if `address` lies in none.
fn replace_region(address: usize, code: c_int) -> bool {
    let mut block = Some(&FIRST);
    while let Some(Block { slots, next }) = block {
        for slot in slots {
            let Some((start, bytes, fault)) = slot.read() else { continue };
            if address.wrapping_sub(start) >= bytes {
                continue;
            }
            // SAFETY: the access that failed is one to this region. So its memory is being used, and the owner of
            // the memory lives, and the mark with it.
            let fault = unsafe { &*fault };
            let is_hardware = code == libc::BUS_MCEERR_AR || code == libc::BUS_MCEERR_AO;
            // The mark must be set before any thread can read what is not the guest's.
            note(fault, if is_hardware { HARDWARE } else { NO_PAGE });
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
            // The whole region is replaced, or there would be one more mapping for each page that is touched.
            // Another thread may do the same for this region: the later one replaces zeros by zeros. SAFETY: the
            // range is exactly a mapping of ours, which stays ours, as long and as accessible as it was. What was
            // read from it before keeps its meaning; what is read later is known to mean nothing (`intact`).
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
        // SAFETY: the pointer is null, or leads to a block that is never freed.
        block = unsafe { next.load(Ordering::Acquire).as_ref() };
    }
    false
}

/// Sets the mark, unless an earlier fault has set it.
fn note(mark: &AtomicU8, fault: u8) {
    let _ = mark.compare_exchange(INTACT, fault, Ordering::SeqCst, Ordering::SeqCst);
}

fn lock() -> MutexGuard<'static, ()> {
    CHANGING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns a slot that holds no mapping. The caller holds the lock.
fn free_slot(_changing: &MutexGuard<'_, ()>) -> &'static Slot {
    let mut block: &'static Block = &FIRST;
    loop {
        if let Some(slot) = block.slots.iter().find(|slot| slot.bytes.load(Ordering::SeqCst) == 0) {
            return slot;
        }
        // SAFETY: the pointer is null, or leads to a block that is never freed.
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
        Self { slots: [const { Slot::new() }; BLOCK_SLOTS], next: AtomicPtr::new(ptr::null_mut()) }
    }
}

impl Slot {
    const fn new() -> Self {
        let (start, bytes) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { version: AtomicUsize::new(0), start, bytes, fault: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Changes what the slot holds. The caller holds the lock.
    fn set(&self, start: usize, bytes: usize, fault: &Arc<AtomicU8>) {
        self.version.fetch_add(1, Ordering::SeqCst);
        self.start.store(start, Ordering::SeqCst);
        self.bytes.store(bytes, Ordering::SeqCst);
        self.fault.store(Arc::as_ptr(fault).cast_mut(), Ordering::SeqCst);
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// Returns what the slot holds; `None` if that is nothing, or is changing.
    fn read(&self) -> Option<(usize, usize, *const AtomicU8)> {
        let version = self.version.load(Ordering::SeqCst);
        let (start, bytes) = (self.start.load(Ordering::SeqCst), self.bytes.load(Ordering::SeqCst));
        let fault = self.fault.load(Ordering::SeqCst).cast_const();
        let steady = version.is_multiple_of(2) && self.version.load(Ordering::SeqCst) == version;
        (steady && bytes > 0).then_some((start, bytes, fault))
    }
}

#[cfg(test)]
mod tests;
