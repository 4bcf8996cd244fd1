//! The threads that write and check memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

use crate::disk;
use crate::options::BootOptions;
use crate::pattern::{CheckedRegion, Mismatch, PAGE_BYTES};

/// The time between two portions of work. They are small, so that pages become dirty evenly.
const TICK: Duration = Duration::from_millis(10);
/// The number of mismatches that are printed. A guest with damaged memory would otherwise fill its console for hours.
const MOST_COMPLAINTS: u64 = 20;

/// The counters of the threads.
#[derive(Debug, Default)]
pub(crate) struct CheckCounters {
    /// The number of pages, and of pieces of a disk, that were checked and found as they should be.
    pub passes: AtomicU64,
    /// The number of pages, and of pieces of a disk, that were checked and found different.
    pub failures: AtomicU64,
}

/// All threads that write and check memory.
#[derive(Debug)]
pub(crate) struct Checkers {
    counters: Arc<CheckCounters>,
    orders: Mutex<Vec<mpsc::Sender<Order>>>,
}

/// An order to check all pages now. Its channel is closed when that is done.
pub(crate) type Order = mpsc::Sender<()>;

impl Checkers {
    /// Takes memory, writes all of it once, and starts the threads.
    pub(crate) fn start(options: &BootOptions) -> Result<Self, String> {
        let counters = Arc::new(CheckCounters::default());
        let pages = options.memory_bytes / PAGE_BYTES / options.checkers;
        let filling: Vec<_> = (0..options.checkers)
            .map(|number| {
                std::thread::spawn(move || Ok(CheckedRegion::fill(map(pages * PAGE_BYTES)?, number * pages)))
            })
            .collect();
        let mut orders = Vec::new();
        for (number, filled) in (0..options.checkers).zip(filling) {
            let region: Result<CheckedRegion, String> =
                filled.join().map_err(|_| "a checker has panicked")?;
            let region = region?;
            let (sender, receiver) = mpsc::channel();
            orders.push(sender);
            // What cannot be divided evenly is done by the first ones.
            let rate = (options.rate + options.checkers - 1 - number) / options.checkers;
            let counters = counters.clone();
            std::thread::spawn(move || check(region, rate, &receiver, &counters));
        }
        for disk in &options.disks {
            orders.extend(disk::start(disk, &counters)?);
        }
        Ok(Self { counters, orders: Mutex::new(orders) })
    }

    /// Returns the number of pages that passed, and of pages that failed.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.counters.passes.load(Ordering::Relaxed), self.counters.failures.load(Ordering::Relaxed))
    }

    /// Checks all pages, and returns when that is done.
    pub(crate) fn check_all(&self) {
        let (done, all_done) = mpsc::channel();
        for order in self.orders.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // A checker never ends.
            let _ = order.send(done.clone());
        }
        drop(done);
        all_done.iter().for_each(drop);
    }
}

/// Maps memory whose pages exist once they are touched.
pub(crate) fn map(bytes: u64) -> Result<&'static mut [u64], String> {
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
    // SAFETY: a new mapping at a place of the kernel's choice.
    let address = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes as usize, access, flags) }
        .map_err(|error| format!("taking {bytes} bytes of memory to check: {error}"))?;
    // SAFETY: the mapping is of this length, zeroed, aligned to a page, ours alone, and never given back.
    Ok(unsafe { std::slice::from_raw_parts_mut(address.cast(), bytes as usize / size_of::<u64>()) })
}

fn check(mut region: CheckedRegion, rate: u64, orders: &mpsc::Receiver<Order>, counters: &CheckCounters) {
    let mut due = 0.0;
    let mut last = Instant::now();
    loop {
        match orders.recv_timeout(TICK) {
            Ok(done) => {
                for page in 0..region.pages() {
                    counters.count(region.check(page));
                }
                // Who asked may have hung up.
                let _ = done.send(());
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        // What was missed while something else had the processor is missed, but for a little.
        let elapsed = last.elapsed().min(4 * TICK);
        last = Instant::now();
        due += elapsed.as_secs_f64() * rate as f64;
        while due >= 1.0 {
            due -= 1.0;
            region.step().into_iter().for_each(|checked| counters.count(checked));
        }
    }
}

impl CheckCounters {
    /// Counts what was read from a disk and found as it should be, or different.
    pub(crate) fn count_read(&self, passed: bool) {
        let counter = if passed { &self.passes } else { &self.failures };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self, checked: Result<(), Mismatch>) {
        let Err(Mismatch { page, word, expected, found }) = checked else {
            self.passes.fetch_add(1, Ordering::Relaxed);
            return;
        };
        if self.failures.fetch_add(1, Ordering::Relaxed) < MOST_COMPLAINTS {
            println!(
                "memlane-init: CHECK FAILED: word {word} of page {page} is {found:#018x}, not {expected:#018x}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_check_looks_at_every_page() {
        let options = BootOptions::for_test(96 * PAGE_BYTES, 3, 0);
        let checkers = Checkers::start(&options).unwrap();
        checkers.check_all();
        assert_eq!(checkers.counts(), (96, 0));
    }

    #[test]
    fn pages_are_written_and_checked_all_the_time() {
        let checkers = Checkers::start(&BootOptions::for_test(8 * PAGE_BYTES, 2, 1000)).unwrap();
        while checkers.counts().0 < 20 {
            std::thread::sleep(TICK);
        }
        assert_eq!(checkers.counts().1, 0);
    }
}
