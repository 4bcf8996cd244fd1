//! Memory that is mapped by somebody else than the guest's VMM.

use std::sync::atomic::Ordering;

use rustix::mm::Advice;

use super::{GuestRam, HostSlice};

/// Bytes that are unmapped in one go: whoever changes this process's mappings meanwhile waits for that.
const PIECE_BYTES: usize = 32 << 20;

impl GuestRam {
    /// Has the kernel take nothing that this process reads or writes for a sign that the guest needs a page:
    /// for a daemon's mapping, not for the VMM's. It costs a good part of unmapping it, too.
    ///
    /// What is left of that is done on a thread of its own, piece by piece, when the memory is dropped: it takes a
    /// second for each few GiB, and more if nobody else has the memory any more.
    pub fn look_on(&self) {
        for slice in self.slices(0..self.pages()) {
            // No harm if it fails. SAFETY: the slice lies within a mapping of ours, and what is advised
            // changes no contents; there is no reading ahead in memory that it could end.
            let _ = unsafe { rustix::mm::madvise(slice.ptr.cast(), slice.len, Advice::Random) };
        }
        self.looks_on.store(true, Ordering::Relaxed);
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        if !self.looks_on.load(Ordering::Relaxed) {
            return;
        }
        // Nobody may take what comes to the same addresses for this memory.
        self.guarded.end();
        let slices: Vec<_> = self.slices(0..self.pages()).collect();
        let (memory, mapped) = (std::mem::take(&mut self.memory), std::mem::take(&mut self.mapped));
        let unmap = move || {
            slices.into_iter().for_each(empty);
            drop((memory, mapped));
        };
        // Without a thread, all of it is unmapped here.
        let _ = std::thread::Builder::new().name("unmap".into()).spawn(unmap);
    }
}

/// Takes the pages of a slice out of this process's page tables.
fn empty(slice: HostSlice) {
    for offset in (0..slice.len).step_by(PIECE_BYTES) {
        let piece = slice.ptr.wrapping_add(offset).cast();
        let bytes = PIECE_BYTES.min(slice.len - offset);
        // No harm if it fails. SAFETY: the piece lies within a mapping that its last owner has let go of, and that is
        // still there; what the pages hold stays, since it is shared.
        let _ = unsafe { rustix::mm::madvise(piece, bytes, Advice::LinuxDontNeed) };
    }
}
