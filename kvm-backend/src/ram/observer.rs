//! Memory that is mapped by an observer, a process that is not the guest's VMM.

use std::sync::atomic::Ordering;

use rustix::mm::Advice;

use super::{GuestRam, HostSlice};

/// The number of bytes that are unmapped in one go: a thread that changes this process's mappings meanwhile waits
/// for that.
const PIECE_BYTES: usize = 32 << 20;

impl GuestRam {
    /// Marks this mapping as that of an observer, a daemon and not the VMM: accesses through it then do not count
    /// as signs that the guest uses a page, when the kernel decides what to reclaim (madvise(2), `MADV_RANDOM`).
    /// That also saves a good part of the cost of unmapping the memory.
    ///
    /// The memory is then unmapped by a thread of its own, piece by piece, when this value is dropped. That takes
    /// a second for each few GiB, and more if no other process has the memory any more.
    pub fn mark_as_observer(&self) {
        for slice in self.slices(0..self.pages()) {
            // It does no harm if this fails. SAFETY: the slice lies within a mapping of ours, and the advice
            // changes no contents; memory has no reading ahead that it could end.
            let _ = unsafe { rustix::mm::madvise(slice.ptr.cast(), slice.len, Advice::Random) };
        }
        self.is_observer.store(true, Ordering::Relaxed);
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        if !self.is_observer.load(Ordering::Relaxed) {
            return;
        }
        // What is mapped at the same addresses later must not be taken for this memory.
        self.sigbus_guard.end();
        let slices: Vec<_> = self.slices(0..self.pages()).collect();
        let (memory, mapped) = (std::mem::take(&mut self.memory), std::mem::take(&mut self.mapped));
        let unmap = move || {
            slices.into_iter().for_each(empty);
            drop((memory, mapped));
        };
        // If no thread can be started, the closure is dropped, and all of it is unmapped here.
        let _ = std::thread::Builder::new().name("unmap".into()).spawn(unmap);
    }
}

/// Takes the pages of a slice out of this process's page tables.
fn empty(slice: HostSlice) {
    for offset in (0..slice.len).step_by(PIECE_BYTES) {
        let piece = slice.ptr.wrapping_add(offset).cast();
        let bytes = PIECE_BYTES.min(slice.len - offset);
        // It does no harm if this fails. SAFETY: the piece lies within a mapping that is still there and that has
        // no other user; what the pages hold stays, since the mapping is shared.
        let _ = unsafe { rustix::mm::madvise(piece, bytes, Advice::LinuxDontNeed) };
    }
}
