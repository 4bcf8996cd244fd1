//! [`Fingerprints`]: what a guest's memory held at one time, to find what has changed since.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use memlane_kvm::ram::GuestRam;
use memlane_protocol::{PAGE_SIZE, PageSet};
use xxhash_rust::xxh3::xxh3_64;

use crate::guest::{DriverError, Harvest};

/// Threads that look.
const THREADS: u64 = 4;

/// XXH3-64 of every page. Holes count as zeros and stay holes.
///
/// The guest may write meanwhile: what a page that is being written is taken for, nobody knows.
pub struct Fingerprints(Vec<u64>);

impl Fingerprints {
    /// Looks at all of `ram`.
    pub async fn take(ram: Arc<GuestRam>) -> Result<Self, DriverError> {
        let look = move || {
            let mut prints = vec![0; ram.pages() as usize];
            look_at_all(&ram, &mut prints, &|_, _, print, now| *print = now.print)?;
            Ok(Self(prints))
        };
        tokio::task::spawn_blocking(look).await.expect("looking does not panic").map_err(failed)
    }

    /// Looks again, and adds the pages that hold something else now to `into`.
    pub async fn compare(mut self, ram: Arc<GuestRam>, into: &PageSet) -> Result<Harvest, DriverError> {
        let compare = move || {
            let changed = PageSet::new(ram.pages());
            let holes = AtomicBool::new(false);
            look_at_all(&ram, &mut self.0, &|ram, page, print, now| {
                if *print != now.print {
                    changed.insert_range(ram.whole(page..page + 1));
                    holes.fetch_or(now.hole, Ordering::Relaxed);
                }
            })?;
            Ok((changed, holes.into_inner()))
        };
        let compared = tokio::task::spawn_blocking(compare).await.expect("looking does not panic");
        let (changed, holes) = compared.map_err(failed)?;
        Ok(Harvest { new: changed.drain_into(0..changed.pages(), into), holes })
    }
}

fn failed(error: io::Error) -> DriverError {
    let reason = format!("cannot look at the guest's memory: {error}");
    DriverError::Failed { request: "start tracking", reason }
}

/// A page as it is now.
#[derive(Clone, Copy)]
struct Seen {
    print: u64,
    hole: bool,
}

/// What is done with a page, and with what was kept of it.
type Visit<'a> = &'a (dyn Fn(&GuestRam, u64, &mut u64, Seen) + Sync);

fn look_at_all(ram: &GuestRam, kept: &mut [u64], visit: Visit<'_>) -> io::Result<()> {
    let share = ram.pages().div_ceil(THREADS).max(1);
    thread::scope(|scope| {
        let shares = kept.chunks_mut(share as usize).zip((0..).step_by(share as usize));
        let workers: Vec<_> =
            shares.map(|(kept, first)| scope.spawn(move || look_at(ram, first, kept, visit))).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("looking does not panic"))
    })
}

/// Looks at the pages from `first` on, of which `kept` keeps something.
fn look_at(ram: &GuestRam, first: u64, kept: &mut [u64], visit: Visit<'_>) -> io::Result<()> {
    let mut page_bytes = [0; PAGE_SIZE as usize];
    let hole = Seen { print: xxh3_64(&page_bytes), hole: true };
    let pages = first..first + kept.len() as u64;
    let mut visit = |page: u64, seen| visit(ram, page, &mut kept[(page - first) as usize], seen);
    let mut next = pages.start;
    for data in ram.data_extents(pages.clone())? {
        (next..data.start).for_each(|page| visit(page, hole));
        next = data.end;
        for page in data {
            ram.copy_page(page, &mut page_bytes);
            visit(page, Seen { print: xxh3_64(&page_bytes), hole: false });
        }
    }
    (next..pages.end).for_each(|page| visit(page, hole));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use memlane_kvm::ram::Backing;

    use super::*;

    fn write(ram: &GuestRam, pages: Range<u64>, byte: u8) {
        for slice in ram.slices(pages) {
            // SAFETY: mapped as long as `ram` lives, and nobody else uses it.
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
