//! The state that the lanes of one migration share at the source.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memlane_kvm::ram::GuestRam;
use memlane_protocol::wire::frame::Run;
use memlane_protocol::{PAGE_SIZE, PageSet};

use crate::Bell;
use crate::send::backlog::Backlog;
use crate::send::wakers::{Waker, Wakers};

/// A frame of small pages has at most this many bytes in pre-copy.
const FRAME_BYTES: u64 = 1 << 20;
/// A frame may hold this many pages of zeros in place of one page with contents, because to read a page of zeros takes
/// less time than to send one.
const ZEROS_BESIDE: u64 = 8;
/// A frame of small pages has at most this many bytes in post-copy.
const STREAM_FRAME_BYTES: u64 = 64 << 10;
/// The next [`SMALL_FRAMES`] frames after a page request have at most this many bytes. A kernel that does not preempt
/// itself keeps a processor for as long as it takes to send, receive and place a frame, and the thread that a vCPU
/// waits for does not run there meanwhile.
const SMALL_FRAME_BYTES: u64 = 16 << 10;
/// Lanes send about this many frames while a guest runs on to its next access of a missing page.
const SMALL_FRAMES: u32 = 8;
/// This value of `fault_cursor` stands for no page.
const NO_PAGE: u64 = u64::MAX;

/// The state that the lanes of one migration share at the source.
pub struct SendState {
    /// The lanes send this memory of the guest.
    pub ram: Arc<GuestRam>,
    /// These pages are to be sent, and no lane has claimed them yet.
    pub dirty: PageSet,
    /// These pages are sent and not yet acknowledged, or were lost with their lane and are not yet
    /// [taken back](SendState::take_back). No lane claims them meanwhile.
    pub in_flight: PageSet,
    /// The guest is paused. Frames carry a checksum while this is set.
    pub paused: AtomicBool,
    /// The guest runs on the memory that is sent, until it is paused.
    pub(crate) live: bool,
    /// Some of the pages to send may be holes in memory. Lanes then look for holes before they read, because to read a
    /// hole allocates memory for it, and send them as holes.
    pub sparse: AtomicBool,
    /// Lanes may compress what they send.
    pub compress: bool,
    /// A lane rings this bell when it finds nothing to claim, has nothing in flight, or ends.
    pub(crate) bell: Bell,
    /// The next lane that claims pages continues here, behind the page that was requested last; [`NO_PAGE`] if no page
    /// was requested since the last claim.
    pub(crate) fault_cursor: AtomicU64,
    /// The next frames, so many of them, are limited to [`SMALL_FRAME_BYTES`].
    pub(crate) small_frames: AtomicU32,
    /// Lanes claim nothing while this is set.
    pub(crate) quiesced: AtomicBool,
    /// This lock is held while pages are claimed or added, if the guest has huge pages that must be sent whole.
    pub(crate) whole: Option<Mutex<()>>,
    /// A frame of small pages never has more than this many bytes.
    pub(crate) largest_frame: u64,
    /// This many pages of zeros take as much of a frame's room as one page with contents.
    pub(crate) zeros_beside: u64,
    /// A frame may have this many bytes now. It is less where few pages are left, so that all lanes get some of them.
    pub(crate) frame_bytes: AtomicU64,
    /// This estimates how much is left to claim.
    pub(crate) backlog: Backlog,
    /// This many claims have begun. It grows before a lane looks at `dirty`.
    pub(crate) claims: AtomicU64,
    /// This many claims are over. It grows after the last change to `dirty` and `in_flight` that a claim, the
    /// acknowledgement of its frame, or the return of its frame makes.
    pub(crate) settled: AtomicU64,
    /// Each lost lane, by its number, left these frames unacknowledged.
    pub(crate) orphans: Mutex<BTreeMap<u16, Vec<Vec<Run>>>>,
    /// These wake the lanes when there is work again.
    pub(crate) wakers: Wakers,
}

impl SendState {
    /// Makes the state for lanes that send from `ram` while the guest runs there.
    pub fn new(ram: Arc<GuestRam>, bell: Bell) -> Self {
        Self { zeros_beside: ZEROS_BESIDE, ..Self::make(ram, bell, None, FRAME_BYTES) }
    }

    /// Makes the state for lanes that send from the memory of a guest that is paused here and runs at the destination.
    /// Huge pages are sent whole, because the destination places them whole.
    pub fn of_paused_guest(ram: Arc<GuestRam>, bell: Bell) -> Self {
        let huge = ram.regions().iter().any(|region| u64::from(region.page_bytes) != PAGE_SIZE);
        let send_state = Self::make(ram, bell, huge.then(Mutex::default), STREAM_FRAME_BYTES);
        send_state.paused.store(true, Ordering::Release);
        Self { live: false, ..send_state }
    }

    pub(crate) fn make(ram: Arc<GuestRam>, bell: Bell, whole: Option<Mutex<()>>, largest_frame: u64) -> Self {
        Self {
            dirty: PageSet::new(ram.pages()),
            in_flight: PageSet::new(ram.pages()),
            paused: AtomicBool::new(false),
            live: true,
            sparse: AtomicBool::new(false),
            compress: false,
            bell,
            fault_cursor: AtomicU64::new(NO_PAGE),
            small_frames: AtomicU32::new(0),
            quiesced: AtomicBool::new(false),
            whole,
            largest_frame,
            zeros_beside: 1,
            frame_bytes: AtomicU64::new(largest_frame),
            backlog: Backlog::default(),
            claims: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            orphans: Mutex::default(),
            wakers: Wakers::default(),
            ram,
        }
    }

    /// Returns whether the guest has just been paused, so that device models may still finish writes to its memory. Such
    /// a write must not come between a frame's checksum and its bytes, so the frame is better copied at once.
    pub(crate) fn devices_may_write(&self) -> bool {
        self.live && self.paused.load(Ordering::Acquire)
    }

    /// Makes the waker of a lane that is about to begin.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses an eventfd.
    pub fn take_waker(&self) -> io::Result<Arc<Waker>> {
        self.wakers.take()
    }

    /// Tells the lanes that there are pages to claim, unless the lanes are [quiesced](Self::quiesce).
    pub fn publish(&self) {
        self.publish_ahead(0);
    }

    /// Tells the lanes that there are pages to claim, and that about `to_come` pages will follow soon. Lanes make larger
    /// frames if more is to come.
    pub fn publish_ahead(&self, to_come: u64) {
        if self.is_quiesced() {
            return;
        }
        let pages = self.dirty.count() + to_come;
        const SMALLEST: u64 = 64 << 10;
        let share = pages * PAGE_SIZE / (2 * self.wakers.len().max(1) as u64);
        self.frame_bytes.store(share.clamp(SMALLEST, self.largest_frame), Ordering::Relaxed);
        self.backlog.set(pages, self.wakers.bytes_per_second());
        self.wakers.wake();
    }

    /// Adds pages to send. If the guest runs at the destination, they must be whole pages of the guest's own size.
    pub fn add(&self, pages: Range<u64>) {
        let _whole = self.lock_huge_pages();
        self.dirty.insert_range(pages);
    }

    /// Removes pages that the destination has requested, because the page server sends them. Lanes go on behind them.
    pub(crate) fn on_page_request(&self, pages: Range<u64>) {
        self.fault_cursor.store(pages.end, Ordering::Relaxed);
        self.small_frames.store(SMALL_FRAMES, Ordering::Relaxed);
        let _whole = self.lock_huge_pages();
        self.dirty.remove_range(pages);
    }

    /// Takes the lock that every change to `dirty` needs if the guest has huge pages, so that each of them is claimed
    /// whole or not at all.
    pub(crate) fn lock_huge_pages(&self) -> Option<MutexGuard<'_, ()>> {
        self.whole.as_ref().map(|whole| whole.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lets lanes claim nothing from now on, so that what is in flight comes to an end: see
    /// [`is_settled`](Self::is_settled).
    pub fn quiesce(&self) {
        self.quiesced.store(true, Ordering::SeqCst);
    }

    /// Returns whether lanes claim nothing because of [`quiesce`](Self::quiesce).
    pub fn is_quiesced(&self) -> bool {
        self.quiesced.load(Ordering::SeqCst)
    }

    /// Returns whether all pages that lanes claimed are acknowledged or taken back. Pages may be left to claim.
    pub fn is_settled(&self) -> bool {
        self.settled.load(Ordering::SeqCst) == self.claims.load(Ordering::SeqCst)
    }

    /// Returns how many bytes the next frame of small pages may have.
    pub(crate) fn room(&self) -> u64 {
        let room = self.frame_bytes.load(Ordering::Relaxed);
        let small = |left: u32| left.checked_sub(1);
        match self.small_frames.fetch_update(Ordering::Relaxed, Ordering::Relaxed, small) {
            Ok(_) => room.min(SMALL_FRAME_BYTES),
            Err(_) => room,
        }
    }

    /// Returns where a lane is to go on after a page request, once for each request.
    pub(crate) fn take_fault_cursor(&self) -> Option<u64> {
        // Most often there was no request, and then nothing is written that all lanes read.
        if self.fault_cursor.load(Ordering::Relaxed) == NO_PAGE {
            return None;
        }
        Some(self.fault_cursor.swap(NO_PAGE, Ordering::Relaxed)).filter(|page| *page != NO_PAGE)
    }

    /// Returns whether all pages that lanes claimed are acknowledged and no page is left to claim. The result covers the
    /// pages that the caller put into `dirty` itself, and those that other threads put there if the caller has waited for
    /// these threads.
    ///
    /// The sets alone are not enough to tell: pages move between them, and a set is read word by word. If as many claims
    /// are settled as have begun, no lane had pages or moved any between the two reads. If no claim has begun after the
    /// set was read, the set did not change while it was read.
    pub fn all_acknowledged(&self) -> bool {
        let settled = self.settled.load(Ordering::SeqCst);
        let claims = self.claims.load(Ordering::SeqCst);
        settled == claims && self.dirty.is_empty() && self.claims.load(Ordering::SeqCst) == claims
    }

    /// Returns the numbers of the lost lanes that wait to be [taken back](Self::take_back), whether or not they left
    /// pages unacknowledged.
    pub fn orphaned_lanes(&self) -> Vec<u16> {
        self.orphans().keys().copied().collect()
    }

    /// Makes the pages dirty again that the lost lane number `lane` left unacknowledged, so that other lanes take them.
    ///
    /// The caller must know that the destination has closed its end of that lane: until then the destination may write
    /// bytes that have arrived there to memory late, over newer ones that another lane brought.
    pub fn take_back(&self, lane: u16) {
        let Some(frames) = self.orphans().remove(&lane) else { return };
        let whole = self.lock_huge_pages();
        for run in frames.iter().flatten() {
            self.dirty.insert_range(run.pages.clone());
            self.in_flight.remove_range(run.pages.clone());
        }
        drop(whole);
        self.settle(frames.len() as u64);
        self.publish();
    }

    /// Keeps the unacknowledged frames of a lane that has ended until they are taken back.
    pub(crate) fn orphan(&self, lane: u16, frames: impl Iterator<Item = Vec<Run>>) {
        self.orphans().entry(lane).or_default().extend(frames);
        (self.bell)();
    }

    /// Notes that so many claims are over: they found nothing, or their pages are acknowledged or dirty again.
    pub(crate) fn settle(&self, claims: u64) {
        self.settled.fetch_add(claims, Ordering::SeqCst);
    }

    pub(crate) fn orphans(&self) -> MutexGuard<'_, BTreeMap<u16, Vec<Vec<Run>>>> {
        // No code panics while the map is half changed.
        self.orphans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
