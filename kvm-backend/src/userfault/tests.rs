use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use memlane_lab::{HugePages, say_skipped};
use memlane_protocol::PAGE_SIZE;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::*;
use crate::ram::{Backing, GuestRam};

const LONG: Duration = Duration::from_secs(60);
const HUGE_PAGE: u64 = 2 << 20;

/// Memory of this process, and a userfaultfd over it.
struct Bench {
    ram: Arc<GuestRam>,
    userfault: Userfault,
    page_bytes: u64,
}

impl Bench {
    fn new(test: &str, backing: &Backing, page_bytes: u64, features: u64, faults: Faults) -> Option<Self> {
        let ram = match GuestRam::create(&[(0, 8 * page_bytes)], backing) {
            Ok(ram) => Arc::new(ram),
            Err(error) => return skip(test, &error.to_string()),
        };
        let userfault = match Userfault::open(features) {
            Ok(userfault) => userfault,
            Err(error) => return skip(test, &error.to_string()),
        };
        let bench = Self { ram, userfault, page_bytes };
        bench.userfault.register(bench.addresses(0..8), faults).unwrap();
        Some(bench)
    }

    fn small(test: &str) -> Option<Self> {
        Self::new(test, &Backing::Memfd, PAGE_SIZE, MISSING, Faults::Missing)
    }

    /// Addresses of pages of the memory's own size.
    fn addresses(&self, pages: Range<u64>) -> Range<u64> {
        let start = self.ram.slices(0..1).next().unwrap().ptr as u64;
        start + pages.start * self.page_bytes..start + pages.end * self.page_bytes
    }

    fn contents(&self, byte: u8) -> Vec<u8> {
        vec![byte; self.page_bytes as usize]
    }

    /// Copies a page full of `byte`.
    fn copy(&self, page: u64, byte: u8) -> Placed {
        self.userfault
            .copy(
                self.addresses(page..page + 1).start,
                &self.contents(byte),
                self.page_bytes,
                IfPresent::Skip,
            )
            .unwrap()
    }

    fn placed(&self, pages: u64, already: u64) -> Placed {
        Placed { bytes: pages * self.page_bytes, already: already * self.page_bytes }
    }

    /// Waits for a fault, and takes it.
    fn fault(&self) -> Fault {
        let mut found = Vec::new();
        while found.is_empty() {
            let mut ready = [PollFd::new(&self.userfault, PollFlags::IN)];
            let patience = Timespec::try_from(LONG).unwrap();
            let count = rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, Some(&patience)));
            assert_eq!(count.unwrap(), 1, "no fault");
            assert_eq!(self.userfault.read(|fault| found.push(fault)).unwrap(), found.len());
        }
        assert_eq!(found.len(), 1);
        found[0]
    }

    /// A word of a page.
    fn word(&self, page: u64) -> &AtomicU64 {
        let first = page * self.page_bytes / PAGE_SIZE;
        let slice = self.ram.slices(first..first + 1).next().unwrap();
        // SAFETY: mapped as long as the memory lives; atomics allow other writers.
        unsafe { AtomicU64::from_ptr(slice.ptr.add(64).cast()) }
    }

    /// Reads a word of a page, on a thread of its own.
    fn read(self: &Arc<Self>, page: u64) -> JoinHandle<u64> {
        let bench = self.clone();
        std::thread::spawn(move || bench.word(page).load(Ordering::Relaxed))
    }

    fn write(self: &Arc<Self>, page: u64, value: u64) -> JoinHandle<()> {
        let bench = self.clone();
        std::thread::spawn(move || bench.word(page).store(value, Ordering::Relaxed))
    }
}

fn skip<T>(test: &str, reason: &str) -> Option<T> {
    say_skipped(test, reason);
    None
}

fn bytes(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

#[test]
fn takes_a_fresh_userfaultfd_and_nothing_else() {
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    assert!(matches!(Userfault::from_fd(pipe, WRITE_PROTECT_ASYNC), Err(UserfaultError::Kind)));
    let fd = match open() {
        Ok(fd) => fd,
        Err(error) => return say_skipped("taking a userfaultfd", &error.to_string()),
    };
    let copy = fd.try_clone().unwrap();
    let userfault = Userfault::from_fd(fd, WRITE_PROTECT_ASYNC).unwrap();
    let again = Userfault::from_fd(copy, WRITE_PROTECT_ASYNC);
    assert!(matches!(again, Err(UserfaultError::Features { .. })), "{again:?}");
    drop(userfault);
}

#[test]
fn an_optional_feature_that_is_lacking_does_no_harm() {
    const UNKNOWN_FEATURE: u64 = 1 << 50;
    let test = "optional features";
    for (optional, known) in [(UNKNOWN_FEATURE, false), (0, true)] {
        let fd = match open() {
            Ok(fd) => fd,
            Err(error) => return say_skipped(test, &error.to_string()),
        };
        let (_, has) = Userfault::from_fd_with_optional(fd, MISSING, optional).unwrap();
        assert_eq!(has, known);
        assert!(Userfault::open(UNKNOWN_FEATURE).is_err());
    }
}

/// Whatever the size of pages.
fn serves_missing_pages(bench: Bench) {
    let bench = Arc::new(bench);
    assert_eq!(bench.userfault.read(|_| panic!("no thread waits")).unwrap(), 0);
    let reader = bench.read(2);
    assert_eq!(bench.fault(), Fault { address: bench.addresses(2..3).start, write: false, protected: false });
    assert_eq!(bench.copy(2, 0xa5), bench.placed(1, 0));
    assert_eq!(reader.join().unwrap(), bytes(0xa5));
    // Once more: it stays as it is.
    bench.word(2).store(7, Ordering::Relaxed);
    assert_eq!(bench.copy(2, 0x11), bench.placed(0, 1));
    assert_eq!(bench.word(2).load(Ordering::Relaxed), 7);
    // A writer, and pages around one that is there.
    let writer = bench.write(3, 9);
    assert!(bench.fault().write);
    let five = bench.contents(0x42).repeat(5);
    let placed =
        bench.userfault.copy(bench.addresses(0..5).start, &five, bench.page_bytes, IfPresent::Skip).unwrap();
    assert_eq!(placed, bench.placed(4, 1));
    writer.join().unwrap();
    let words = [0, 1, 2, 3, 4].map(|page| bench.word(page).load(Ordering::Relaxed));
    assert_eq!(words, [bytes(0x42), bytes(0x42), 7, 9, bytes(0x42)]);
    // Beyond what was registered there is nothing.
    let beyond = bench.userfault.copy(
        bench.addresses(8..9).start,
        &bench.contents(1),
        bench.page_bytes,
        IfPresent::Skip,
    );
    assert!(is_gone(&beyond.unwrap_err().source));
    // The page is placed through another mapping: the thread that waits for it has to be woken.
    let reader = bench.read(6);
    bench.fault();
    let other = bench.ram.descriptors()[0].try_clone_to_owned().unwrap();
    let other = GuestRam::map(vec![(bench.ram.regions()[0], other)]).unwrap();
    other.populate_write(6 * bench.page_bytes / PAGE_SIZE..7 * bench.page_bytes / PAGE_SIZE).unwrap();
    // If only the caller should place pages, that is an error, behind what could be placed; and no thread is woken.
    let two = bench.contents(0x33).repeat(2);
    let strict = bench
        .userfault
        .copy(bench.addresses(5..7).start, &two, bench.page_bytes, IfPresent::Fail)
        .unwrap_err();
    assert_eq!((strict.placed, is_already_present(&strict.source)), (bench.placed(1, 0), true));
    assert!(!reader.is_finished());
    assert_eq!(bench.copy(6, 0x33), bench.placed(0, 1));
    assert_eq!(reader.join().unwrap(), 0);
    // At the end of registration all go.
    let reader = bench.read(7);
    bench.fault();
    bench.userfault.unregister(bench.addresses(0..8)).unwrap();
    assert_eq!(reader.join().unwrap(), 0);
}

#[test]
fn missing_pages_are_waited_for() {
    if let Some(bench) = Bench::small("missing pages") {
        serves_missing_pages(bench);
    }
}

#[test]
fn missing_huge_pages_are_waited_for() {
    let test = "missing pages of 2 MiB";
    // Each test that needs some takes its own.
    let _pages = match HugePages::reserve(8) {
        Ok(pages) => pages,
        Err(error) => return say_skipped(test, &format!("{error:#}")),
    };
    let bench = Bench::new(test, &Backing::HugeMemfd, HUGE_PAGE, MISSING, Faults::Missing);
    if let Some(bench) = bench {
        serves_missing_pages(bench);
    }
}

#[test]
fn zeros_are_placed_and_waiting_threads_woken() {
    let Some(bench) = Bench::small("placing zeros").map(Arc::new) else { return };
    bench.copy(1, 0xff);
    let reader = bench.read(2);
    bench.fault();
    assert_eq!(bench.userfault.zero(bench.addresses(0..3), IfPresent::Skip).unwrap(), bench.placed(2, 1));
    assert_eq!(reader.join().unwrap(), 0);
    assert_eq!(bench.word(1).load(Ordering::Relaxed), bytes(0xff));
    // Woken for nothing, a thread asks again.
    let reader = bench.read(4);
    let fault = bench.fault();
    bench.userfault.wake(bench.addresses(4..5)).unwrap();
    assert_eq!(bench.fault(), fault);
    bench.copy(4, 1);
    assert_eq!(reader.join().unwrap(), bytes(1));
}

#[test]
fn poisoned_pages_fail_loudly() {
    let test = "poisoning pages";
    let Some(bench) = Bench::new(test, &Backing::Memfd, PAGE_SIZE, MISSING | POISON, Faults::Missing) else {
        return;
    };
    bench.copy(1, 0x77);
    assert_eq!(bench.userfault.poison(bench.addresses(0..8), PAGE_SIZE).unwrap(), bench.placed(7, 1));
    assert_eq!(bench.word(1).load(Ordering::Relaxed), bytes(0x77));
    // The kernel says by an error what would be SIGBUS to a program.
    let (pipe, into) = rustix::pipe::pipe().unwrap();
    let write = |page: u64| {
        // SAFETY: only the kernel reads the slice, and says whether it can.
        let slice = unsafe { std::slice::from_raw_parts(bench.word(page).as_ptr().cast::<u8>(), 8) };
        rustix::io::write(&into, slice)
    };
    assert_eq!(write(1), Ok(8));
    for page in [0, 2, 7] {
        assert!(matches!(write(page), Err(Errno::FAULT | Errno::HWPOISON)), "page {page}");
    }
    drop(pipe);
}

#[test]
fn a_write_to_a_protected_page_waits() {
    let test = "waiting write protection";
    let bench = Bench::new(test, &Backing::Memfd, PAGE_SIZE, WRITE_PROTECT, Faults::WriteProtect);
    let Some(bench) = bench.map(Arc::new) else { return };
    bench.word(3).store(1, Ordering::Relaxed);
    bench.userfault.write_protect(bench.addresses(0..8), true).unwrap();
    assert_eq!(bench.read(3).join().unwrap(), 1);
    let writer = bench.write(3, 2);
    assert_eq!(bench.fault(), Fault { address: bench.addresses(3..4).start, write: true, protected: true });
    assert_eq!(bench.word(3).load(Ordering::Relaxed), 1);
    bench.userfault.write_protect(bench.addresses(3..4), false).unwrap();
    writer.join().unwrap();
    assert_eq!(bench.word(3).load(Ordering::Relaxed), 2);
    // At the end of registration all go.
    let writer = bench.write(4, 5);
    bench.fault();
    bench.userfault.unregister(bench.addresses(0..8)).unwrap();
    writer.join().unwrap();
    bench.write(5, 6).join().unwrap();
}
