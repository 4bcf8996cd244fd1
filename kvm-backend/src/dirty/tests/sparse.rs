//! [`PagemapTracker`] under a guest of 4 TiB that holds next to nothing: it must cost next to nothing, and find
//! what comes into being anywhere.

use std::collections::HashMap;

use super::*;

const TIB: u64 = 1 << 40;
/// The second region begins within a word, and within a page table's pages.
const LAYOUT: [(u64, u64); 2] = [(0, 2 * TIB + 0x1000), (4 * TIB, 2 * TIB)];
/// Kilobytes of page tables that tracking may take: those of the places that are written, many times over. If holes
/// were protected it would be 8 GiB.
const MOST_TABLES_KB: u64 = 64 << 10;

/// No page.
const NONE: [u64; 0] = [];

fn sparse_ram() -> Arc<GuestRam> {
    Arc::new(GuestRam::create(&LAYOUT, &Backing::Memfd).unwrap())
}

fn word(ram: &GuestRam, page: u64) -> &AtomicU64 {
    let slice = ram.slices(page..page + 1).next().unwrap();
    // SAFETY: mapped as long as `ram` lives; all threads of these tests use atomics.
    unsafe { AtomicU64::from_ptr(slice.ptr.cast()) }
}

fn write(ram: &GuestRam, page: u64) {
    word(ram, page).store(page + 1, Ordering::Relaxed);
}

fn tables_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// The pages that a harvest finds.
fn harvest(tracker: &mut PagemapTracker, ram: &GuestRam) -> Vec<u64> {
    let dirty = shared_set(ram.pages());
    let new = tracker.harvest(&dirty).unwrap();
    let found: Vec<u64> = dirty.runs().flatten().collect();
    assert_eq!(found.len() as u64, new);
    found
}

#[test]
fn pages_first_touched_at_any_time_are_found_wherever_they_are() {
    let ram = sparse_ram();
    let Some(mut tracker) = pagemap("pagemap, sparse", &ram) else { return };
    let pages = ram.pages();
    let second = ram.page_of(4 * TIB).unwrap();
    for page in [1, 600, second - 1, pages - 1] {
        write(&ram, page);
    }
    let before = tables_kb();
    tracker.start().unwrap();
    write(&ram, 2000);
    tracker.write_protect(0..second - 5000).unwrap();
    tracker.write_protect(second - 5000..pages).unwrap();
    assert_eq!(tracker.write_protected_pages(), pages);
    assert_eq!(harvest(&mut tracker, &ram), NONE);

    // Beside a page that was there, and where nothing was: close by, far off, and on both sides of where regions
    // meet.
    let fresh =
        [0, 2, 512, 4096, pages / 4, second - 513, second - 2, second, second + 1, pages - 513, pages - 2];
    fresh.iter().for_each(|page| write(&ram, *page));
    assert_eq!(harvest(&mut tracker, &ram), fresh);
    assert_eq!(harvest(&mut tracker, &ram), NONE);

    // Written again, and others in page tables that hold something since the last harvest.
    let again =
        [1, 3, 512, 513, 4095, pages / 4, pages / 4 + 1, second - 514, second + 1, second + 2, pages - 1];
    again.iter().for_each(|page| write(&ram, *page));
    assert_eq!(harvest(&mut tracker, &ram), again);
    assert_eq!(harvest(&mut tracker, &ram), NONE);
    let tables = tables_kb().saturating_sub(before);
    assert!(tables < MOST_TABLES_KB, "{tables} KiB of page tables");

    tracker.stop().unwrap();
    tracker.start().unwrap();
    tracker.write_protect(0..pages).unwrap();
    write(&ram, pages / 2);
    assert_eq!(harvest(&mut tracker, &ram), [pages / 2], "nothing is left of what was tracked before");
}

#[test]
fn pages_that_are_taken_from_the_guest_are_found_and_again_when_they_come_back() {
    let ram = sparse_ram();
    let Some(mut tracker) = pagemap("pagemap, pages taken from the guest", &ram) else { return };
    let last = ram.pages() - 1;
    let held = [5, 6, 700, last];
    held.iter().for_each(|page| write(&ram, *page));
    tracker.start().unwrap();
    tracker.write_protect(0..ram.pages()).unwrap();
    // Holes are among them, for most of them.
    ram.discard(6..last + 1).unwrap();
    assert_eq!(harvest(&mut tracker, &ram), [6, 700, last]);
    assert_eq!(ram.data_extents(0..ram.pages()).unwrap(), vec![5..6]);
    assert_eq!(harvest(&mut tracker, &ram), NONE);
    for page in [6, last] {
        write(&ram, page);
        assert_eq!(harvest(&mut tracker, &ram), [page]);
    }
    ram.discard(0..ram.pages()).unwrap();
    assert_eq!(harvest(&mut tracker, &ram), [5, 6, last]);
}

/// Copies as a daemon does: the data of a piece once it is write-protected, then what harvests find.
#[test]
fn no_page_is_lost_while_threads_touch_ever_new_ones() {
    let ram = sparse_ram();
    let Some(mut tracker) = pagemap("pagemap, new pages all the time", &ram) else { return };
    let pages = ram.pages();
    // Some share a page table, or are neighbours; some places are written again and again.
    let place = |random: u64| {
        let (spot, near) = (random % 199, random / 199 % 9);
        (spot * (pages / 199) + near * near * 40).min(pages - 1)
    };
    for turn in 0..3 {
        let stop = AtomicBool::new(false);
        let turns = AtomicU64::new(0);
        let mut mirror: HashMap<u64, u64> = HashMap::new();
        let mut copy = |run: Range<u64>| {
            for page in run {
                mirror.insert(page, word(&ram, page).load(Ordering::Relaxed));
            }
        };
        ram.punch(0..pages).unwrap();
        std::thread::scope(|scope| {
            let _finished = Finish(&stop);
            for seed in 1..3u64 {
                let (ram, stop, turns) = (&ram, &stop, &turns);
                scope.spawn(move || {
                    let mut random = seed + 10 * turn;
                    while !stop.load(Ordering::Relaxed) {
                        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        word(ram, place(random >> 33)).store(random, Ordering::Relaxed);
                        if turns.fetch_add(1, Ordering::Relaxed) % 8 == 0 {
                            std::thread::sleep(std::time::Duration::from_micros(50));
                        }
                    }
                });
            }
            tracker.start().unwrap();
            for first in (0..pages).step_by(1 << 24) {
                let piece = first..pages.min(first + (1 << 24));
                tracker.write_protect(piece.clone()).unwrap();
                ram.data_extents(piece).unwrap().into_iter().for_each(&mut copy);
            }
            for _ in 0..10 {
                harvest(&mut tracker, &ram).into_iter().for_each(|page| copy(page..page + 1));
                progress(&turns);
            }
        });
        harvest(&mut tracker, &ram).into_iter().for_each(|page| copy(page..page + 1));
        assert_eq!(harvest(&mut tracker, &ram), NONE);
        let held: Vec<u64> = ram.data_extents(0..pages).unwrap().into_iter().flatten().collect();
        assert!(held.len() > 100);
        for page in held {
            let now = word(&ram, page).load(Ordering::Relaxed);
            assert_eq!(mirror.get(&page).copied().unwrap_or(0), now, "page {page} was lost");
        }
        tracker.stop().unwrap();
    }
}
