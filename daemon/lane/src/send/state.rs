//! What the lanes of one migration share at the source.

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

/// Most bytes in one frame of small pages,
const FRAME_BYTES: u64 = 1 << 20;
/// or so many times as many of pages that hold nothing: looking at these takes less than a frame does,
const ZEROS_BESIDE: u64 = 8;
/// and in post-copy,
const STREAM_FRAME_BYTES: u64 = 64 << 10;
/// where the next [`SMALL_FRAMES`] after a page that an access waited for are smaller still: a kernel
/// that does not preempt itself keeps a processor for as long as it takes to send, receive and place a
/// frame, and the thread that a vCPU waits for does not run there meanwhile.
const SMALL_FRAME_BYTES: u64 = 16 << 10;
/// As many as lanes send while a guest runs on to its next access of a missing page.
const SMALL_FRAMES: u32 = 8;
/// No page.
const NOWHERE: u64 = u64::MAX;

/// What the lanes of one migration share at the source.
pub struct SendState {
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    /// Pages to send.
    pub dirty: PageSet,
    /// Pages sent and not yet acknowledged, or lost with their lane and not yet
    /// [taken back](SendState::take_back); nobody claims them meanwhile.
    pub in_flight: PageSet,
    /// Set while the guest stands still: frames then carry a checksum.
    pub still: AtomicBool,
    /// The guest runs on the memory that is sent, until it is still.
    pub(crate) live: bool,
    /// Set where pages to send may be holes in memory: lanes then look for them before they read,
    /// since reading a hole takes memory for it, and send them as holes.
    pub sparse: AtomicBool,
    /// Lanes may compress what they send.
    pub compress: bool,
    /// Rung when a lane finds nothing to claim, has nothing in flight, or ends.
    pub(crate) bell: Bell,
    /// Where lanes go on: behind the page that an access waited for last; [`NOWHERE`] if there is none.
    pub(crate) nearest: AtomicU64,
    /// So many frames more are to be small.
    pub(crate) small_frames: AtomicU32,
    /// Nothing is claimed for the time being.
    pub(crate) held: AtomicBool,
    /// Locked while pages are claimed or added, where only whole pages of the guest's own size may be.
    pub(crate) whole: Option<Mutex<()>>,
    pub(crate) largest_frame: u64,
    /// Pages that hold nothing and take as much of a frame's room as one with contents.
    pub(crate) zeros_beside: u64,
    /// Most bytes in one frame now; less where little is left, so that all lanes get some of it.
    pub(crate) frame_bytes: AtomicU64,
    /// What nobody has claimed yet.
    pub(crate) left: Backlog,
    /// Claims that have begun: grows before a lane looks at `dirty`.
    pub(crate) claims: AtomicU64,
    /// Claims that are over: grows after the last change to `dirty` and `in_flight` that the
    /// claim, its frame's acknowledgement, or the frame's return brought about.
    pub(crate) settled: AtomicU64,
    /// The frames that each lost lane left unacknowledged, by the lane's number.
    pub(crate) orphans: Mutex<BTreeMap<u16, Vec<Vec<Run>>>>,
    /// The lanes, to be woken when there is work again.
    pub(crate) wakers: Wakers,
}

impl SendState {
    /// For lanes that send from `ram` while the guest runs there.
    pub fn new(ram: Arc<GuestRam>, bell: Bell) -> Self {
        Self { zeros_beside: ZEROS_BESIDE, ..Self::make(ram, bell, None, FRAME_BYTES) }
    }

    /// For lanes that send from the memory of a guest which stands still there, and runs at the
    /// destination: whole pages of their own size, since they are placed whole.
    pub fn of_still_guest(ram: Arc<GuestRam>, bell: Bell) -> Self {
        let huge = ram.regions().iter().any(|region| u64::from(region.page_bytes) != PAGE_SIZE);
        let outbound = Self::make(ram, bell, huge.then(Mutex::default), STREAM_FRAME_BYTES);
        outbound.still.store(true, Ordering::Release);
        Self { live: false, ..outbound }
    }

    pub(crate) fn make(ram: Arc<GuestRam>, bell: Bell, whole: Option<Mutex<()>>, largest_frame: u64) -> Self {
        Self {
            dirty: PageSet::new(ram.pages()),
            in_flight: PageSet::new(ram.pages()),
            still: AtomicBool::new(false),
            live: true,
            sparse: AtomicBool::new(false),
            compress: false,
            bell,
            nearest: AtomicU64::new(NOWHERE),
            small_frames: AtomicU32::new(0),
            held: AtomicBool::new(false),
            whole,
            largest_frame,
            zeros_beside: 1,
            frame_bytes: AtomicU64::new(largest_frame),
            left: Backlog::default(),
            claims: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            orphans: Mutex::default(),
            wakers: Wakers::default(),
            ram,
        }
    }

    /// Whether the guest has just been stopped. Device models may still write then while they come to rest, which
    /// must not come between a frame's sum and its bytes: those are better copied at once.
    pub(crate) fn comes_to_rest(&self) -> bool {
        self.live && self.still.load(Ordering::Acquire)
    }

    /// Wakes a lane that is about to begin.
    pub fn take_waker(&self) -> io::Result<Arc<Waker>> {
        self.wakers.take()
    }

    /// Tells the lanes that there are pages to claim, unless they are [held](Self::hold).
    pub fn publish(&self) {
        self.publish_ahead(0);
    }

    /// Tells the lanes that there are pages to claim, and that so many may follow soon: lanes make larger frames where
    /// much is to come.
    pub fn publish_ahead(&self, to_come: u64) {
        if self.is_held() {
            return;
        }
        let pages = self.dirty.count() + to_come;
        const SMALLEST: u64 = 64 << 10;
        let share = pages * PAGE_SIZE / (2 * self.wakers.len().max(1) as u64);
        self.frame_bytes.store(share.clamp(SMALLEST, self.largest_frame), Ordering::Relaxed);
        self.left.set(pages, self.wakers.bytes_per_second());
        self.wakers.wake();
    }

    /// Adds pages to send; whole ones, where the guest runs at the destination.
    pub fn add(&self, pages: Range<u64>) {
        let _whole = self.lock_whole();
        self.dirty.insert_range(pages);
    }

    /// An access waits for these pages: they are sent another way, and lanes go on behind them.
    pub(crate) fn on_wanted(&self, pages: Range<u64>) {
        self.nearest.store(pages.end, Ordering::Relaxed);
        self.small_frames.store(SMALL_FRAMES, Ordering::Relaxed);
        let _whole = self.lock_whole();
        self.dirty.remove_range(pages);
    }

    /// Whoever changes what is to be sent holds this, so that huge pages are claimed whole or not at all.
    pub(crate) fn lock_whole(&self) -> Option<MutexGuard<'_, ()>> {
        self.whole.as_ref().map(|whole| whole.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lanes claim nothing from now on: what is in flight comes to an end.
    pub fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    /// Whether they do.
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::SeqCst)
    }

    /// Whether all that was handed out has been acknowledged, whatever is left.
    pub fn is_settled(&self) -> bool {
        self.settled.load(Ordering::SeqCst) == self.claims.load(Ordering::SeqCst)
    }

    /// Most bytes in the next frame of small pages.
    pub(crate) fn room(&self) -> u64 {
        let room = self.frame_bytes.load(Ordering::Relaxed);
        let small = |left: u32| left.checked_sub(1);
        match self.small_frames.fetch_update(Ordering::Relaxed, Ordering::Relaxed, small) {
            Ok(_) => room.min(SMALL_FRAME_BYTES),
            Err(_) => room,
        }
    }

    /// Where a lane is to go on, once for each page that an access waited for.
    pub(crate) fn take_nearest(&self) -> Option<u64> {
        // Most often there is none, and then nothing is written that all lanes read.
        if self.nearest.load(Ordering::Relaxed) == NOWHERE {
            return None;
        }
        Some(self.nearest.swap(NOWHERE, Ordering::Relaxed)).filter(|page| *page != NOWHERE)
    }

    /// Whether all pages handed out so far have been acknowledged and none is left. Pages that
    /// the caller has put into `dirty` itself are seen, and so are those that other threads put
    /// there if the caller has waited for them.
    ///
    /// Looking at the sets alone would not do: pages move between them, and a set is looked
    /// through word by word. That as many claims were settled as had begun says that no lane had
    /// pages, nor moved any, at the moment between the two looks; that none has begun after the
    /// set was looked through says that the set stood still.
    pub fn all_acknowledged(&self) -> bool {
        let settled = self.settled.load(Ordering::SeqCst);
        let claims = self.claims.load(Ordering::SeqCst);
        settled == claims && self.dirty.is_empty() && self.claims.load(Ordering::SeqCst) == claims
    }

    /// Lost lanes that wait to be [taken back](Self::take_back), with pages that were not
    /// acknowledged or without.
    pub fn orphaned_lanes(&self) -> Vec<u16> {
        self.orphans().keys().copied().collect()
    }

    /// Makes dirty again what lost lane number `lane` left unacknowledged, for other lanes to take.
    ///
    /// Only once the destination has closed its end of that lane: until then bytes that have
    /// arrived there may be written to memory late, over newer ones that another lane brought.
    pub fn take_back(&self, lane: u16) {
        let Some(frames) = self.orphans().remove(&lane) else { return };
        let whole = self.lock_whole();
        for run in frames.iter().flatten() {
            self.dirty.insert_range(run.pages.clone());
            self.in_flight.remove_range(run.pages.clone());
        }
        drop(whole);
        self.settle(frames.len() as u64);
        self.publish();
    }

    /// Keeps the frames of a lane that has ended until they are taken back.
    pub(crate) fn orphan(&self, lane: u16, frames: impl Iterator<Item = Vec<Run>>) {
        self.orphans().entry(lane).or_default().extend(frames);
        (self.bell)();
    }

    /// So many claims are over: they found nothing, or their pages have been acknowledged or are
    /// dirty again.
    pub(crate) fn settle(&self, claims: u64) {
        self.settled.fetch_add(claims, Ordering::SeqCst);
    }

    pub(crate) fn orphans(&self) -> MutexGuard<'_, BTreeMap<u16, Vec<Vec<Run>>>> {
        // The map is whole whenever somebody may panic.
        self.orphans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
