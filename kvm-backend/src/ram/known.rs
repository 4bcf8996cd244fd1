//! [`KnownData`]: runs of pages that were seen to be data.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Runs that are remembered: as many as there may be threads, each within a run of its own.
const RUNS: usize = 16;

/// The runs of data that were found last, so that whoever goes through a long one piece by
/// piece has the kernel look for its end once, and not once a piece: `SEEK_HOLE` walks to the
/// next hole, however far that is.
///
/// Another process may have made holes since. To take those for data is safe: they are read as
/// zeros, at the price of the memory that reading brings into being. The beginning of a run is
/// asked for anew each time, so whoever goes through memory again learns of them.
#[derive(Debug, Default)]
pub(super) struct KnownData(Mutex<Vec<Range<u64>>>);

impl KnownData {
    /// Where the run ends that `page` lies in, unless the run begins there.
    pub(super) fn end_of_run(&self, page: u64) -> Option<u64> {
        self.runs().iter().find(|run| run.start < page && page < run.end).map(|run| run.end)
    }

    /// Notes what was found: `found` is data, and the page after it is not.
    pub(super) fn note(&self, mut found: Range<u64>) {
        let mut runs = self.runs();
        if let Some(before) = runs.iter().find(|run| run.start < found.start && run.end >= found.start) {
            found.start = before.start;
        }
        // What reaches beyond the hole that was found is out of date.
        runs.retain(|run| run.end < found.start || run.start > found.end);
        runs.truncate(RUNS - 1);
        runs.insert(0, found);
    }

    /// Forgets `holes`.
    pub(super) fn forget(&self, holes: &Range<u64>) {
        for run in self.runs().iter_mut() {
            let (before, after) = (run.start..run.end.min(holes.start), run.start.max(holes.end)..run.end);
            let length = |run: &Range<u64>| run.end.saturating_sub(run.start);
            *run = if length(&before) >= length(&after) { before } else { after };
        }
    }

    fn runs(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        // Whatever a thread left behind when it panicked: every run in it was found.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_known_inside_and_grow_shrink_and_go() {
        let known = KnownData::default();
        assert_eq!(known.end_of_run(5), None);
        known.note(2..10);
        assert_eq!(
            [1, 2, 3, 9, 10].map(|page| known.end_of_run(page)),
            [None, None, Some(10), Some(10), None]
        );
        known.note(10..20);
        known.note(30..40);
        assert_eq!(
            [3, 10, 19, 35].map(|page| known.end_of_run(page)),
            [Some(20), Some(20), Some(20), Some(40)]
        );
        // Someone made a hole: a walk from the beginning finds it.
        known.note(2..6);
        assert_eq!([3, 6, 7, 35].map(|page| known.end_of_run(page)), [Some(6), None, None, Some(40)]);
        known.forget(&(31..36));
        assert_eq!([31, 35, 36, 37].map(|page| known.end_of_run(page)), [None, None, None, Some(40)]);
        known.forget(&(0..100));
        assert_eq!([3, 37].map(|page| known.end_of_run(page)), [None, None]);
    }

    #[test]
    fn the_oldest_run_makes_room() {
        let known = KnownData::default();
        for number in 0..100 {
            known.note(number * 10..number * 10 + 5);
            assert!(known.runs().len() <= RUNS);
        }
        assert_eq!([1, 831, 841, 991].map(|page| known.end_of_run(page)), [None, None, Some(845), Some(995)]);
    }
}
