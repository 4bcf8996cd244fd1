//! [`DataExtentCache`]: data extents of a guest's files that were found lately.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The number of extents that are remembered: as many as there may be threads, each within an extent of its own.
const MAX_EXTENTS: usize = 16;

/// The extents of data that were found last. A caller that goes through a long extent piece by piece has the
/// kernel look for its end once, and not once for each piece: `SEEK_HOLE` (lseek(2)) walks to the next hole,
/// however far that is.
///
/// Another process may have made holes since. To take those for data is safe: they are read as zeros, at the price
/// of the memory that reading allocates. The beginning of an extent is asked for anew each time, so that a caller
/// that goes through memory again learns of them.
#[derive(Debug, Default)]
pub(super) struct DataExtentCache(Mutex<Vec<Range<u64>>>);

impl DataExtentCache {
    /// Returns where the extent ends that `page` lies in, unless the extent begins there.
    pub(super) fn end_of_extent(&self, page: u64) -> Option<u64> {
        self.extents().iter().find(|extent| extent.start < page && page < extent.end).map(|extent| extent.end)
    }

    /// Adds an extent that was found: `found` is data, and the page after it is not.
    pub(super) fn insert(&self, mut found: Range<u64>) {
        let mut extents = self.extents();
        if let Some(before) =
            extents.iter().find(|extent| extent.start < found.start && extent.end >= found.start)
        {
            found.start = before.start;
        }
        // An extent that reaches beyond the hole that was found is out of date.
        extents.retain(|extent| extent.end < found.start || extent.start > found.end);
        extents.truncate(MAX_EXTENTS - 1);
        extents.insert(0, found);
    }

    /// Removes `holes` from the extents.
    pub(super) fn remove(&self, holes: &Range<u64>) {
        for extent in self.extents().iter_mut() {
            let (before, after) =
                (extent.start..extent.end.min(holes.start), extent.start.max(holes.end)..extent.end);
            let length = |extent: &Range<u64>| extent.end.saturating_sub(extent.start);
            *extent = if length(&before) >= length(&after) { before } else { after };
        }
    }

    fn extents(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        // A thread that panicked left only extents behind that were found.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_known_inside_and_grow_shrink_and_go() {
        let cache = DataExtentCache::default();
        assert_eq!(cache.end_of_extent(5), None);
        cache.insert(2..10);
        assert_eq!(
            [1, 2, 3, 9, 10].map(|page| cache.end_of_extent(page)),
            [None, None, Some(10), Some(10), None]
        );
        cache.insert(10..20);
        cache.insert(30..40);
        assert_eq!(
            [3, 10, 19, 35].map(|page| cache.end_of_extent(page)),
            [Some(20), Some(20), Some(20), Some(40)]
        );
        // A hole was made: a walk from the beginning finds it.
        cache.insert(2..6);
        assert_eq!([3, 6, 7, 35].map(|page| cache.end_of_extent(page)), [Some(6), None, None, Some(40)]);
        cache.remove(&(31..36));
        assert_eq!([31, 35, 36, 37].map(|page| cache.end_of_extent(page)), [None, None, None, Some(40)]);
        cache.remove(&(0..100));
        assert_eq!([3, 37].map(|page| cache.end_of_extent(page)), [None, None]);
    }

    #[test]
    fn the_oldest_extent_makes_room() {
        let cache = DataExtentCache::default();
        for number in 0..100 {
            cache.insert(number * 10..number * 10 + 5);
            assert!(cache.extents().len() <= MAX_EXTENTS);
        }
        assert_eq!(
            [1, 831, 841, 991].map(|page| cache.end_of_extent(page)),
            [None, None, Some(845), Some(995)]
        );
    }
}
