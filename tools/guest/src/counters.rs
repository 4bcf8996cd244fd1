//! What the checking threads share: their counters, and the orders to them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use crate::pattern::Mismatch;

/// The number of failures that are printed. A guest with damaged memory would otherwise fill its console for hours.
const MOST_COMPLAINTS: u64 = 20;

/// An order to check everything now. Its channel is closed when that is done.
pub(crate) type Order = mpsc::Sender<()>;

/// The counters of the threads.
#[derive(Debug, Default)]
pub(crate) struct CheckCounters {
    /// The number of pages, and of pieces of a disk, that were checked and found as they should be.
    pub passes: AtomicU64,
    /// The number of pages, and of pieces of a disk, that were checked and found different.
    pub failures: AtomicU64,
}

impl CheckCounters {
    /// Counts a page that was checked.
    pub(crate) fn count(&self, checked: Result<(), Mismatch>) {
        let wrong = checked.err();
        self.note(wrong.map(|Mismatch { page, word, expected, found }| {
            format!("word {word} of page {page} is {found:#018x}, not {expected:#018x}")
        }));
    }

    /// Counts something that was checked; `wrong` says what is wrong with it.
    pub(crate) fn note(&self, wrong: Option<String>) {
        let Some(wrong) = wrong else {
            self.passes.fetch_add(1, Ordering::Relaxed);
            return;
        };
        if self.failures.fetch_add(1, Ordering::Relaxed) < MOST_COMPLAINTS {
            println!("memlane-init: CHECK FAILED: {wrong}");
        }
    }
}
