//! [`RingTracker`]: KVM's dirty rings.
//!
//! Each vCPU has a ring, shared with this process, to which KVM appends the pages that the vCPU writes
//! (`Documentation/virt/kvm/api.rst`, "`KVM_CAP_DIRTY_LOG_RING`"). Collected entries are handed back, and their
//! pages are protected again by `KVM_RESET_DIRTY_RINGS`. A vCPU whose ring is nearly full leaves `KVM_RUN` with
//! `KVM_EXIT_DIRTY_RING_FULL`, and must have the rings collected ([`RingHandle::collect`]) before it can go on.
//!
//! KVM protects all pages when the ring is switched on. So write-protecting pages only notes here which pages the
//! tracker reports on.
//!
//! KVM checks whether a ring is nearly full only when it enters the guest. A vCPU whose instructions KVM emulates
//! many at a time can write on beyond the end of the ring, and over entries that were not collected. The tracker
//! notices such a ring, protects all pages anew, and reports those that hold something as written.

mod vcpu_ring;

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use memlane_protocol::PageSet;
use memlane_protocol::wire::machine::TrackerKind;
use rustix::ioctl::{ioctl, opcode};

use super::throttle::{Kick, Throttle, VcpuDeadlines};
use super::{DirtyTracker, ProtectedPages, ThrottleStats, TrackError};
use crate::ioctl::ReturnsValue;
use crate::ram::{GuestRam, MemorySlot};
use crate::shared::SharedWords;

use vcpu_ring::{Entry, VcpuRing};

/// `KVM_EXIT_DIRTY_RING_FULL`, the exit that kvm-ioctls passes on as `VcpuExit::Unsupported`.
pub const EXIT_RING_FULL: u32 = kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;

/// The number of entries of the smallest ring. It is more than KVM can append between two entries into the guest
/// when it emulates instructions, so that an overflow never passes over a whole ring.
const MIN_ENTRIES: u32 = 4096;

/// The number of turns without progress after which resetting is given up. A reset ends early when a signal is
/// pending, so a turn or two without progress are no fault.
const RESET_TURNS: u32 = 100;

/// The size in pages of the blocks that count as written after an overflow if one of their pages holds something.
const BLOCK_PAGES: u64 = 512;

/// The size of a virtual machine's dirty rings, which [`enable`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSize(u32);

/// Gives each vCPU that will be made a dirty ring of `entries` entries (`KVM_CAP_DIRTY_LOG_RING`): a power of two
/// from 4096 up to what KVM allows. A virtual machine with dirty rings has no dirty log.
///
/// # Errors
///
/// [`TrackError::RingSize`] for a number that KVM does not allow, and [`TrackError::Unavailable`] where KVM refuses,
/// as it does once a vCPU has been made.
pub fn enable(vm: &VmFd, entries: u32) -> Result<RingSize, TrackError> {
    let offered = |cap: u32| u32::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0);
    let (cap, bytes) = match offered(KVM_CAP_DIRTY_LOG_RING_ACQ_REL) {
        0 => (KVM_CAP_DIRTY_LOG_RING, offered(KVM_CAP_DIRTY_LOG_RING)),
        bytes => (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, bytes),
    };
    let limit = bytes / size_of::<Entry>() as u32;
    if !entries.is_power_of_two() || entries < MIN_ENTRIES || entries > limit {
        return Err(TrackError::RingSize { entries, limit });
    }
    let mut ring = kvm_enable_cap { cap, ..Default::default() };
    ring.args[0] = u64::from(entries) * size_of::<Entry>() as u64;
    vm.enable_cap(&ring).map_err(|error| TrackError::Unavailable {
        what: "KVM's dirty ring",
        source: error.into(),
        advice: "enable it before the first vCPU is made",
    })?;
    Ok(RingSize(entries))
}

/// Finds dirty pages by KVM's dirty rings.
pub struct RingTracker {
    /// The running throttle. It is dropped first, since it looks at the rings.
    throttle: Option<Throttle>,
    kick: Option<Kick>,
    handle: RingHandle,
    protected: ProtectedPages,
    started: bool,
}

/// What vCPU threads need of a [`RingTracker`]. Clones refer to the same tracker.
#[derive(Clone)]
pub struct RingHandle(Arc<Shared>);

struct Shared {
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
    slots: Vec<MemorySlot>,
    size: RingSize,
    rings: Mutex<Rings>,
    deadlines: Arc<VcpuDeadlines>,
}

/// The rings of all vCPUs. The lock around them also orders collecting, resetting and draining: a page may be
/// copied only after the reset that protects it again.
struct Rings {
    rings: Vec<VcpuRing>,
    /// The pages that were collected and not yet drained.
    pending: PageSet,
    /// Whether KVM appends to the rings.
    on: bool,
}

impl RingTracker {
    /// Returns a tracker for a virtual machine whose rings have this `size`, and whose memory was
    /// [registered](GuestRam::register) as `slots`.
    pub fn new(vm: Arc<VmFd>, ram: Arc<GuestRam>, slots: Vec<MemorySlot>, size: RingSize) -> Self {
        let pages = ram.pages();
        let rings = Mutex::new(Rings { rings: Vec::new(), pending: PageSet::new(pages), on: false });
        let deadlines = Arc::new(VcpuDeadlines::new());
        let handle = RingHandle(Arc::new(Shared { vm, ram, slots, size, rings, deadlines }));
        Self { throttle: None, kick: None, handle, protected: ProtectedPages::new(pages), started: false }
    }

    /// Maps the ring of a vCPU of this virtual machine. Every vCPU must be added, once, before it runs.
    ///
    /// # Errors
    ///
    /// The ring could not be mapped.
    pub fn add_vcpu(&mut self, vcpu: &VcpuFd) -> Result<(), TrackError> {
        let ring =
            VcpuRing::map(vcpu, self.handle.0.size).map_err(TrackError::kernel("map a vCPU's dirty ring"))?;
        self.handle.0.lock().rings.push(ring);
        self.handle.0.deadlines.add_vcpu();
        Ok(())
    }

    /// Declares that the VMM can keep vCPUs out of the guest, so that the guest can be throttled. `kick` makes a
    /// vCPU leave `KVM_RUN`, or not enter it, by the order of its [`add_vcpu`](Self::add_vcpu), counted from 0;
    /// the vCPU's thread then asks [`RingHandle::throttled_until`].
    pub fn enable_throttling(&mut self, kick: impl Fn(usize) + Send + Sync + 'static) {
        self.kick = Some(Arc::new(kick));
    }

    /// Returns what the vCPU threads need when their ring is full.
    pub fn handle(&self) -> RingHandle {
        self.handle.clone()
    }

    /// Switches tracking on or off, and drops what the rings hold: no page is tracked before or after.
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
    /// Collects all rings and lets KVM go on filling them; a vCPU thread calls it on [`EXIT_RING_FULL`]. The next
    /// harvest reports what was collected.
    ///
    /// # Errors
    ///
    /// KVM refused to reset the rings; count every page as written.
    pub fn collect(&self) -> Result<(), TrackError> {
        self.0.collect(&mut self.0.lock())
    }

    /// Returns until when a vCPU must stay out of the guest; `None` if it may enter. A vCPU thread calls it before
    /// each `KVM_RUN`, and again when that time has come. The vCPU may be paused meanwhile as ever.
    pub fn throttled_until(&self, vcpu: usize) -> Option<Instant> {
        self.0.deadlines.until(vcpu)
    }
}

impl DirtyTracker for RingTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::Ring
    }

    fn start(&mut self) -> Result<(), TrackError> {
        if !self.started {
            self.protected.clear();
            self.handle.0.ram.dirty_bitmap().clear();
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
        let shared = &self.handle.0;
        let mut new = self.protected.drain(shared.ram.dirty_bitmap(), into);
        let mut rings = shared.lock();
        shared.collect(&mut rings)?;
        new += self.protected.drain(&rings.pending, into);
        Ok(new)
    }

    fn throttle(&mut self, pages_per_second: u64) -> Result<ThrottleStats, TrackError> {
        if !self.started {
            return Err(TrackError::NotStarted);
        }
        let kick = self.kick.as_ref().ok_or(TrackError::ThrottleUnsupported)?;
        if let Some(throttle) = &self.throttle {
            throttle.set_rate(pages_per_second);
            return Ok(throttle.stats());
        }
        let shared = self.handle.0.clone();
        let count = move || shared.lock().rings.iter_mut().map(VcpuRing::count_published).collect();
        let throttle =
            Throttle::start(self.handle.0.deadlines.clone(), pages_per_second, kick.clone(), count)
                .map_err(TrackError::kernel("start the thread that throttles vCPUs"))?;
        Ok(self.throttle.insert(throttle).stats())
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        self.throttle = None;
        if self.started {
            self.switch(false)?;
            self.started = false;
            self.protected.clear();
        }
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Rings> {
        // A panic leaves nothing in here half done.
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Switches whether KVM appends to the rings. Switching that on protects all pages.
    fn append(&self, on: bool) -> Result<(), TrackError> {
        for slot in &self.slots {
            let flags = slot.flags | if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            self.ram.set_slot(&self.vm, slot, flags).map_err(TrackError::kernel(
                "switch the dirty ring of a memory slot (KVM_SET_USER_MEMORY_REGION)",
            ))?;
        }
        Ok(())
    }

    /// Moves the entries of all rings to the pending pages, and has KVM protect these again.
    fn collect(&self, rings: &mut Rings) -> Result<(), TrackError> {
        let Rings { rings, pending, on } = rings;
        let note = |slot, offset| {
            if let Some(page) = self.page(slot, offset) {
                pending.insert(page);
            }
        };
        // The rings go one at a time, as KVM returns only the sum of the entries that it has reset.
        for ring in rings.iter_mut() {
            ring.collect(note);
            if ring.has_overflowed() || !self.reset(ring)? {
                return self.recover(rings, pending, *on);
            }
        }
        Ok(())
    }

    /// Recovers from an overflow of one of the rings: entries were lost, so all pages are protected anew, and all
    /// that hold something count as written.
    fn recover(&self, rings: &mut [VcpuRing], pending: &PageSet, on: bool) -> Result<(), TrackError> {
        tracing::warn!(
            "a vCPU wrote on beyond the end of its dirty ring; all of the guest's pages count as written"
        );
        // KVM must append nothing while entries are handed back unseen.
        self.append(false)?;
        for ring in rings {
            ring.collect(|_, _| {});
            if ring.has_overflowed() {
                ring.hand_back_all();
            }
            if !self.reset(ring)? {
                return Err(TrackError::RingStuck { left: ring.unreset() });
            }
            ring.restart_count();
        }
        if on {
            self.append(true)?;
        }
        // The files are asked after all is protected: what appears later is appended again. Where they cannot tell
        // what holds data, every page may.
        let all = 0..self.ram.pages();
        let data = self.ram.data_blocks(all.clone(), BLOCK_PAGES).unwrap_or_else(|_| vec![all]);
        for pages in data {
            pending.insert_range(pages);
        }
        Ok(())
    }

    /// Has KVM reset what was collected of this ring. Returns false if KVM does not get to the end.
    fn reset(&self, ring: &mut VcpuRing) -> Result<bool, TrackError> {
        let mut idle_turns = 0;
        while ring.unreset() != 0 {
            match self.reset_rings()? {
                0 if idle_turns == RESET_TURNS => return Ok(false),
                0 => idle_turns += 1,
                done => {
                    ring.note_reset(done);
                    idle_turns = 0;
                }
            }
        }
        Ok(true)
    }

    /// Has KVM reset collected entries, and returns how many it has reset. It stops early when a signal is pending.
    fn reset_rings(&self) -> Result<u32, TrackError> {
        const RESET: u32 = opcode::none(KVMIO as u8, 0xc7);
        // SAFETY: `self.vm` keeps the descriptor open while it is borrowed.
        let vm = unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) };
        // SAFETY: KVM_RESET_DIRTY_RINGS takes no argument.
        match unsafe { ioctl(vm, ReturnsValue::<RESET>::new(std::ptr::null_mut())) } {
            Ok(done) => Ok(u32::try_from(done).unwrap_or(0)),
            Err(rustix::io::Errno::INTR) => Ok(0),
            Err(error) => Err(TrackError::kernel("reset the dirty rings (KVM_RESET_DIRTY_RINGS)")(error)),
        }
    }

    /// Returns the page at `offset` pages into KVM's slot. Slots of other address spaces (system management mode,
    /// in the upper half) show the same memory under the same numbers.
    fn page(&self, slot: u32, offset: u64) -> Option<u64> {
        let slot = self.slots.get((slot & 0xffff) as usize)?;
        (offset < slot.pages).then(|| slot.first_page + offset)
    }
}
