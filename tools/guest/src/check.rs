//! The threads that write and check memory.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::counters::{CheckCounters, Order};
use crate::disk;
use crate::memory::map;
use crate::options::BootOptions;
use crate::pattern::{CheckedRegion, PAGE_BYTES};

/// The time between two portions of work. They are small, so that pages become dirty evenly.
const TICK: Duration = Duration::from_millis(10);
/// All threads that write and check memory.
#[derive(Debug)]
pub(crate) struct Checkers {
    counters: Arc<CheckCounters>,
    orders: Mutex<Vec<mpsc::Sender<Order>>>,
}

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
