//! Each tracker against real writers: what would be migrated must equal what was written.

mod external;
mod external_sync;
mod guest;
mod sparse;
mod vmm_process;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use memlane_lab::HugePages;
use memlane_protocol::{PAGE_SIZE, PageSet};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::ram::{Backing, GuestRam};
use guest::{Guest, Mode};

/// Two regions with a gap, the second beginning at a page number that fits no word.
const SMALL_PAGES: [(u64, u64); 2] = [(0, 0x10_1000), (16 << 20, 32 << 20)];
const HUGE_PAGES: [(u64, u64); 2] = [(0, 2 << 20), (16 << 20, 32 << 20)];
/// A page that only the VMM writes.
const VMM_PAGE: u64 = 200;

fn skipped(name: &str, reason: impl std::fmt::Display) {
    memlane_lab::say_skipped(name, &reason.to_string());
}

fn shared_set(pages: u64) -> PageSet<SharedWords> {
    let (words, _) = SharedWords::create(PageSet::words_needed(pages)).unwrap();
    PageSet::over(pages, words).unwrap()
}

/// The destination of a migration: pages as they were when they were last copied.
struct Replica {
    ram: Arc<GuestRam>,
    copy: Vec<u8>,
    dirty: PageSet<SharedWords>,
}

impl Replica {
    fn new(ram: &Arc<GuestRam>) -> Self {
        let copy = vec![0; (ram.pages() * PAGE_SIZE) as usize];
        Self { ram: Arc::clone(ram), copy, dirty: shared_set(ram.pages()) }
    }

    fn copy(&mut self, pages: Range<u64>) {
        for page in pages {
            let into = &mut self.copy[(page * PAGE_SIZE) as usize..][..PAGE_SIZE as usize];
            let address = GuestAddress(self.ram.address_of(page).unwrap());
            self.ram.memory().read_slice(into, address).unwrap();
        }
    }

    /// Harvests and copies what was written; returns how many pages that were.
    fn round(&mut self, tracker: &mut dyn DirtyTracker) -> u64 {
        let before = self.dirty.count();
        let new = tracker.harvest(&self.dirty).unwrap();
        assert_eq!(before + new, self.dirty.count());
        let round = PageSet::new(self.ram.pages());
        self.dirty.drain_into(0..self.ram.pages(), &round);
        for run in round.runs() {
            self.copy(run);
        }
        new
    }

    fn assert_equal(&self) {
        let mut page = vec![0; PAGE_SIZE as usize];
        for (number, copied) in (0..).zip(self.copy.chunks(PAGE_SIZE as usize)) {
            let address = GuestAddress(self.ram.address_of(number).unwrap());
            self.ram.memory().read_slice(&mut page, address).unwrap();
            assert!(page == copied, "page {number} was lost");
        }
    }
}

/// Migrates memory that `writers` write, twice, and compares.
fn converge(
    tracker: &mut dyn DirtyTracker,
    ram: &Arc<GuestRam>,
    writers: &(dyn Fn(&AtomicBool, &AtomicU64) + Sync),
) {
    for leg in 0..2 {
        let (stop, turns) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut replica = Replica::new(ram);
        std::thread::scope(|scope| {
            scope.spawn(|| writers(&stop, &turns));
            scope.spawn(|| {
                let mut count = leg << 32;
                while !stop.load(Ordering::Relaxed) {
                    count += 1u64;
                    ram.memory()
                        .write_obj(count, GuestAddress(VMM_PAGE * PAGE_SIZE + count % 500 * 8))
                        .unwrap();
                    std::thread::yield_now();
                }
            });
            let finished = Finish(&stop);
            assert!(matches!(tracker.harvest(&replica.dirty), Err(TrackError::NotStarted)));
            tracker.start().unwrap();
            tracker.start().unwrap();
            let half = ram.pages() / 2;
            for first in (0..half).step_by(100) {
                tracker.write_protect(first..half.min(first + 100)).unwrap();
                replica.copy(first..half.min(first + 100));
            }
            progress(&turns);
            replica.round(tracker);
            let unit = u64::from(ram.regions()[0].page_bytes) / PAGE_SIZE;
            assert!(tracker.harvest(&replica.dirty).is_ok());
            assert_eq!(
                replica.dirty.next_run(half.next_multiple_of(unit), 1),
                None,
                "not write-protected, yet reported"
            );
            tracker.write_protect(half - 300..ram.pages()).unwrap();
            replica.copy(half..ram.pages());
            assert_eq!(tracker.write_protected_pages(), ram.pages());
            for _ in 0..8 {
                progress(&turns);
                replica.round(tracker);
            }
            drop(finished);
        });
        // All of this is write-protected already: what was written since must not be forgotten.
        tracker.write_protect(0..ram.pages()).unwrap();
        replica.round(tracker);
        replica.assert_equal();
        assert_eq!(replica.round(tracker), 0, "reported again, yet not written");
        assert!(matches!(tracker.write_protect(0..ram.pages() + 1), Err(TrackError::Range { .. })));
        tracker.stop().unwrap();
        tracker.stop().unwrap();
        assert_eq!(tracker.write_protected_pages(), 0);
    }
}

/// Ends the writers, on a failed assertion too.
struct Finish<'a>(&'a AtomicBool);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits until the writers got on.
fn progress(turns: &AtomicU64) {
    let before = turns.load(Ordering::Relaxed);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while turns.load(Ordering::Relaxed) < before + 20 {
        assert!(std::time::Instant::now() < deadline, "the writers stand still");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Writes random pages of both regions from two threads, past vm-memory as a guest would.
fn write_from_threads(ram: &GuestRam, stop: &AtomicBool, turns: &AtomicU64) {
    std::thread::scope(|scope| {
        for seed in 1..3u64 {
            scope.spawn(move || {
                let mut random = seed;
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..100 {
                        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let page = (random >> 33) % ram.pages();
                        let slice = ram.slices(page..page + 1).next().unwrap();
                        // SAFETY: within a mapping that outlives this thread; `seed` keeps the
                        // threads' words apart, and atomics allow other readers.
                        unsafe { AtomicU64::from_ptr(slice.ptr.cast::<u64>().add(seed as usize)) }
                            .store(random, Ordering::Relaxed);
                    }
                    turns.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
}

fn pagemap(name: &str, ram: &Arc<GuestRam>) -> Option<PagemapTracker> {
    PagemapTracker::new(Arc::clone(ram)).map_err(|error| skipped(name, error)).ok()
}

fn huge_ram(name: &str) -> Option<(HugePages, Arc<GuestRam>)> {
    let pages = HugePages::reserve(17).map_err(|error| skipped(name, error)).ok()?;
    let ram =
        GuestRam::create(&HUGE_PAGES, &Backing::HugeMemfd).map_err(|error| skipped(name, error)).ok()?;
    Some((pages, Arc::new(ram)))
}

#[test]
fn pagemap_loses_no_page_that_threads_write() {
    let ram = Arc::new(GuestRam::create(&SMALL_PAGES, &Backing::Memfd).unwrap());
    let Some(mut tracker) = pagemap("pagemap under threads", &ram) else { return };
    converge(&mut tracker, &ram, &|stop, turns| write_from_threads(&ram, stop, turns));
}

#[test]
fn pagemap_loses_no_huge_page_that_threads_write() {
    let name = "pagemap under threads, 2 MiB pages";
    let Some((_pages, ram)) = huge_ram(name) else { return };
    let Some(mut tracker) = pagemap(name, &ram) else { return };
    converge(&mut tracker, &ram, &|stop, turns| write_from_threads(&ram, stop, turns));
}

#[test]
fn pagemap_reports_what_was_written_and_nothing_else() {
    let ram = Arc::new(GuestRam::create(&SMALL_PAGES, &Backing::Memfd).unwrap());
    let Some(mut tracker) = pagemap("pagemap exactly", &ram) else { return };
    let write = |page: u64| {
        let slice = ram.slices(page..page + 1).next().unwrap();
        // SAFETY: within a mapping of this test, which nobody else writes.
        unsafe { slice.ptr.write_volatile(1) };
    };
    let pages = ram.pages();
    write(3);
    tracker.start().unwrap();
    write(4);
    tracker.write_protect(0..pages).unwrap();
    // Pages that hold something, and pages that have never been touched.
    for page in [3, 256, 257, 258, 1000, pages - 1] {
        write(page);
    }
    // Scattered beyond one scan's room.
    for page in (1100..2290).step_by(2) {
        write(page);
    }
    let dirty = shared_set(pages);
    let new = tracker.harvest(&dirty).unwrap();
    let found: Vec<u64> = dirty.runs().flatten().collect();
    let expected: Vec<u64> =
        [3, 256, 257, 258, 1000].into_iter().chain((1100..2290).step_by(2)).chain([pages - 1]).collect();
    assert_eq!((found, new), (expected.clone(), expected.len() as u64));
    // Emptied from outside and written anew.
    dirty.clear();
    ram.punch(1000..1001).unwrap();
    write(1000);
    tracker.harvest(&dirty).unwrap();
    assert!(dirty.contains(1000));
}

#[test]
fn pagemap_protects_whole_huge_pages_once() {
    let name = "pagemap, 2 MiB pages protected in parts";
    let Some((_pages, ram)) = huge_ram(name) else { return };
    let Some(mut tracker) = pagemap(name, &ram) else { return };
    let dirty = shared_set(ram.pages());
    tracker.start().unwrap();
    tracker.write_protect(512..600).unwrap();
    assert_eq!(tracker.write_protected_pages(), 512);
    let slice = ram.slices(530..531).next().unwrap();
    // SAFETY: within a mapping of this test, which nobody else writes.
    unsafe { slice.ptr.write_volatile(1) };
    // The rest of the same huge page: the write before it must not be forgotten.
    tracker.write_protect(600..1500).unwrap();
    assert_eq!(tracker.harvest(&dirty).unwrap(), 512);
    assert_eq!((dirty.next_run(0, 512), dirty.count()), (Some(512..1024), 512));
    assert_eq!(tracker.harvest(&dirty).unwrap(), 0);
}

fn log_tracker(guest: &Guest) -> LogTracker {
    LogTracker::new(Arc::clone(&guest.vm), Arc::clone(&guest.ram), guest.slots.clone()).unwrap()
}

#[test]
fn log_loses_no_page_that_a_guest_writes() {
    let Some(mut guest) = Guest::new("dirty log", &SMALL_PAGES, &Backing::Memfd) else { return };
    let mut tracker = log_tracker(&guest);
    guest.add_vcpus(Mode::Long, 2, |_| {});
    converge(&mut tracker, &guest.ram, &|stop, turns| guest.run(stop, turns, &|| panic!("no ring")));
}

#[test]
fn log_loses_no_page_of_huge_pages() {
    let name = "dirty log, 2 MiB pages";
    let Some((_pages, ram)) = huge_ram(name) else { return };
    let Some(mut guest) = Guest::over(name, ram) else { return };
    let mut tracker = log_tracker(&guest);
    guest.add_vcpus(Mode::Long, 1, |_| {});
    converge(&mut tracker, &guest.ram, &|stop, turns| guest.run(stop, turns, &|| panic!("no ring")));
}

fn ring_tracker(name: &str, guest: &Guest, entries: u32) -> Option<RingTracker> {
    let size = ring::enable(&guest.vm, entries).map_err(|error| skipped(name, error)).ok()?;
    Some(RingTracker::new(Arc::clone(&guest.vm), Arc::clone(&guest.ram), guest.slots.clone(), size))
}

#[test]
fn ring_loses_no_page_that_a_guest_writes() {
    // A ring that the guest fills, and one that it does not.
    for entries in [4096, 65536] {
        let Some(mut guest) = Guest::new("dirty ring", &SMALL_PAGES, &Backing::Memfd) else { return };
        let Some(mut tracker) = ring_tracker("dirty ring", &guest, entries) else { return };
        guest.add_vcpus(Mode::Long, 2, |vcpu| tracker.add_vcpu(vcpu).unwrap());
        let (handle, full) = (tracker.handle(), AtomicU64::new(0));
        converge(&mut tracker, &guest.ram, &|stop, turns| {
            guest.run(stop, turns, &|| {
                full.fetch_add(1, Ordering::Relaxed);
                handle.collect().unwrap();
            });
        });
        eprintln!("rings of {entries} entries were full {} times", full.into_inner());
    }
}

#[test]
fn ring_loses_no_page_of_huge_pages() {
    let name = "dirty ring, 2 MiB pages";
    let Some((_pages, ram)) = huge_ram(name) else { return };
    let Some(mut guest) = Guest::over(name, ram) else { return };
    let Some(mut tracker) = ring_tracker(name, &guest, 4096) else { return };
    guest.add_vcpus(Mode::Long, 1, |vcpu| tracker.add_vcpu(vcpu).unwrap());
    let handle = tracker.handle();
    converge(&mut tracker, &guest.ram, &|stop, turns| {
        guest.run(stop, turns, &|| {
            handle.collect().unwrap();
        });
    });
}

/// Where protected mode is emulated, writes run past the end of the ring.
#[test]
fn ring_loses_no_page_when_it_overflows() {
    let Some(mut guest) = Guest::new("overflowing dirty ring", &SMALL_PAGES, &Backing::Memfd) else { return };
    let Some(mut tracker) = ring_tracker("overflowing dirty ring", &guest, 4096) else { return };
    guest.add_vcpus(Mode::Protected, 2, |vcpu| tracker.add_vcpu(vcpu).unwrap());
    let handle = tracker.handle();
    converge(&mut tracker, &guest.ram, &|stop, turns| {
        guest.run(stop, turns, &|| handle.collect().unwrap());
    });
}

#[test]
fn rings_of_impossible_sizes_are_refused() {
    let Some(guest) = Guest::new("sizes of dirty rings", &SMALL_PAGES, &Backing::Memfd) else { return };
    for entries in [0, 1024, 5000, 1 << 31] {
        assert!(matches!(ring::enable(&guest.vm, entries), Err(TrackError::RingSize { .. })), "{entries}");
    }
}

#[test]
fn pagemap_loses_no_page_that_a_guest_writes() {
    let name = "pagemap under KVM";
    let Some(mut guest) = Guest::new(name, &SMALL_PAGES, &Backing::Memfd) else { return };
    let Some(mut tracker) = pagemap(name, &guest.ram) else { return };
    guest.add_vcpus(Mode::Long, 2, |_| {});
    converge(&mut tracker, &guest.ram, &|stop, turns| guest.run(stop, turns, &|| panic!("no ring")));
}

#[test]
fn pagemap_loses_no_huge_page_that_a_guest_writes() {
    let name = "pagemap under KVM, 2 MiB pages";
    let Some((_pages, ram)) = huge_ram(name) else { return };
    let Some(mut guest) = Guest::over(name, ram) else { return };
    let Some(mut tracker) = pagemap(name, &guest.ram) else { return };
    guest.add_vcpus(Mode::Long, 1, |_| {});
    converge(&mut tracker, &guest.ram, &|stop, turns| guest.run(stop, turns, &|| panic!("no ring")));
}
