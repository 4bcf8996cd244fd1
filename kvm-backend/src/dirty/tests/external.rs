//! [`ExternalTracker`] against a real process: what would be migrated must equal what is there.

use std::time::{Duration, Instant};

use super::vmm_process::{Act, Random, VmmProcess};
use super::*;

/// Two regions, which begin within a word of any bitmap, and the second of which has whole page tables.
pub(super) const LAYOUT: [(u64, u64); 2] = [(0, 0x10_1000), (16 << 20, 8 << 20)];

pub(super) fn file_ram(layout: &[(u64, u64)]) -> Arc<GuestRam> {
    Arc::new(GuestRam::create(layout, &Backing::File("/dev/shm".into())).unwrap())
}

/// Starts another process over `ram`, and tracks it.
pub(super) fn track(name: &str, ram: &Arc<GuestRam>) -> Option<(VmmProcess, ExternalTracker)> {
    if let Err(error) = crate::userfault::open() {
        skipped(name, error);
        return None;
    }
    let other = VmmProcess::start(ram);
    let tracker = other.track(ram).unwrap();
    Some((other, tracker))
}

/// The destination of a migration: the first word of each page, as it was when it was last copied.
pub(super) struct Mirror {
    ram: Arc<GuestRam>,
    words: Vec<u64>,
    /// Pages are looked up before they are read, so that holes stay holes.
    sparse: bool,
}

impl Mirror {
    pub(super) fn new(ram: &Arc<GuestRam>, sparse: bool) -> Self {
        Self { ram: Arc::clone(ram), words: vec![0; ram.pages() as usize], sparse }
    }

    /// What is in each page.
    fn look(ram: &GuestRam, pages: Range<u64>, sparse: bool, mut tell: impl FnMut(u64, u64)) {
        let data =
            if sparse { ram.data_extents_uncached(pages.clone()).unwrap() } else { vec![pages.clone()] };
        for page in pages {
            let word = data.iter().any(|extent| extent.contains(&page)).then(|| {
                let slice = ram.slices(page..page + 1).next().unwrap();
                // SAFETY: mapped as long as `ram` lives; atomics allow other writers.
                unsafe { AtomicU64::from_ptr(slice.ptr.cast()) }.load(Ordering::Relaxed)
            });
            tell(page, word.unwrap_or(0));
        }
    }

    fn copy(&mut self, pages: Range<u64>) {
        let (ram, sparse) = (Arc::clone(&self.ram), self.sparse);
        Self::look(&ram, pages, sparse, |page, word| self.words[page as usize] = word);
    }

    pub(super) fn write_protect(&mut self, tracker: &mut ExternalTracker, pages: Range<u64>) {
        for run in tracker.write_protect(pages).unwrap() {
            self.copy(run);
        }
    }

    /// Harvests and copies; returns what was reported.
    pub(super) fn round(&mut self, tracker: &mut ExternalTracker) -> (Vec<u64>, Harvest) {
        let dirty = PageSet::new(self.ram.pages());
        let harvest = tracker.harvest(&dirty).unwrap();
        assert_eq!(harvest.new, dirty.count());
        dirty.runs().for_each(|run| self.copy(run));
        (dirty.runs().flatten().collect(), harvest)
    }

    pub(super) fn assert_equal(&self, when: &str) {
        Self::look(&self.ram, 0..self.ram.pages(), true, |page, word| {
            assert_eq!(self.words[page as usize], word, "page {page} was lost {when}");
        });
    }
}

#[test]
fn tells_what_was_written_read_and_emptied() {
    let name = "tracking another process exactly";
    let ram = file_ram(&LAYOUT);
    let Some((other, mut tracker)) = track(name, &ram) else { return };
    let mut mirror = Mirror::new(&ram, true);
    other.act(Act::Write(7), 3..10);
    other.act(Act::Write(7), 600..1200);
    let protected = tracker.write_protect(0..ram.pages()).unwrap();
    assert_eq!(protected, [3..10, 600..1200]);
    protected.into_iter().for_each(|run| mirror.copy(run));
    assert_eq!(tracker.write_protect(0..ram.pages()).unwrap(), []);
    let mut expect = |runs: &[(u64, u64)], holes| {
        let expected: Vec<u64> = runs.iter().flat_map(|&(first, end)| first..end).collect();
        let new = expected.len() as u64;
        assert_eq!(mirror.round(&mut tracker), (expected, Harvest { new, holes }));
    };
    expect(&[], false);
    // Written again, written for the first time, read for the first time.
    other.act(Act::Write(8), 4..5);
    other.act(Act::Write(8), 256..258);
    other.act(Act::Read, 2000..2001);
    other.act(Act::Read, 3..10);
    expect(&[(4, 5), (256, 258), (2000, 2001)], false);
    // Emptied while protected, while written, and both ways; holes of old cost nothing.
    other.act(Act::Punch, 5..6);
    other.act(Act::Write(9), 700..701);
    other.act(Act::Remove, 700..702);
    other.act(Act::Punch, 1500..1600);
    other.act(Act::Write(9), 1700..1701);
    other.act(Act::Punch, 1700..1701);
    // After that, zeros that were reported as written are reported once more.
    expect(&[(5, 6), (700, 702), (2000, 2001)], true);
    expect(&[], false);
    // Emptied while protected, and read: there again, protected, and zero.
    other.act(Act::Punch, 800..810);
    other.act(Act::Read, 804..805);
    other.act(Act::Punch, 820..830);
    other.act(Act::Read, 824..825);
    other.act(Act::Drop, 824..825);
    expect(&[(800, 810), (820, 830)], true);
    expect(&[], false);
    // A hole that was reported is read, then written, then emptied, with and without a harvest between.
    other.act(Act::Read, 5..6);
    expect(&[], false);
    other.act(Act::Write(1), 5..6);
    expect(&[(5, 6)], false);
    other.act(Act::Punch, 5..6);
    expect(&[(5, 6)], true);
    other.act(Act::Write(1), 5..6);
    other.act(Act::Punch, 5..6);
    expect(&[(5, 6)], true);
    // Dropped from the page table: known to be clean, or not known any more.
    other.act(Act::Drop, 601..603);
    expect(&[], false);
    other.act(Act::Write(2), 601..602);
    other.act(Act::Drop, 600..700);
    expect(&[(601, 602)], false);
    other.act(Act::Write(3), 610..620);
    other.act(Act::PageOut, 600..700);
    expect(&[(610, 620)], false);
    // Whole page tables with it.
    other.act(Act::Write(4), 257..2305);
    expect(&[(257, 2305)], false);
    other.act(Act::Write(5), 257..2305);
    other.act(Act::Drop, 257..2305);
    expect(&[(257, 2305)], false);
    expect(&[], false);
    mirror.assert_equal("at last");
}

#[test]
fn loses_no_page_in_scripts_of_all_kinds() {
    let name = "tracking another process by scripts";
    for (seed, sparse, backing) in [
        (1, true, Backing::File("/dev/shm".into())),
        (2, true, Backing::Memfd),
        (3, false, Backing::File("/dev/shm".into())),
    ] {
        let ram = Arc::new(GuestRam::create(&LAYOUT, &backing).unwrap());
        let Some((other, mut tracker)) = track(name, &ram) else { return };
        let mut mirror = Mirror::new(&ram, sparse);
        let mut random = Random(seed);
        for page in (0..ram.pages()).step_by(3) {
            other.act(Act::Write(page + 1), page..page + 1);
        }
        for first in (0..ram.pages()).step_by(100) {
            mirror.write_protect(&mut tracker, first..ram.pages().min(first + 100));
        }
        let touched = PageSet::new(ram.pages());
        for step in 0..1500u64 {
            let first = random.below(ram.pages());
            let pages = first..(first + 1 + random.below(40)).min(ram.pages());
            let acts = [Act::Write(step + 1), Act::Read, Act::Punch, Act::Remove, Act::Drop, Act::PageOut];
            let act = acts[random.below(acts.len() as u64) as usize];
            other.act(act, pages.clone());
            touched.insert_range(pages);
            if random.below(10) == 0 {
                let (found, _) = mirror.round(&mut tracker);
                mirror.assert_equal(&format!("by step {step} of script {seed}"));
                // Zeros may be reported once more, and holes that were read have become data.
                let news = |page: &u64| touched.contains(*page) || mirror.words[*page as usize] == 0;
                assert!(found.iter().all(news), "step {step} of script {seed} reports what was not touched");
                touched.clear();
            }
        }
    }
}

/// Copies rounds while `other` riots, and compares when it has stopped.
pub(super) fn converge(
    other: &VmmProcess,
    riot: Act,
    tracker: &mut ExternalTracker,
    ram: &Arc<GuestRam>,
    sparse: bool,
) {
    let mut mirror = Mirror::new(ram, sparse);
    other.act(riot, 0..0);
    for first in (0..ram.pages()).step_by(512) {
        mirror.write_protect(tracker, first..ram.pages().min(first + 512));
    }
    let mut busy_rounds = 0;
    while busy_rounds < 30 {
        busy_rounds += u64::from(!mirror.round(tracker).0.is_empty());
    }
    other.act(Act::Halt, 0..0);
    mirror.round(tracker);
    mirror.assert_equal("in the riot");
    let mut quiet = || mirror.round(tracker).0;
    // Entries that were dropped in the middle of a harvest are reported once more.
    quiet();
    assert!(quiet().is_empty());
}

#[test]
fn loses_no_page_while_all_happens_at_once() {
    let name = "tracking another process in a riot";
    for (backing, sparse) in [
        (Backing::File("/dev/shm".into()), true),
        (Backing::Memfd, true),
        (Backing::File("/dev/shm".into()), false),
    ] {
        let ram = Arc::new(GuestRam::create(&LAYOUT, &backing).unwrap());
        let Some((other, mut tracker)) = track(name, &ram) else { return };
        converge(&other, Act::Riot, &mut tracker, &ram, sparse);
        // Once more, with descriptors of their own: what was protected is not any more.
        tracker.stop();
        assert!(matches!(tracker.harvest(&PageSet::new(ram.pages())), Err(TrackError::NotStarted)));
        let mut again = other.track(&ram).unwrap();
        converge(&other, Act::Riot, &mut again, &ram, sparse);
        drop(again);
        other.track(&ram).unwrap();
    }
}

#[test]
fn holes_get_no_page_tables() {
    let name = "tracking a sparse process";
    let ram = file_ram(&[(0, 3 << 30), (4 << 30, 61 << 30)]);
    let Some((other, mut tracker)) = track(name, &ram) else { return };
    let mut mirror = Mirror::new(&ram, true);
    let pages: Vec<u64> = (1..40).map(|index| index * 400_003).collect();
    for &page in &pages {
        other.act(Act::Write(page), page..page + 1);
    }
    let before = other.page_table_bytes();
    mirror.write_protect(&mut tracker, 0..ram.pages());
    assert!(mirror.round(&mut tracker).0.is_empty());
    other.act(Act::Write(1), pages[3]..pages[3] + 1);
    other.act(Act::Write(2), 77..80);
    other.act(Act::Punch, pages[5]..pages[6]);
    let (found, harvest) = mirror.round(&mut tracker);
    assert_eq!(found, [77, 78, 79, pages[3], pages[5]]);
    assert!(harvest.holes);
    mirror.assert_equal("among holes");
    let after = other.page_table_bytes();
    // One more table for the pages at 77 and what leads to it.
    assert!(after <= before + (64 << 10), "page tables grew from {before} to {after} bytes");
    assert!(tracker.write_protect(0..ram.pages() + 1).is_err());
}

#[test]
fn loses_no_huge_page() {
    let name = "tracking another process, 2 MiB pages";
    let Some((_pages, ram)) = huge_ram(name) else { return };
    let Some((other, mut tracker)) = track(name, &ram) else { return };
    let mut mirror = Mirror::new(&ram, true);
    mirror.write_protect(&mut tracker, 0..700);
    mirror.write_protect(&mut tracker, 700..ram.pages());
    // Zeros are reported once more.
    mirror.round(&mut tracker);
    assert!(mirror.round(&mut tracker).0.is_empty());
    other.act(Act::Write(7), 600..601);
    other.act(Act::Write(7), 2048..2049);
    assert_eq!(mirror.round(&mut tracker).0.len(), 1024);
    // Emptied while protected, and then read or not; written and emptied.
    other.act(Act::Punch, 512..1024);
    other.act(Act::Write(8), 2048..2049);
    other.act(Act::Punch, 2048..2560);
    mirror.round(&mut tracker);
    other.act(Act::Write(9), 4096..4097);
    mirror.round(&mut tracker);
    other.act(Act::Punch, 4096..4608);
    other.act(Act::Read, 4096..4097);
    assert!(!mirror.round(&mut tracker).1.holes);
    mirror.assert_equal("of huge pages");
    assert!(mirror.round(&mut tracker).0.is_empty());
}

#[test]
fn the_end_of_the_process_is_an_error() {
    let name = "tracking a process that ends";
    let ram = file_ram(&LAYOUT);
    let Some((mut other, mut tracker)) = track(name, &ram) else { return };
    other.act(Act::Write(1), 0..2000);
    tracker.write_protect(0..ram.pages()).unwrap();
    other.act(Act::Riot, 0..0);
    let dirty = PageSet::new(ram.pages());
    tracker.harvest(&dirty).unwrap();
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        other.kill();
        other
    });
    let started = Instant::now();
    let error = loop {
        match tracker.harvest(&dirty) {
            Err(error) => break error,
            Ok(_) => {
                assert!(started.elapsed() < Duration::from_secs(60), "the end of the process was not noticed")
            }
        }
    };
    assert!(matches!(error, TrackError::Gone), "{error}");
    let other = killer.join().unwrap();
    assert!(matches!(tracker.harvest(&dirty), Err(TrackError::Gone)));
    tracker.stop();
    drop(other);
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    let name = "tracking a process that lets go";
    let ram = file_ram(&LAYOUT);
    let Some((other, mut tracker)) = track(name, &ram) else { return };
    other.act(Act::Unmap, 257..ram.pages());
    let error = tracker.harvest(&PageSet::new(ram.pages())).unwrap_err();
    assert!(matches!(error, TrackError::Gone), "{error}");
    drop(tracker);
    assert!(matches!(other.track(&ram), Err(TrackError::Kernel { .. } | TrackError::Gone)));
}
