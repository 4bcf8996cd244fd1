//! [`LogTracker`]: KVM's dirty bitmap.
//!
//! With `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` and `KVM_DIRTY_LOG_INITIALLY_SET`, switching the log on protects
//! nothing and so stalls no vCPU; every page counts as dirty. Clearing a piece of the bitmap
//! (`KVM_CLEAR_DIRTY_LOG`) write-protects just that piece (`Documentation/virt/kvm/api.rst`).

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use memlane_protocol::wire::machine::TrackerKind;
use memlane_protocol::{PAGE_SIZE, PageSet};
use rustix::ioctl::{Updater, ioctl, opcode};

use super::{DirtyTracker, ProtectedPages, TrackError};
use crate::ram::{GuestRam, MemorySlot};
use crate::shared::SharedWords;

/// The number of pages that are cleared in one call (16 MiB): KVM holds its MMU lock meanwhile, and a vCPU that
/// faults has to wait for it.
const PIECE_PAGES: u64 = 4096;

/// The number of pages whose bits are put together to be cleared (4 GiB), however many are protected at once.
const MASK_PAGES: u64 = 1 << 20;

/// The number of pages in a word of the bitmap; ranges to clear begin and end at its multiples.
const WORD: u64 = 64;

/// Finds dirty pages by KVM's dirty log.
pub struct LogTracker {
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
    slots: Vec<MemorySlot>,
    protected: ProtectedPages,
    started: bool,
}

impl LogTracker {
    /// Returns a tracker for a virtual machine whose memory was [registered](GuestRam::register) as `slots`.
    ///
    /// It sets the dirty log of the virtual machine to manual protection, for good.
    ///
    /// # Errors
    ///
    /// [`TrackError::Unavailable`] where KVM cannot do that (before Linux 5.7).
    pub fn new(vm: Arc<VmFd>, ram: Arc<GuestRam>, slots: Vec<MemorySlot>) -> Result<Self, TrackError> {
        let mut manual = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        manual.args[0] = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        vm.enable_cap(&manual).map_err(|error| TrackError::Unavailable {
            what: "manual protection by KVM's dirty log (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, INITIALLY_SET)",
            source: error.into(),
            advice: "use Linux 5.7 or newer, or the pagemap tracker",
        })?;
        let protected = ProtectedPages::new(ram.pages());
        Ok(Self { vm, ram, slots, protected, started: false })
    }

    /// Clears, and so write-protects, the pages of `bits` piece by piece. There is one bit for each page; the first
    /// is for page `first` of the slot.
    fn clear(&self, slot: &MemorySlot, first: u64, bits: &mut [u64]) -> Result<(), TrackError> {
        for (index, piece) in bits.chunks_mut((PIECE_PAGES / WORD) as usize).enumerate() {
            let Some(begin) = piece.iter().position(|word| *word != 0) else { continue };
            let end = piece.iter().rposition(|word| *word != 0).map_or(begin, |last| last + 1);
            let first_page = first + index as u64 * PIECE_PAGES + begin as u64 * WORD;
            let words = &mut piece[begin..end];
            let mut argument = kvm_clear_dirty_log {
                slot: slot.slot,
                num_pages: (words.len() as u64 * WORD).min(slot.pages - first_page) as u32,
                first_page,
                __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                    dirty_bitmap: words.as_mut_ptr().cast(),
                },
            };
            const CLEAR: u32 = opcode::read_write::<kvm_clear_dirty_log>(KVMIO as u8, 0xc0);
            // SAFETY: `vm` keeps the descriptor open while it is borrowed.
            let vm = unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) };
            // SAFETY: the argument is of the ioctl's type, and its bitmap holds a bit for each of `num_pages`.
            unsafe { ioctl(vm, Updater::<CLEAR, _>::new(&mut argument)) }
                .map_err(TrackError::kernel("write-protect the guest's pages (KVM_CLEAR_DIRTY_LOG)"))?;
        }
        Ok(())
    }

    /// Reads a slot's bitmap, clears the protected pages in it, and adds them to `into`.
    fn harvest_slot(&self, slot: &MemorySlot, into: &PageSet<SharedWords>) -> Result<u64, TrackError> {
        let mut bits = self
            .vm
            .get_dirty_log(slot.slot, (slot.pages * PAGE_SIZE) as usize)
            .map_err(TrackError::kernel("read the dirty log (KVM_GET_DIRTY_LOG)"))?;
        for (index, word) in bits.iter_mut().enumerate().filter(|(_, word)| **word != 0) {
            *word &= self.protected.bits(slot.first_page + index as u64 * WORD);
        }
        self.clear(slot, 0, &mut bits)?;
        let mut new = 0;
        for (index, word) in bits.into_iter().enumerate().filter(|(_, word)| *word != 0) {
            new += insert_bits(into, slot.first_page + index as u64 * WORD, word);
        }
        Ok(new)
    }

    /// Switches the dirty log of all slots on or off.
    fn switch(&self, on: bool) -> Result<(), TrackError> {
        for slot in &self.slots {
            let flags = slot.flags | if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            self.ram.set_slot(&self.vm, slot, flags).map_err(TrackError::kernel(
                "switch the dirty log of a memory slot (KVM_SET_USER_MEMORY_REGION)",
            ))?;
        }
        Ok(())
    }
}

impl DirtyTracker for LogTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::Log
    }

    fn start(&mut self) -> Result<(), TrackError> {
        if !self.started {
            self.protected.clear();
            self.ram.dirty_bitmap().clear();
            self.switch(true).inspect_err(|_| {
                // Best effort: the error that matters is the first.
                let _ = self.switch(false);
            })?;
            self.started = true;
        }
        Ok(())
    }

    fn write_protect(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        if !self.started {
            return Err(TrackError::NotStarted);
        }
        for run in self.protected.missing(pages)? {
            for slot in &self.slots {
                let slot_pages = slot.pages();
                let part = run.start.max(slot_pages.start)..run.end.min(slot_pages.end);
                for from in part.clone().step_by(MASK_PAGES as usize) {
                    let part = from - slot.first_page..part.end.min(from + MASK_PAGES) - slot.first_page;
                    let (first, mut bits) = mask(part);
                    self.clear(slot, first, &mut bits)?;
                }
            }
            self.protected.add(run);
        }
        Ok(())
    }

    fn write_protected_pages(&self) -> u64 {
        self.protected.count()
    }

    fn harvest(&mut self, into: &PageSet<SharedWords>) -> Result<u64, TrackError> {
        if !self.started {
            return Err(TrackError::NotStarted);
        }
        let mut new = self.protected.drain(self.ram.dirty_bitmap(), into);
        for slot in &self.slots {
            new += self.harvest_slot(slot, into)?;
        }
        Ok(new)
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        if self.started {
            self.switch(false)?;
            self.started = false;
            self.protected.clear();
        }
        Ok(())
    }
}

/// Returns the pages of `run` as bits, and the multiple of 64 that the first bit stands for.
fn mask(run: Range<u64>) -> (u64, Vec<u64>) {
    let first = run.start / WORD * WORD;
    let words = run.end.div_ceil(WORD) - first / WORD;
    let mut bits = vec![u64::MAX; words as usize];
    bits[0] &= u64::MAX << (run.start % WORD);
    if !run.end.is_multiple_of(WORD) {
        bits[words as usize - 1] &= u64::MAX >> (WORD - run.end % WORD);
    }
    (first, bits)
}

/// Adds those of the 64 pages from `page` on whose bits are set, and returns how many are new.
fn insert_bits(into: &PageSet<SharedWords>, page: u64, bits: u64) -> u64 {
    let (word, shift) = (page / WORD, page % WORD);
    match shift {
        0 => into.insert_word(word, bits),
        _ => into.insert_word(word, bits << shift) + into.insert_word(word + 1, bits >> (WORD - shift)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_begin_and_end_within_words() {
        assert_eq!(mask(0..1), (0, vec![1]));
        assert_eq!(mask(65..67), (64, vec![6]));
        assert_eq!(mask(63..193), (0, vec![1 << 63, u64::MAX, u64::MAX, 1]));
        assert_eq!(mask(64..128), (64, vec![u64::MAX]));
    }
}
