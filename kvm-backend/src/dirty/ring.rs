//! [`RingTracker`]: KVM's dirty rings.
//!
//! Each vCPU has a ring, shared with this process, to which KVM appends the pages that the
//! vCPU writes (`Documentation/virt/kvm/api.rst`, "`KVM_CAP_DIRTY_LOG_RING`"). Collected entries
//! are handed back and their pages protected again by `KVM_RESET_DIRTY_RINGS`. A vCPU whose
//! ring is nearly full leaves `KVM_RUN` with `KVM_EXIT_DIRTY_RING_FULL`, and must have the rings
//! collected ([`RingHandle::collect`]) before it can go on.
//!
//! KVM protects all pages when the ring is switched on, so there is nothing left to do for
//! arming but to remember which pages count.
//!
//! KVM asks whether a ring is nearly full only when it enters the guest. A vCPU whose
//! instructions it emulates many at a time can write on beyond the end and over entries that
//! nobody has collected. Such a ring is noticed, all pages are protected anew, and those that hold something
//! count as written.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET,
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use memlane_protocol::wire::machine::TrackerKind;
use memlane_protocol::{PAGE_SIZE, PageSet};
use rustix::ioctl::{ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags};

use super::pace::{Holds, Kick, Pace};
use super::{Armed, DirtyTracker, Paced, TrackError};
use crate::ioctl::Answering;
use crate::ram::{GuestRam, MemorySlot};
use crate::shared::SharedWords;

/// `KVM_EXIT_DIRTY_RING_FULL`, the exit that kvm-ioctls passes on as unsupported.
pub const EXIT_RING_FULL: u32 = kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;

/// KVM has published the entry (`KVM_DIRTY_GFN_F_DIRTY`).
const DIRTY: u32 = 1 << 0;
/// This process has taken it (`KVM_DIRTY_GFN_F_RESET`).
const COLLECTED: u32 = 1 << 1;

/// Entries of the smallest ring. More than KVM can append between two entries into the guest
/// when it emulates instructions, so that an overflow never passes over a whole ring.
const LEAST_ENTRIES: u32 = 4096;

/// Turns without progress after which resetting is given up. A reset ends early when a signal
/// is pending, so a turn or two without progress are no fault.
const RESET_TURNS: u32 = 100;

/// Pages that count as written together after an overflow, if one of them holds something.
const BLOCK_PAGES: u64 = 512;

/// The size of the rings of a virtual machine that has them: see [`enable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSize(u32);

/// Gives each vCPU that will be made a dirty ring of `entries` entries: a power of two from
/// 4096 up to what KVM allows.
///
/// Must come before the first vCPU is made. Fails with [`TrackError::RingSize`] for a number
/// that KVM does not allow. A virtual machine with rings has no dirty log.
pub fn enable(vm: &VmFd, entries: u32) -> Result<RingSize, TrackError> {
    let offered = |cap: u32| u32::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0);
    let (cap, bytes) = match offered(KVM_CAP_DIRTY_LOG_RING_ACQ_REL) {
        0 => (KVM_CAP_DIRTY_LOG_RING, offered(KVM_CAP_DIRTY_LOG_RING)),
        bytes => (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, bytes),
    };
    let limit = bytes / size_of::<Entry>() as u32;
    if !entries.is_power_of_two() || entries < LEAST_ENTRIES || entries > limit {
        return Err(TrackError::RingSize { entries, limit });
    }
    let mut ring = kvm_enable_cap { cap, ..Default::default() };
    ring.args[0] = u64::from(entries) * size_of::<Entry>() as u64;
    vm.enable_cap(&ring).map_err(|error| TrackError::Unavailable {
        what: "KVM's dirty ring",
        source: error.into(),
        advice: "it must be enabled before the first vCPU is made",
    })?;
    Ok(RingSize(entries))
}

/// Finds dirty pages by KVM's dirty rings.
pub struct RingTracker {
    /// Dropped first: it looks at the rings.
    pace: Option<Pace>,
    kick: Option<Kick>,
    handle: RingHandle,
    armed: Armed,
    started: bool,
}

/// What vCPU threads hold of a [`RingTracker`].
#[derive(Clone)]
pub struct RingHandle(Arc<Shared>);

struct Shared {
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
    slots: Vec<MemorySlot>,
    size: RingSize,
    rings: Mutex<Rings>,
    holds: Arc<Holds>,
}

/// All vCPUs' rings. The lock around them also orders collecting, resetting and draining: a
/// page may be copied only after the reset that protects it again.
struct Rings {
    rings: Vec<Ring>,
    /// Pages collected and not yet drained.
    pending: PageSet,
    /// Whether KVM appends to the rings.
    on: bool,
}

impl RingTracker {
    /// A tracker for a virtual machine with rings whose memory was registered as `slots`.
    pub fn new(vm: Arc<VmFd>, ram: Arc<GuestRam>, slots: Vec<MemorySlot>, size: RingSize) -> Self {
        let pages = ram.pages();
        let rings = Mutex::new(Rings { rings: Vec::new(), pending: PageSet::new(pages), on: false });
        let holds = Arc::new(Holds::new());
        let handle = RingHandle(Arc::new(Shared { vm, ram, slots, size, rings, holds }));
        Self { pace: None, kick: None, handle, armed: Armed::new(pages), started: false }
    }

    /// Maps the ring of a vCPU of this virtual machine. Every vCPU must be added, once, before it runs.
    pub fn add_vcpu(&mut self, vcpu: &VcpuFd) -> Result<(), TrackError> {
        let ring =
            Ring::map(vcpu, self.handle.0.size).map_err(TrackError::kernel("mapping a vCPU's dirty ring"))?;
        self.handle.0.lock().rings.push(ring);
        self.handle.0.holds.add_vcpu();
        Ok(())
    }

    /// The VMM holds vCPUs: `kick` makes one leave `KVM_RUN`, or not enter it, by the number of its
    /// [`add_vcpu`](Self::add_vcpu), and its thread then asks [`RingHandle::held_until`].
    pub fn hold_vcpus(&mut self, kick: impl Fn(usize) + Send + Sync + 'static) {
        self.kick = Some(Arc::new(kick));
    }

    /// What the vCPU threads need when their ring is full.
    pub fn handle(&self) -> RingHandle {
        self.handle.clone()
    }

    /// Switches tracking, and drops what the rings hold: nothing is armed on either side of it.
    fn switch(&self, on: bool) -> Result<(), TrackError> {
        let shared = &self.handle.0;
        let mut rings = shared.lock();
        shared.append(on)?;
        rings.on = on;
        shared.collect(&mut rings)?;
        rings.pending.clear();
        Ok(())
    }
}

impl RingHandle {
    /// Collects all rings and lets KVM go on filling them; for a vCPU thread on
    /// [`EXIT_RING_FULL`]. What was collected is reported by the next harvest.
    pub fn collect(&self) -> Result<(), TrackError> {
        self.0.collect(&mut self.0.lock())
    }

    /// Until when a vCPU must stay out of the guest, for its thread before each `KVM_RUN`; `None` if it
    /// may enter. It asks again then, and may be stopped meanwhile as ever.
    pub fn held_until(&self, vcpu: usize) -> Option<Instant> {
        self.0.holds.of(vcpu)
    }
}

impl DirtyTracker for RingTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::Ring
    }

    fn start(&mut self) -> Result<(), TrackError> {
        if !self.started {
            self.armed.clear();
            self.handle.0.ram.marks().clear();
            self.switch(true).inspect_err(|_| {
                // Best effort: the error that matters is the first.
                let _ = self.switch(false);
            })?;
            self.started = true;
        }
        Ok(())
    }

    fn arm(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        if !self.started {
            return Err(TrackError::NotStarted);
        }
        for run in self.armed.missing(pages)? {
            self.armed.add(run);
        }
        Ok(())
    }

    fn armed(&self) -> u64 {
        self.armed.count()
    }

    fn harvest(&mut self, into: &PageSet<SharedWords>) -> Result<u64, TrackError> {
        if !self.started {
            return Err(TrackError::NotStarted);
        }
        let shared = &self.handle.0;
        let mut new = self.armed.drain(shared.ram.marks(), into);
        let mut rings = shared.lock();
        shared.collect(&mut rings)?;
        new += self.armed.drain(&rings.pending, into);
        Ok(new)
    }

    fn pace(&mut self, pages_per_second: u64) -> Result<Paced, TrackError> {
        if !self.started {
            return Err(TrackError::NotStarted);
        }
        let kick = self.kick.as_ref().ok_or(TrackError::NoPace)?;
        if let Some(pace) = &self.pace {
            pace.set_rate(pages_per_second);
            return Ok(pace.paced());
        }
        let shared = self.handle.0.clone();
        let look = move || shared.lock().rings.iter_mut().map(Ring::look).collect();
        let pace = Pace::start(self.handle.0.holds.clone(), pages_per_second, kick.clone(), look);
        let pace = pace.map_err(|error| TrackError::Kernel { doing: "starting a thread", source: error })?;
        Ok(self.pace.insert(pace).paced())
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        self.pace = None;
        if self.started {
            self.switch(false)?;
            self.started = false;
            self.armed.clear();
        }
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Rings> {
        // Nothing in here is left half done by a panic.
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Switches whether KVM appends to the rings. Switching it on protects all pages.
    fn append(&self, on: bool) -> Result<(), TrackError> {
        for slot in &self.slots {
            let flags = slot.flags | if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            self.ram
                .set_slot(&self.vm, slot, flags)
                .map_err(TrackError::kernel("switching the dirty ring of a memory slot"))?;
        }
        Ok(())
    }

    /// Moves the entries of all rings to the pending pages, and has KVM protect those again.
    fn collect(&self, rings: &mut Rings) -> Result<(), TrackError> {
        let Rings { rings, pending, on } = rings;
        let note = |slot, offset| {
            if let Some(page) = self.page(slot, offset) {
                pending.insert(page);
            }
        };
        // One at a time, as KVM says only in sum how many entries it has reset.
        for ring in rings.iter_mut() {
            ring.collect(note);
            if ring.has_overflowed() || !self.reset(ring)? {
                return self.recover(rings, pending, *on);
            }
        }
        Ok(())
    }

    /// Sets rings right of which one has overflowed: entries were lost, so all pages are
    /// protected anew, and all that hold something count as written.
    fn recover(&self, rings: &mut [Ring], pending: &PageSet, on: bool) -> Result<(), TrackError> {
        tracing::warn!("a vCPU wrote on beyond the end of its dirty ring; all pages count as written");
        // So that nothing is appended while entries are handed back unseen.
        self.append(false)?;
        for ring in rings {
            ring.collect(|_, _| {});
            if ring.has_overflowed() {
                ring.hand_back_all();
            }
            if !self.reset(ring)? {
                return Err(TrackError::RingStuck { left: ring.unreset() });
            }
            // Nobody knows how much of what was passed over had been written.
            ring.seen = ring.next;
        }
        if on {
            self.append(true)?;
        }
        // Looked at after all is protected: what comes into being later is appended again. Where nobody can
        // tell what holds data, all of it may.
        let all = 0..self.ram.pages();
        let held = self.ram.data_blocks(all.clone(), BLOCK_PAGES).unwrap_or_else(|_| vec![all]);
        for pages in held {
            pending.insert_range(pages);
        }
        Ok(())
    }

    /// Has KVM reset what was collected of this ring; false if it does not get to the end.
    fn reset(&self, ring: &mut Ring) -> Result<bool, TrackError> {
        let mut idle_turns = 0;
        while ring.unreset() != 0 {
            match self.reset_rings()? {
                0 if idle_turns == RESET_TURNS => return Ok(false),
                0 => idle_turns += 1,
                done => {
                    ring.reset = ring.reset.wrapping_add(done.min(ring.unreset()));
                    idle_turns = 0;
                }
            }
        }
        Ok(true)
    }

    /// How many entries KVM has reset. It stops early when a signal is pending.
    fn reset_rings(&self) -> Result<u32, TrackError> {
        const RESET: u32 = opcode::none(KVMIO as u8, 0xc7);
        // SAFETY: `self.vm` keeps the descriptor open while it is borrowed.
        let vm = unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) };
        // SAFETY: KVM_RESET_DIRTY_RINGS takes no argument.
        match unsafe { ioctl(vm, Answering::<RESET>::new(std::ptr::null_mut())) } {
            Ok(done) => Ok(u32::try_from(done).unwrap_or(0)),
            Err(rustix::io::Errno::INTR) => Ok(0),
            Err(error) => Err(TrackError::kernel("resetting the dirty rings (KVM_RESET_DIRTY_RINGS)")(error)),
        }
    }

    /// The page at `offset` pages into KVM's slot. Slots of other address spaces (system
    /// management mode, in the upper half) show the same memory under the same numbers.
    fn page(&self, slot: u32, offset: u64) -> Option<u64> {
        let slot = self.slots.get((slot & 0xffff) as usize)?;
        (offset < slot.pages).then(|| slot.first_page + offset)
    }
}

/// One vCPU's ring.
struct Ring {
    entries: NonNull<Entry>,
    size: RingSize,
    /// Number of the next entry to collect; its low bits say where it is.
    next: u32,
    /// Number of the first entry that [`look`](Self::look) has not seen.
    seen: u32,
    /// Number of the next entry that KVM will reset, as `reset_index` in KVM.
    reset: u32,
    /// After an overflow: KVM counts entries from `next` on that were handed back already. Up
    /// to where, shows when it has appended one.
    adrift: bool,
}

/// `struct kvm_dirty_gfn`, which KVM fills while it is read here.
#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

const _: () = assert!(size_of::<Entry>() == size_of::<kvm_dirty_gfn>());

// SAFETY: the mapping belongs to the value alone and is only accessed through atomics.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, size: RingSize) -> io::Result<Self> {
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
        Ok(Self { entries, size, next: 0, seen: 0, reset: 0, adrift: false })
    }

    /// Calls `found` with slot and offset of each published entry and hands the entry back.
    fn collect(&mut self, found: impl Fn(u32, u64)) {
        if self.adrift {
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

    /// How many entries KVM has published since the last look, collected or not.
    fn look(&mut self) -> u32 {
        let before = self.seen;
        // It is ahead of what was collected by a ring at most, so otherwise it is behind, however far.
        if self.seen.wrapping_sub(self.next) > self.size.0 {
            self.seen = self.next;
        }
        while self.seen.wrapping_sub(self.reset) < self.size.0
            && self.entry(self.seen).flags.load(Ordering::Acquire) & (DIRTY | COLLECTED) == DIRTY
        {
            self.seen = self.seen.wrapping_add(1);
        }
        self.seen.wrapping_sub(before)
    }

    /// Whether every entry was in use at once. KVM keeps some free, so it went too far then,
    /// and has overwritten entries or is about to.
    fn has_overflowed(&self) -> bool {
        self.unreset() == self.size.0
    }

    /// Entries collected that KVM has not reset yet.
    fn unreset(&self) -> u32 {
        self.next.wrapping_sub(self.reset)
    }

    /// Hands back every entry of a ring that has overflowed, as KVM wrote over collected ones.
    fn hand_back_all(&mut self) {
        (0..self.size.0).for_each(|at| self.entry(at).flags.store(COLLECTED, Ordering::Release));
        self.adrift = true;
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
        self.adrift = false;
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

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it outlives `self`.
        // An error would mean that it is gone already, and nothing is left to do.
        let _ = unsafe { rustix::mm::munmap(self.entries.as_ptr().cast(), Self::bytes(self.size)) };
    }
}
