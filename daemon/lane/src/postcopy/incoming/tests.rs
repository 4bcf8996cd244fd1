//! Tests of `PostcopyIncoming` with memory of this process and a userfaultfd of its own.

#![allow(clippy::single_range_in_vec_init, reason = "lists of runs may have one")]

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use memlane_kvm::ram::{Backing, GuestRam};
use memlane_kvm::userfault::MISSING;
use memlane_lab::{HugePages, say_skipped};
use memlane_protocol::wire::frame::Content;

use super::*;

/// An observer that keeps nothing.
struct Unwatched;

impl FaultObserver for Unwatched {
    fn waited(&self, _: Duration) {}
    fn took(&self, _: crate::postcopy::FaultStage, _: Duration) {}
}

/// The guest's regions, with small pages and a gap between them.
const LAYOUT: [(u64, u64); 2] = [(0, 160 * PAGE_SIZE), (16 << 20, 64 * PAGE_SIZE)];

/// Memory of which accesses through its mapping here fault, and a second mapping that does not.
fn incoming(test: &str, layout: &[(u64, u64)], backing: &Backing) -> Option<PostcopyIncoming> {
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
fn byte(incoming: &PostcopyIncoming, page: u64) -> u8 {
    let slice = incoming.memory.ram().slices(page..page + 1).next().unwrap();
    // SAFETY: within the page, which no thread writes to.
    unsafe { slice.ptr.read_volatile() }
}

fn address(incoming: &PostcopyIncoming, page: u64) -> u64 {
    incoming.memory.pieces(page..page + 1).next().unwrap().0.start
}

fn run(pages: Range<u64>, content: Content) -> Run {
    Run { pages, content }
}

#[test]
fn pages_come_once_and_whole() {
    let Some(incoming) = incoming("pages_come_once_and_whole", &LAYOUT, &Backing::Memfd) else { return };
    incoming.add_missing(100..200).unwrap();
    let early = incoming.place(&[run(100..101, Content::Data)], &[1; PAGE_SIZE as usize], By::Stream);
    assert_eq!(early.unwrap_err().kind(), io::ErrorKind::InvalidData);
    incoming.all_known();
    assert_eq!(incoming.remaining(), 100);

    // A run over the gap between the regions, zeros, and a hole.
    let runs = [run(150..170, Content::Data), run(170..180, Content::Zero), run(190..200, Content::Hole)];
    let payload: Vec<u8> = (150..170).flat_map(|page| [page as u8; PAGE_SIZE as usize]).collect();
    incoming.place(&runs, &payload, By::Stream).unwrap();
    assert_eq!((incoming.remaining(), incoming.report().pages_streamed), (60, 30));
    assert!((150..170).all(|page| byte(&incoming, page) == page as u8));
    assert_eq!(byte(&incoming, 175), 0);

    // What comes again, by whatever way, changes nothing.
    let again: Vec<u8> = vec![0xff; 20 * PAGE_SIZE as usize];
    incoming.place(&runs, &again, By::Fault).unwrap();
    assert_eq!((byte(&incoming, 150), byte(&incoming, 169), incoming.remaining()), (150, 169, 60));

    // A hole stays a hole until it is accessed. Then it becomes zeros, and need not come.
    assert_eq!(incoming.fault(address(&incoming, 195)).unwrap(), None);
    assert_eq!(byte(&incoming, 195), 0);
    incoming.end().unwrap();
}

#[test]
fn who_waits_is_asked_for_once_and_answered_by_whatever_comes() {
    let test = "who_waits_is_asked_for_once_and_answered_by_whatever_comes";
    let Some(incoming) = incoming(test, &LAYOUT, &Backing::Memfd) else { return };
    incoming.add_missing(0..20).unwrap();
    incoming.all_known();
    for page in [3, 7, 9] {
        assert_eq!(incoming.fault(address(&incoming, page) + 123).unwrap(), Some(page));
        assert_eq!(incoming.fault(address(&incoming, page)).unwrap(), None);
    }
    let mut awaited = incoming.awaited();
    awaited.sort_unstable();
    assert_eq!((awaited, incoming.report().faults), (vec![3, 7, 9], 3));

    incoming.place(&[run(3..4, Content::Data)], &[3; PAGE_SIZE as usize], By::Fault).unwrap();
    incoming.place(&[run(5..8, Content::Zero)], &[], By::Stream).unwrap();
    // A hole that an access waits for becomes zeros, or the access would wait for ever.
    incoming.place(&[run(8..12, Content::Hole)], &[], By::Stream).unwrap();
    assert_eq!(incoming.awaited(), Vec::<u64>::new());
    assert_eq!([3, 7, 9].map(|page| byte(&incoming, page)), [3, 0, 0]);
    let report = incoming.report();
    assert_eq!((report.pages_fetched, report.pages_streamed, report.remaining_pages), (1, 3, 12));
    assert!(report.fault_p50_nanoseconds > 0 && report.fault_max_nanoseconds >= report.fault_p50_nanoseconds);
    incoming.end().unwrap();
}

#[test]
fn a_thread_that_waits_goes_on_with_the_whole_page() {
    let test = "a_thread_that_waits_goes_on_with_the_whole_page";
    let Some(incoming) = incoming(test, &LAYOUT, &Backing::Memfd) else { return };
    incoming.add_missing(0..incoming.pages()).unwrap();
    incoming.all_known();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let sums: Vec<u64> = (0..incoming.pages())
                .map(|page| {
                    let slice = incoming.memory.ram().slices(page..page + 1).next().unwrap();
                    // SAFETY: the page is read when it is there, and no thread writes to it.
                    unsafe { std::slice::from_raw_parts(slice.ptr, slice.len) }
                        .iter()
                        .map(|byte| u64::from(*byte))
                        .sum()
                })
                .collect();
            let expected: Vec<u64> =
                (0..incoming.pages()).map(|page| (page as u8 as u64) * PAGE_SIZE).collect();
            assert_eq!(sums, expected);
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            let mut awaited = Vec::new();
            incoming.userfault.read(|fault| awaited.extend(incoming.fault(fault.address).unwrap())).unwrap();
            for page in awaited {
                let bytes = [page as u8; PAGE_SIZE as usize];
                incoming.place(&[run(page..page + 1, Content::Data)], &bytes, By::Fault).unwrap();
            }
        }
    });
    assert_eq!((incoming.remaining(), incoming.report().pages_fetched), (0, incoming.pages()));
    incoming.end().unwrap();
}

/// The same memory as another user of its file sees it.
fn other_mapping(incoming: &PostcopyIncoming) -> GuestRam {
    let ram = incoming.memory.ram();
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
    let Some(incoming) = incoming(test, &LAYOUT, &Backing::Memfd) else { return };
    incoming.add_missing(0..20).unwrap();
    incoming.all_known();
    incoming.place(&[run(3..4, Content::Data)], &bytes(3..4), By::Stream).unwrap();
    incoming.verify_holes().unwrap();
    // Pages after the one that makes trouble stay missing, and so does that.
    other_mapping(&incoming).populate_write(8..9).unwrap();
    let said =
        incoming.place(&[run(0..20, Content::Data)], &bytes(0..20), By::Stream).unwrap_err().to_string();
    assert!(said.contains("page 8 of the guest's memory"), "{said}");
    assert_eq!(incoming.broken(), Some(said.as_str()));
    assert_eq!(incoming.missing().runs().collect::<Vec<_>>(), vec![8..20]);
    assert_eq!((incoming.remaining(), incoming.report().pages_streamed, byte(&incoming, 7)), (12, 8, 7));
    // Nothing is placed any more.
    let refused = incoming.place(&[run(15..16, Content::Zero)], &[], By::Fault).unwrap_err();
    assert_eq!(refused.to_string(), said);
    incoming.end().unwrap();
}

#[test]
fn what_is_there_is_seen_before_the_guest_runs() {
    let test = "what_is_there_is_seen_before_the_guest_runs";
    let Some(incoming) = incoming(test, &LAYOUT, &Backing::Memfd) else { return };
    let other = other_mapping(&incoming);
    other.populate_write(0..incoming.pages()).unwrap();
    incoming.add_missing(0..20).unwrap();
    incoming.add_missing(100..200).unwrap();
    incoming.all_known();
    incoming.place(&[run(10..20, Content::Data)], &bytes(10..20), By::Stream).unwrap();
    incoming.verify_holes().unwrap();
    other.populate_write(170..171).unwrap();
    let said = incoming.verify_holes().unwrap_err().to_string();
    assert!(said.contains("page 170"), "{said}");
    assert!(incoming.broken().is_some());
    incoming.end().unwrap();
}

#[test]
fn what_could_not_be_placed_is_missing_again() {
    let test = "what_could_not_be_placed_is_missing_again";
    let Some(incoming) = incoming(test, &LAYOUT, &Backing::Memfd) else { return };
    incoming.add_missing(0..20).unwrap();
    incoming.all_known();
    assert_eq!(incoming.fault(address(&incoming, 15)).unwrap(), Some(15));
    let gone = address(&incoming, 10)..address(&incoming, 20);
    incoming.userfault.unregister(gone.clone()).unwrap();
    let all = [run(0..20, Content::Data)];
    assert!(is_gone(&incoming.place(&all, &bytes(0..20), By::Stream).unwrap_err()));
    assert_eq!((incoming.remaining(), incoming.broken()), (10, None));
    assert_eq!(incoming.missing().runs().collect::<Vec<_>>(), vec![10..20]);
    // The access that waited was woken, and the kernel reports it again.
    assert_eq!((incoming.awaited(), incoming.fault(address(&incoming, 15)).unwrap()), (vec![], Some(15)));
    incoming.userfault.register(gone, Faults::Missing).unwrap();
    incoming.place(&all, &bytes(0..20), By::Fault).unwrap();
    assert_eq!((incoming.remaining(), byte(&incoming, 9), byte(&incoming, 19)), (0, 9, 19));
    let report = incoming.report();
    assert_eq!((report.pages_streamed, report.pages_fetched), (10, 10));
    incoming.end().unwrap();
}

/// The state of a daemon that has taken the place of the one with `before`.
fn again(before: PostcopyIncoming) -> PostcopyIncoming {
    // The VMM's copy.
    let kept = before.userfault.as_fd().try_clone_to_owned().unwrap();
    let memory = before.memory.clone();
    drop(before);
    let userfault = Userfault::from_fd_set_up(kept).unwrap();
    PostcopyIncoming::again(userfault, memory, Arc::new(|| ()), Arc::new(Unwatched)).unwrap()
}

#[test]
fn another_daemon_finds_what_is_missing_and_who_waits_for_it() {
    let test = "another_daemon_finds_what_is_missing_and_who_waits_for_it";
    let Some(before) = incoming(test, &LAYOUT, &Backing::Memfd) else { return };
    // Pages 0 to 9 came before the guest ran, and page 3 and 203 were written to since.
    before.memory.ram().write_pages(0..10, &bytes(0..10)).unwrap();
    before.add_missing(90..210).unwrap();
    before.all_known();
    before.place(&[run(200..205, Content::Data)], &bytes(200..205), By::Stream).unwrap();
    for page in [3, 203] {
        other_mapping(&before).write_pages(page..page + 1, &[0xee; PAGE_SIZE as usize]).unwrap();
    }
    let ram = before.memory.ram().clone();
    // SAFETY: within page 100, which is mapped as long as `ram` lives.
    let reader =
        std::thread::spawn(move || unsafe { ram.slices(100..101).next().unwrap().ptr.read_volatile() });
    let mut heard = 0;
    while heard == 0 {
        heard = before.userfault.read(|_| {}).unwrap();
    }

    let incoming = again(before);
    // What was never touched is found to be missing as well.
    let missing: Vec<_> = incoming.missing().runs().collect();
    assert_eq!((missing, incoming.remaining()), (vec![10..200, 205..224], 209));
    incoming.verify_holes().unwrap();
    let mut awaited = Vec::new();
    while awaited.is_empty() {
        incoming.userfault.read(|fault| awaited.extend(incoming.fault(fault.address).unwrap())).unwrap();
    }
    assert_eq!(awaited, [100]);
    let runs = [run(10..90, Content::Hole), run(90..210, Content::Data), run(210..224, Content::Hole)];
    incoming.place(&runs, &bytes(90..210), By::Stream).unwrap();
    assert_eq!(reader.join().unwrap(), 100);
    assert_eq!(incoming.remaining(), 0);
    let expected = [(3, 0xee), (9, 9), (50, 0), (90, 90), (203, 0xee), (204, 204), (209, 209), (220, 0)];
    // Holes are made zeros by whoever answers accesses.
    for (page, found) in expected {
        if matches!(page, 50 | 220) {
            incoming.zero(&(page..page + 1), IfPresent::Skip).unwrap();
        }
        assert_eq!(byte(&incoming, page), found, "page {page}");
    }
    incoming.end().unwrap();
}

#[test]
fn another_daemon_leaves_huge_pages_alone_that_are_there() {
    let test = "another_daemon_leaves_huge_pages_alone_that_are_there";
    let _pages = match HugePages::reserve(3) {
        Ok(pages) => pages,
        Err(error) => return say_skipped(test, &format!("{error:#}")),
    };
    let Some(before) = incoming(test, &[(0, 6 << 20)], &Backing::HugeMemfd) else { return };
    before.add_missing(0..1536).unwrap();
    before.all_known();
    before.place(&[run(0..512, Content::Zero)], &[], By::Stream).unwrap();
    before.place(&[run(512..1024, Content::Data)], &bytes(512..1024), By::Stream).unwrap();

    let incoming = again(before);
    // The first huge page is there, but looks as if it were not.
    assert_eq!(incoming.missing().runs().collect::<Vec<_>>(), [0..512, 1024..1536]);
    incoming.place(&[run(0..1536, Content::Data)], &vec![0xff; 6 << 20], By::Stream).unwrap();
    assert_eq!([0, 511, 600, 1024].map(|page| byte(&incoming, page)), [0, 0, (600 % 256) as u8, 0xff]);
    assert_eq!((incoming.remaining(), incoming.broken()), (0, None));
    incoming.end().unwrap();
}

#[test]
fn an_access_to_what_is_being_placed_waits_for_that() {
    let pages = Pages::new(100);
    pages.add(10..30);
    assert_eq!(pages.claim(0..20), Some(10..20));
    assert_eq!(pages.claim(0..20), None);
    assert_eq!([9, 12, 12, 25].map(|page| pages.access(&(page..page + 1))), {
        [Access::Present, Access::BeingPlaced, Access::Known, Access::Request]
    });
    // A page that is being placed may still have to be named to a source that comes.
    assert_eq!(pages.unplaced().runs().collect::<Vec<_>>(), vec![10..30]);
    assert!(!pages.is_missing(12) && pages.is_missing(25));
    assert_eq!(pages.placed(10..15).len(), 1);
    assert_eq!((pages.access(&(12..13)), pages.awaited()), (Access::Present, vec![25]));
    pages.give_back(15..20);
    assert_eq!(pages.missing().runs().collect::<Vec<_>>(), vec![15..30]);
    // Those holes are placed that an access waits for.
    assert_eq!(pages.leave(20..40), (9, vec![25..26]));
    assert_eq!((pages.access(&(21..22)), pages.access(&(25..26))), (Access::Present, Access::Known));
    assert_eq!((pages.placed(25..26).len(), pages.awaited()), (1, vec![]));
}

#[test]
fn pages_that_come_by_all_lanes_at_once_are_placed_once() {
    let test = "pages_that_come_by_all_lanes_at_once_are_placed_once";
    let Some(incoming) = incoming(test, &LAYOUT, &Backing::Memfd) else { return };
    let all = incoming.pages();
    for _ in 0..20 {
        incoming.known.store(false, Ordering::Release);
        incoming.add_missing(0..all).unwrap();
        incoming.all_known();
        let done = AtomicU64::new(0);
        let read = || {
            let right = (0..all).filter(|page| byte(&incoming, *page) == *page as u8).count() as u64;
            done.fetch_add(1, Ordering::Release);
            assert_eq!(right, all);
        };
        let stream = |piece: u64| {
            for first in (0..all).step_by(piece as usize) {
                let pages = first..all.min(first + piece);
                incoming.place(&[run(pages.clone(), Content::Data)], &bytes(pages), By::Stream).unwrap();
            }
        };
        let wait = || {
            while done.load(Ordering::Acquire) < 2 {
                let mut awaited = Vec::new();
                incoming
                    .userfault
                    .read(|fault| awaited.extend(incoming.fault(fault.address).unwrap()))
                    .unwrap();
                for page in awaited {
                    let pages = page..page + 1;
                    incoming.place(&[run(pages.clone(), Content::Data)], &bytes(pages), By::Fault).unwrap();
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(wait);
            (0..2).for_each(|_| drop(scope.spawn(read)));
            [3, 16, 50].into_iter().for_each(|piece| drop(scope.spawn(move || stream(piece))));
        });
        assert_eq!((incoming.remaining(), incoming.awaited().len(), incoming.broken()), (0, 0, None));
    }
    let report = incoming.report();
    assert_eq!(report.pages_streamed + report.pages_fetched, 20 * all);
    incoming.end().unwrap();
}

#[test]
fn a_huge_page_comes_whole_or_not_at_all() {
    let test = "a_huge_page_comes_whole_or_not_at_all";
    let _pages = match HugePages::reserve(2) {
        Ok(pages) => pages,
        Err(error) => return say_skipped(test, &format!("{error:#}")),
    };
    let Some(incoming) = incoming(test, &[(0, 4 << 20)], &Backing::HugeMemfd) else { return };
    incoming.add_missing(5..6).unwrap();
    incoming.add_missing(600..601).unwrap();
    incoming.all_known();
    assert_eq!(incoming.remaining(), 1024);
    assert_eq!(incoming.fault(address(&incoming, 77)).unwrap(), Some(0));
    for torn in [
        vec![run(0..511, Content::Data)],
        vec![run(1..512, Content::Zero)],
        vec![run(0..100, Content::Zero), run(512..1024, Content::Zero)],
        vec![run(0..100, Content::Data), run(101..512, Content::Zero)],
    ] {
        let bytes: u64 = torn.iter().map(Run::payload_bytes).sum();
        let refused = incoming.place(&torn, &vec![1; bytes as usize], By::Stream);
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidData, "{torn:?}");
    }
    let runs = [run(0..100, Content::Zero), run(100..110, Content::Data), run(110..1024, Content::Zero)];
    incoming.place(&runs, &[9; 10 * PAGE_SIZE as usize], By::Fault).unwrap();
    assert_eq!([99, 100, 109, 110, 1023].map(|page| byte(&incoming, page)), [0, 9, 9, 0, 0]);
    assert_eq!((incoming.remaining(), incoming.awaited().len()), (0, 0));
    incoming.end().unwrap();
}
