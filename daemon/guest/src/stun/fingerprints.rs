//! [`Fingerprints`] remember what a guest's memory held at one time, to find what has changed since.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use memlane_kvm::ram::GuestRam;
use memlane_net::task;
use memlane_protocol::{PAGE_SIZE, PageSet};
use xxhash_rust::xxh3::xxh3_64;

use crate::{DriverError, Harvest};

/// This many threads look at memory.
const THREADS: u64 = 4;

/// XXH3-64 of every page that is data. Holes count as zeros and stay holes.
///
/// The guest may write meanwhile: the print of a page that is being written may be of any mixture.
pub(super) struct Fingerprints(Vec<Extent>);

/// A run of data, with a print of each of its pages.
struct Extent {
    first: u64,
    prints: Vec<u64>,
}

impl Fingerprints {
    /// Looks at all of `ram`.
    ///
    /// # Errors
    ///
    /// Fails if the memory cannot be read.
    pub(super) async fn take(ram: Arc<GuestRam>) -> Result<Self, DriverError> {
        let look = move || in_shares(&ram, &|pages| look_at(&ram, pages));
        let shares = task::aside(look).await;
        Ok(Self(shares.map_err(failed)?.into_iter().flatten().collect()))
    }

    /// Looks again, and adds the pages that hold something else now to `into`.
    ///
    /// # Errors
    ///
    /// Fails if the memory cannot be read.
    pub(super) async fn compare(self, ram: Arc<GuestRam>, into: &PageSet) -> Result<Harvest, DriverError> {
        let compare = move || {
            let changed = PageSet::new(ram.pages());
            let holes = AtomicBool::new(false);
            in_shares(&ram, &|pages| {
                let now = Self(look_at(&ram, pages.clone())?);
                self.changed_since(&now, pages, |page, hole| {
                    changed.insert_range(ram.whole(page..page + 1));
                    holes.fetch_or(hole, Ordering::Relaxed);
                });
                Ok(())
            })?;
            Ok((changed, holes.into_inner()))
        };
        let (changed, holes) = task::aside(compare).await.map_err(failed)?;
        let mut new = 0;
        task::in_pieces(changed.pages(), |piece| new += changed.drain_into(piece, into)).await;
        Ok(Harvest { new, holes })
    }

    /// Calls `tell` for the pages of `pages` that are not `now` what they were, with whether each is a hole now.
    fn changed_since(&self, now: &Self, pages: Range<u64>, mut tell: impl FnMut(u64, bool)) {
        let zero = xxh3_64(&[0; PAGE_SIZE as usize]);
        for (page, print) in now.within(&pages) {
            if self.of(page).unwrap_or(zero) != print {
                tell(page, false);
            }
        }
        for (page, print) in self.within(&pages) {
            if print != zero && now.of(page).is_none() {
                tell(page, true);
            }
        }
    }

    /// Returns the print of a page, or `None` if it is a hole.
    fn of(&self, page: u64) -> Option<u64> {
        let index = self.0.partition_point(|extent| extent.first <= page).checked_sub(1)?;
        let Extent { first, prints } = &self.0[index];
        prints.get((page - first) as usize).copied()
    }

    /// Returns the prints of those of `pages` that are data.
    fn within<'a>(&'a self, pages: &Range<u64>) -> impl Iterator<Item = (u64, u64)> + use<'a> {
        let pages = pages.clone();
        let from = self.0.partition_point(|extent| extent.first + extent.prints.len() as u64 <= pages.start);
        let extents = self.0[from..].iter().take_while(move |extent| extent.first < pages.end);
        let all = extents.flat_map(|extent| (extent.first..).zip(extent.prints.iter().copied()));
        all.filter(move |(page, _)| pages.contains(page))
    }
}

fn failed(error: io::Error) -> DriverError {
    let reason = format!("cannot look at the guest's memory: {error}");
    DriverError::Failed { request: "start tracking", reason }
}

/// Has threads do `work` for a share of the pages each. Returns their results in order.
fn in_shares<T: Send>(
    ram: &GuestRam,
    work: &(dyn Fn(Range<u64>) -> io::Result<T> + Sync),
) -> io::Result<Vec<T>> {
    let share = ram.pages().div_ceil(THREADS).max(1);
    thread::scope(|scope| {
        let shares = (0..ram.pages()).step_by(share as usize);
        let workers: Vec<_> =
            shares.map(|first| scope.spawn(move || work(first..ram.pages().min(first + share)))).collect();
        let found: io::Result<_> =
            workers.into_iter().map(|worker| worker.join().expect("looking does not panic")).collect();
        found.and_then(|found| ram.intact().map(|()| found))
    })
}

/// Makes prints of what is data.
fn look_at(ram: &GuestRam, pages: Range<u64>) -> io::Result<Vec<Extent>> {
    let mut page_bytes = [0; PAGE_SIZE as usize];
    let extents = ram.data_extents(pages)?.into_iter().map(|data| {
        let first = data.start;
        let prints = data.map(|page| {
            ram.copy_page(page, &mut page_bytes);
            xxh3_64(&page_bytes)
        });
        Extent { first, prints: prints.collect() }
    });
    Ok(extents.collect())
}

#[cfg(test)]
mod tests {
    use memlane_kvm::ram::Backing;

    use super::*;

    fn write(ram: &GuestRam, pages: Range<u64>, byte: u8) {
        for slice in ram.slices(pages) {
            // SAFETY: mapped as long as `ram` lives, and only this test uses it.
            unsafe { slice.ptr.add(77).write(byte) };
        }
    }

    #[test]
    fn every_change_is_found_and_nothing_else() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let ram = GuestRam::create(&[(0, 5 << 20), (16 << 20, 3 << 20)], &Backing::Memfd).unwrap();
            let ram = Arc::new(ram);
            for page in [3, 700, 1279, 1280, 2047] {
                write(&ram, page..page + 1, 7);
            }
            let changed = PageSet::new(ram.pages());
            let before = Fingerprints::take(ram.clone()).await.unwrap();
            let compare = async |before: Fingerprints| before.compare(ram.clone(), &changed).await.unwrap();
            assert_eq!(compare(before).await, Harvest::default());

            let before = Fingerprints::take(ram.clone()).await.unwrap();
            // Written, come into being, and zeros that have: the last are no change.
            write(&ram, 1279..1280, 8);
            write(&ram, 1500..1501, 1);
            write(&ram, 40..41, 0);
            assert_eq!(compare(before).await, Harvest { new: 2, holes: false });
            assert_eq!(changed.runs().flatten().collect::<Vec<_>>(), [1279, 1500]);

            let before = Fingerprints::take(ram.clone()).await.unwrap();
            ram.punch(3..50).unwrap();
            assert_eq!(compare(before).await, Harvest { new: 1, holes: true });
            assert!(changed.contains(3));
        });
    }
}
