//! PostcopyIncoming into memory of this process, with a userfaultfd of its own.

#![allow(clippy::single_range_in_vec_init, reason = "lists of runs may have one")]

use std::sync::atomic::Ordering;

use memlane_kvm::ram::{Backing, GuestRam};
use memlane_kvm::userfault::MISSING;
use memlane_lab::{HugePages, say_skipped};
use memlane_protocol::wire::frame::Content;

use super::*;

/// Pages of the regions: small ones, and with a gap between them.
/// An observer that keeps nothing.
struct Unwatched;

impl FaultObserver for Unwatched {
    fn waited(&self, _: Duration) {}
    fn took(&self, _: crate::postcopy::Leg, _: Duration) {}
}

const LAYOUT: [(u64, u64); 2] = [(0, 160 * PAGE_SIZE), (16 << 20, 64 * PAGE_SIZE)];

/// Memory of which accesses through its mapping here fault, and a second mapping that does not.
fn placing(test: &str, layout: &[(u64, u64)], backing: &Backing) -> Option<PostcopyIncoming> {
    let skipped = |reason: String| {
        say_skipped(test, &reason);
        None
    };
    let ram = match GuestRam::create(layout, backing) {
        Ok(ram) => Arc::new(ram),
        Err(error) => return skipped(error.to_string()),
    };
    let userfault = match Userfault::open(MISSING) {
        Ok(userfault) => userfault,
        Err(error) => return skipped(error.to_string()),
    };
    let mut first = 0;
    let addresses: Vec<u64> = ram
        .regions()
        .iter()
        .map(|region| {
            let slice = ram.slices(first..first + 1).next().unwrap();
            first += region.bytes / PAGE_SIZE;
            slice.ptr as u64
        })
        .collect();
    let memory = Arc::new(VmmMapping::new(ram, &addresses).unwrap());
    Some(PostcopyIncoming::new(userfault, memory, Arc::new(|| ()), Arc::new(Unwatched)).unwrap())
}

/// The first byte of a page, which is there.
fn byte(placing: &PostcopyIncoming, page: u64) -> u8 {
    let slice = placing.memory.ram().slices(page..page + 1).next().unwrap();
    // SAFETY: within the page, which nobody writes to.
    unsafe { slice.ptr.read_volatile() }
}

fn address(placing: &PostcopyIncoming, page: u64) -> u64 {
    placing.memory.pieces(page..page + 1).next().unwrap().0.start
}

fn run(pages: Range<u64>, content: Content) -> Run {
    Run { pages, content }
}

#[test]
fn pages_come_once_and_whole() {
    let Some(placing) = placing("pages_come_once_and_whole", &LAYOUT, &Backing::Memfd) else { return };
    placing.add_missing(100..200).unwrap();
    let early = placing.place(&[run(100..101, Content::Data)], &[1; PAGE_SIZE as usize], By::Stream);
    assert_eq!(early.unwrap_err().kind(), io::ErrorKind::InvalidData);
    placing.all_known();
    assert_eq!(placing.remaining(), 100);

    // A run over the gap between the regions, zeros, and a hole.
    let runs = [run(150..170, Content::Data), run(170..180, Content::Zero), run(190..200, Content::Hole)];
    let payload: Vec<u8> = (150..170).flat_map(|page| [page as u8; PAGE_SIZE as usize]).collect();
    placing.place(&runs, &payload, By::Stream).unwrap();
    assert_eq!((placing.remaining(), placing.report().pages_streamed), (60, 30));
    assert!((150..170).all(|page| byte(&placing, page) == page as u8));
    assert_eq!(byte(&placing, 175), 0);

    // What comes again, by whatever way, changes nothing.
    let again: Vec<u8> = vec![0xff; 20 * PAGE_SIZE as usize];
    placing.place(&runs, &again, By::Fault).unwrap();
    assert_eq!((byte(&placing, 150), byte(&placing, 169), placing.remaining()), (150, 169, 60));

    // A hole stays one until somebody asks; then it is zeros, and need not come.
    assert_eq!(placing.fault(address(&placing, 195)).unwrap(), None);
    assert_eq!(byte(&placing, 195), 0);
    placing.end().unwrap();
}

#[test]
fn who_waits_is_asked_for_once_and_answered_by_whatever_comes() {
    let test = "who_waits_is_asked_for_once_and_answered_by_whatever_comes";
    let Some(placing) = placing(test, &LAYOUT, &Backing::Memfd) else { return };
    placing.add_missing(0..20).unwrap();
    placing.all_known();
    for page in [3, 7, 9] {
        assert_eq!(placing.fault(address(&placing, page) + 123).unwrap(), Some(page));
        assert_eq!(placing.fault(address(&placing, page)).unwrap(), None);
    }
    let mut wanted = placing.wanted();
    wanted.sort_unstable();
    assert_eq!((wanted, placing.report().faults), (vec![3, 7, 9], 3));

    placing.place(&[run(3..4, Content::Data)], &[3; PAGE_SIZE as usize], By::Fault).unwrap();
    placing.place(&[run(5..8, Content::Zero)], &[], By::Stream).unwrap();
    // A hole that somebody waits for is made zero: nobody else would let him go.
    placing.place(&[run(8..12, Content::Hole)], &[], By::Stream).unwrap();
    assert_eq!(placing.wanted(), Vec::<u64>::new());
    assert_eq!([3, 7, 9].map(|page| byte(&placing, page)), [3, 0, 0]);
    let report = placing.report();
    assert_eq!((report.pages_fetched, report.pages_streamed, report.remaining_pages), (1, 3, 12));
    assert!(report.fault_p50_nanoseconds > 0 && report.fault_max_nanoseconds >= report.fault_p50_nanoseconds);
    placing.end().unwrap();
}

#[test]
fn a_thread_that_waits_goes_on_with_the_whole_page() {
    let test = "a_thread_that_waits_goes_on_with_the_whole_page";
    let Some(placing) = placing(test, &LAYOUT, &Backing::Memfd) else { return };
    placing.add_missing(0..placing.pages()).unwrap();
    placing.all_known();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let sums: Vec<u64> = (0..placing.pages())
                .map(|page| {
                    let slice = placing.memory.ram().slices(page..page + 1).next().unwrap();
                    // SAFETY: the page is read when it is there, and nobody writes to it.
                    unsafe { std::slice::from_raw_parts(slice.ptr, slice.len) }
                        .iter()
                        .map(|byte| u64::from(*byte))
                        .sum()
                })
                .collect();
            let expected: Vec<u64> =
                (0..placing.pages()).map(|page| (page as u8 as u64) * PAGE_SIZE).collect();
            assert_eq!(sums, expected);
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            let mut wanted = Vec::new();
            placing.userfault.read(|fault| wanted.extend(placing.fault(fault.address).unwrap())).unwrap();
            for page in wanted {
                let bytes = [page as u8; PAGE_SIZE as usize];
                placing.place(&[run(page..page + 1, Content::Data)], &bytes, By::Fault).unwrap();
            }
        }
    });
    assert_eq!((placing.remaining(), placing.report().pages_fetched), (0, placing.pages()));
    placing.end().unwrap();
}

/// The same memory as another user of its file sees it.
fn other_mapping(placing: &PostcopyIncoming) -> GuestRam {
    let ram = placing.memory.ram();
    let fds = ram.descriptors().into_iter().map(|fd| fd.try_clone_to_owned().unwrap());
    GuestRam::map(ram.regions().iter().copied().zip(fds).collect()).unwrap()
}

/// The bytes of these pages, each full of its number.
fn bytes(pages: Range<u64>) -> Vec<u8> {
    pages.flat_map(|page| [page as u8; PAGE_SIZE as usize]).collect()
}

#[test]
fn what_is_there_though_it_is_missing_is_an_error() {
    let test = "what_is_there_though_it_is_missing_is_an_error";
    let Some(placing) = placing(test, &LAYOUT, &Backing::Memfd) else { return };
    placing.add_missing(0..20).unwrap();
    placing.all_known();
    placing.place(&[run(3..4, Content::Data)], &bytes(3..4), By::Stream).unwrap();
    placing.see_holes().unwrap();
    // Pages after the one that makes trouble stay missing, and so does that.
    other_mapping(&placing).populate_write(8..9).unwrap();
    let said =
        placing.place(&[run(0..20, Content::Data)], &bytes(0..20), By::Stream).unwrap_err().to_string();
    assert!(said.contains("page 8 of the guest's memory"), "{said}");
    assert_eq!(placing.broken(), Some(said.as_str()));
    assert_eq!(placing.missing().runs().collect::<Vec<_>>(), vec![8..20]);
    assert_eq!((placing.remaining(), placing.report().pages_streamed, byte(&placing, 7)), (12, 8, 7));
    // Nothing is placed any more.
    let refused = placing.place(&[run(15..16, Content::Zero)], &[], By::Fault).unwrap_err();
    assert_eq!(refused.to_string(), said);
    placing.end().unwrap();
}

#[test]
fn what_is_there_is_seen_before_the_guest_runs() {
    let test = "what_is_there_is_seen_before_the_guest_runs";
    let Some(placing) = placing(test, &LAYOUT, &Backing::Memfd) else { return };
    let other = other_mapping(&placing);
    other.populate_write(0..placing.pages()).unwrap();
    placing.add_missing(0..20).unwrap();
    placing.add_missing(100..200).unwrap();
    placing.all_known();
    placing.place(&[run(10..20, Content::Data)], &bytes(10..20), By::Stream).unwrap();
    placing.see_holes().unwrap();
    other.populate_write(170..171).unwrap();
    let said = placing.see_holes().unwrap_err().to_string();
    assert!(said.contains("page 170"), "{said}");
    assert!(placing.broken().is_some());
    placing.end().unwrap();
}

#[test]
fn what_could_not_be_placed_is_missing_again() {
    let test = "what_could_not_be_placed_is_missing_again";
    let Some(placing) = placing(test, &LAYOUT, &Backing::Memfd) else { return };
    placing.add_missing(0..20).unwrap();
    placing.all_known();
    assert_eq!(placing.fault(address(&placing, 15)).unwrap(), Some(15));
    let gone = address(&placing, 10)..address(&placing, 20);
    placing.userfault.unregister(gone.clone()).unwrap();
    let all = [run(0..20, Content::Data)];
    assert!(is_gone(&placing.place(&all, &bytes(0..20), By::Stream).unwrap_err()));
    assert_eq!((placing.remaining(), placing.broken()), (10, None));
    assert_eq!(placing.missing().runs().collect::<Vec<_>>(), vec![10..20]);
    // Whoever waited was let go, to be told of anew.
    assert_eq!((placing.wanted(), placing.fault(address(&placing, 15)).unwrap()), (vec![], Some(15)));
    placing.userfault.register(gone, Faults::Missing).unwrap();
    placing.place(&all, &bytes(0..20), By::Fault).unwrap();
    assert_eq!((placing.remaining(), byte(&placing, 9), byte(&placing, 19)), (0, 9, 19));
    let report = placing.report();
    assert_eq!((report.pages_streamed, report.pages_fetched), (10, 10));
    placing.end().unwrap();
}

#[test]
fn an_access_to_what_is_being_placed_waits_for_that() {
    let pages = Pages::new(100);
    pages.add(10..30);
    assert_eq!(pages.claim(0..20), Some(10..20));
    assert_eq!(pages.claim(0..20), None);
    assert_eq!([9, 12, 12, 25].map(|page| pages.access(&(page..page + 1))), {
        [Access::There, Access::Coming, Access::Known, Access::Ask]
    });
    // It may yet have to be told of to a source that comes.
    assert_eq!(pages.unplaced().runs().collect::<Vec<_>>(), vec![10..30]);
    assert!(!pages.is_missing(12) && pages.is_missing(25));
    assert_eq!(pages.placed(10..15).len(), 1);
    assert_eq!((pages.access(&(12..13)), pages.wanted()), (Access::There, vec![25]));
    pages.give_back(15..20);
    assert_eq!(pages.missing().runs().collect::<Vec<_>>(), vec![15..30]);
    // Of holes those are placed that somebody waits for.
    assert_eq!(pages.leave(20..40), (9, vec![25..26]));
    assert_eq!((pages.access(&(21..22)), pages.access(&(25..26))), (Access::There, Access::Known));
    assert_eq!((pages.placed(25..26).len(), pages.wanted()), (1, vec![]));
}

#[test]
fn pages_that_come_by_all_lanes_at_once_are_placed_once() {
    let test = "pages_that_come_by_all_lanes_at_once_are_placed_once";
    let Some(placing) = placing(test, &LAYOUT, &Backing::Memfd) else { return };
    let all = placing.pages();
    for _ in 0..20 {
        placing.known.store(false, Ordering::Release);
        placing.add_missing(0..all).unwrap();
        placing.all_known();
        let done = AtomicU64::new(0);
        let read = || {
            let right = (0..all).filter(|page| byte(&placing, *page) == *page as u8).count() as u64;
            done.fetch_add(1, Ordering::Release);
            assert_eq!(right, all);
        };
        let stream = |piece: u64| {
            for first in (0..all).step_by(piece as usize) {
                let pages = first..all.min(first + piece);
                placing.place(&[run(pages.clone(), Content::Data)], &bytes(pages), By::Stream).unwrap();
            }
        };
        let wait = || {
            while done.load(Ordering::Acquire) < 2 {
                let mut wanted = Vec::new();
                placing.userfault.read(|fault| wanted.extend(placing.fault(fault.address).unwrap())).unwrap();
                for page in wanted {
                    let pages = page..page + 1;
                    placing.place(&[run(pages.clone(), Content::Data)], &bytes(pages), By::Fault).unwrap();
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(wait);
            (0..2).for_each(|_| drop(scope.spawn(read)));
            [3, 16, 50].into_iter().for_each(|piece| drop(scope.spawn(move || stream(piece))));
        });
        assert_eq!((placing.remaining(), placing.wanted().len(), placing.broken()), (0, 0, None));
    }
    let report = placing.report();
    assert_eq!(report.pages_streamed + report.pages_fetched, 20 * all);
    placing.end().unwrap();
}

#[test]
fn a_huge_page_comes_whole_or_not_at_all() {
    let test = "a_huge_page_comes_whole_or_not_at_all";
    let _pages = match HugePages::reserve(2) {
        Ok(pages) => pages,
        Err(error) => return say_skipped(test, &format!("{error:#}")),
    };
    let Some(placing) = placing(test, &[(0, 4 << 20)], &Backing::HugeMemfd) else { return };
    placing.add_missing(5..6).unwrap();
    placing.add_missing(600..601).unwrap();
    placing.all_known();
    assert_eq!(placing.remaining(), 1024);
    assert_eq!(placing.fault(address(&placing, 77)).unwrap(), Some(0));
    for torn in [
        vec![run(0..511, Content::Data)],
        vec![run(1..512, Content::Zero)],
        vec![run(0..100, Content::Zero), run(512..1024, Content::Zero)],
        vec![run(0..100, Content::Data), run(101..512, Content::Zero)],
    ] {
        let bytes: u64 = torn.iter().map(Run::payload_bytes).sum();
        let refused = placing.place(&torn, &vec![1; bytes as usize], By::Stream);
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidData, "{torn:?}");
    }
    let runs = [run(0..100, Content::Zero), run(100..110, Content::Data), run(110..1024, Content::Zero)];
    placing.place(&runs, &[9; 10 * PAGE_SIZE as usize], By::Fault).unwrap();
    assert_eq!([99, 100, 109, 110, 1023].map(|page| byte(&placing, page)), [0, 9, 9, 0, 0]);
    assert_eq!((placing.remaining(), placing.wanted().len()), (0, 0));
    placing.end().unwrap();
}
