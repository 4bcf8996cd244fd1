//! [`VcpuRing`]: the dirty ring of one vCPU, as KVM shares it with this process.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::VcpuFd;
use memlane_protocol::PAGE_SIZE;
use rustix::mm::{MapFlags, ProtFlags};

use super::RingSize;

/// KVM has published the entry (`KVM_DIRTY_GFN_F_DIRTY`).
const DIRTY: u32 = 1 << 0;
/// This process has taken the entry (`KVM_DIRTY_GFN_F_RESET`).
const COLLECTED: u32 = 1 << 1;

/// One vCPU's ring of `struct kvm_dirty_gfn`, mapped (`Documentation/virt/kvm/api.rst`,
/// "`KVM_CAP_DIRTY_LOG_RING`").
pub(super) struct VcpuRing {
    entries: NonNull<Entry>,
    size: RingSize,
    /// The number of the next entry to collect; its low bits say where the entry is.
    next: u32,
    /// The number of the first entry that [`count_published`](Self::count_published) has not counted.
    counted: u32,
    /// The number of the next entry that KVM will reset, as `reset_index` in KVM.
    reset: u32,
    /// Whether, after an overflow, KVM counts entries from `next` on that were handed back already. Up to which
    /// entry shows only when KVM has appended one.
    out_of_step: bool,
}

/// A `struct kvm_dirty_gfn`, which KVM fills while this process reads it.
#[repr(C)]
pub(super) struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

const _: () = assert!(size_of::<Entry>() == size_of::<kvm_dirty_gfn>());

// SAFETY: the mapping belongs to this value alone and is only accessed through atomics.
unsafe impl Send for VcpuRing {}

impl VcpuRing {
    /// Maps the ring of a vCPU; `size` is the size that was enabled for its virtual machine.
    pub(super) fn map(vcpu: &VcpuFd, size: RingSize) -> io::Result<Self> {
        // SAFETY: `vcpu` keeps the descriptor open while it is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let (protection, offset) =
            (ProtFlags::READ | ProtFlags::WRITE, u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE);
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let entries = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                Self::bytes(size),
                protection,
                MapFlags::SHARED,
                fd,
                offset,
            )?
        };
        let entries = NonNull::new(entries.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { entries, size, next: 0, counted: 0, reset: 0, out_of_step: false })
    }

    /// Calls `found` with the slot and the offset of each published entry, and hands the entry back.
    pub(super) fn collect(&mut self, found: impl Fn(u32, u64)) {
        if self.out_of_step {
            self.catch_up();
        }
        while self.unreset() < self.size.0 {
            let entry = self.entry(self.next);
            // Slot and offset are valid once KVM has published the entry, and KVM may
            // overwrite them once it is handed back.
            if entry.flags.load(Ordering::Acquire) & (DIRTY | COLLECTED) != DIRTY {
                break;
            }
            found(entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
            entry.flags.store(COLLECTED, Ordering::Release);
            self.next = self.next.wrapping_add(1);
        }
    }

    /// Returns how many entries KVM has published since the last call, whether or not they were collected.
    pub(super) fn count_published(&mut self) -> u32 {
        let before = self.counted;
        // The count is at most a ring ahead of what was collected; otherwise it is behind, however far.
        if self.counted.wrapping_sub(self.next) > self.size.0 {
            self.counted = self.next;
        }
        while self.counted.wrapping_sub(self.reset) < self.size.0
            && self.entry(self.counted).flags.load(Ordering::Acquire) & (DIRTY | COLLECTED) == DIRTY
        {
            self.counted = self.counted.wrapping_add(1);
        }
        self.counted.wrapping_sub(before)
    }

    /// Returns whether every entry was in use at once. KVM keeps some entries free, so it went too far then, and
    /// has overwritten entries or is about to.
    pub(super) fn has_overflowed(&self) -> bool {
        self.unreset() == self.size.0
    }

    /// Returns how many entries were collected that KVM has not reset yet.
    pub(super) fn unreset(&self) -> u32 {
        self.next.wrapping_sub(self.reset)
    }

    /// Hands back every entry of a ring that has overflowed, as KVM wrote over collected ones.
    pub(super) fn hand_back_all(&mut self) {
        (0..self.size.0).for_each(|at| self.entry(at).flags.store(COLLECTED, Ordering::Release));
        self.out_of_step = true;
    }

    /// Notes that KVM has reset `entries` more entries, of those that are [`unreset`](Self::unreset).
    pub(super) fn note_reset(&mut self, entries: u32) {
        self.reset = self.reset.wrapping_add(entries.min(self.unreset()));
    }

    /// Counts what KVM publishes from the next entry to collect on: how much of what was passed over had been
    /// written is not known.
    pub(super) fn restart_count(&mut self) {
        self.counted = self.next;
    }

    /// Finds where KVM goes on after an overflow, and hands back the entries up to there. If KVM has come
    /// round to where it would be found, the ring counts as overflowed once more.
    fn catch_up(&mut self) {
        let flags = |ahead: u32| &self.entry(self.next.wrapping_add(ahead)).flags;
        let is_dirty = |ahead: u32| flags(ahead).load(Ordering::Acquire) & DIRTY != 0;
        let Some(gap) = (0..self.size.0).find(|ahead| is_dirty(*ahead)) else { return };
        let handed_back = (0..gap).all(|ahead| {
            let exchanged = flags(ahead).compare_exchange(0, COLLECTED, Ordering::AcqRel, Ordering::Acquire);
            exchanged.is_ok()
        });
        // It fills the ring in order: the first entry comes after the last only if it went round.
        let came_round = !handed_back || gap == 0 && is_dirty(self.size.0 - 1);
        self.next =
            if came_round { self.reset.wrapping_add(self.size.0) } else { self.next.wrapping_add(gap) };
        self.out_of_step = false;
    }

    fn entry(&self, at: u32) -> &Entry {
        // SAFETY: the mapping holds `size` entries for as long as `self` lives, is page
        // aligned, and any bits are valid atomics.
        let entries = unsafe { std::slice::from_raw_parts(self.entries.as_ptr(), self.size.0 as usize) };
        &entries[(at & (self.size.0 - 1)) as usize]
    }

    fn bytes(size: RingSize) -> usize {
        size.0 as usize * size_of::<Entry>()
    }
}

impl Drop for VcpuRing {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it outlives `self`.
        // An error would mean that it is gone already, and nothing is left to do.
        let _ = unsafe { rustix::mm::munmap(self.entries.as_ptr().cast(), Self::bytes(self.size)) };
    }
}
