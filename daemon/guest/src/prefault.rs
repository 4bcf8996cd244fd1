//! This module maps a guest's memory when its VMM attaches, so that it need not be mapped while it is sent or received.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use memlane_kvm::ram::GuestRam;
use memlane_protocol::PAGE_SIZE;
use tokio::sync::watch;
use tracing::{debug, warn};

/// This many pages are mapped in one go, and other threads that change this process's mappings wait for that long. For
/// the same reason the thread has no lower priority than others: on a busy host they would all wait for it.
const PIECE_PAGES: u64 = (4 << 20) / PAGE_SIZE;

/// A thread that maps a guest's memory into this process. The thread ends by itself when its work is done or the memory
/// is gone, and soon after this is dropped.
pub(crate) struct Prefault {
    stop: Arc<AtomicBool>,
    /// The sending end is dropped when the thread touches the memory no more.
    ended: watch::Receiver<()>,
}

impl Prefault {
    /// Maps into this process, in the background, the memory that the VMM has taken already: that of a guest that runs
    /// when the daemon is started anew, or all memory of a VMM that was told to take it before its guest comes. A page
    /// that is received where there is no mapping costs a fault, which is more than receiving it. No memory is taken
    /// for pages that were never touched.
    pub(crate) fn start(guest: String, ram: &Arc<GuestRam>) -> Self {
        let ram = Arc::downgrade(ram);
        let stop = Arc::new(AtomicBool::new(false));
        let (running, ended) = watch::channel(());
        let stopped = stop.clone();
        let work = move || {
            match map_held(&ram, &stopped) {
                Ok(()) => debug!(guest, "the guest's memory is mapped"),
                Err(error) => {
                    debug!(guest, %error, "cannot map the guest's memory ahead; it is slower to receive")
                }
            }
            drop(running);
        };
        if let Err(error) = std::thread::Builder::new().name("map-ahead".into()).spawn(work) {
            warn!(%error, "cannot start a thread that maps a guest's memory");
        }
        Self { stop, ended }
    }

    /// Ends the thread, and returns when it touches the memory no more. A task that makes holes which have to stay
    /// holes waits for that: mapping a page brings it into being.
    pub(crate) async fn stop(self) {
        let mut ended = self.ended.clone();
        drop(self);
        // An error is what tells the end: nothing is ever sent.
        while ended.changed().await.is_ok() {}
    }
}

impl Drop for Prefault {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Maps until all is mapped, until `stop` is set, or until the memory is gone.
fn map_held(ram: &Weak<GuestRam>, stop: &AtomicBool) -> io::Result<()> {
    let extents = match ram.upgrade() {
        Some(ram) => ram.data_extents(0..ram.pages())?,
        None => Vec::new(),
    };
    for extent in extents {
        for first in extent.clone().step_by(PIECE_PAGES as usize) {
            #[cfg(debug_assertions)]
            dawdle();
            let Some(ram) = ram.upgrade().filter(|_| !stop.load(Ordering::Relaxed)) else { return Ok(()) };
            ram.populate_read(first..(first + PIECE_PAGES).min(extent.end))?;
        }
    }
    Ok(())
}

/// Waits, in debug builds only, for the milliseconds in `MEMLANE_DEBUG_MAP_AHEAD_MS` before each piece, so that tests
/// find a guest's memory being mapped when it is migrated.
#[cfg(debug_assertions)]
fn dawdle() {
    let wait = std::env::var("MEMLANE_DEBUG_MAP_AHEAD_MS").ok().and_then(|wait| wait.parse().ok());
    std::thread::sleep(std::time::Duration::from_millis(wait.unwrap_or_default()));
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use memlane_kvm::ram::Backing;

    use super::*;

    #[test]
    fn what_is_held_is_mapped_and_nothing_is_taken() {
        let go_on = AtomicBool::new(false);
        let ram = Arc::new(GuestRam::create(&[(0, 8 << 20)], &Backing::Memfd).unwrap());
        ram.populate_write(100..164).unwrap();
        map_held(&Arc::downgrade(&ram), &go_on).unwrap();
        assert_eq!(ram.data_extents(0..ram.pages()).unwrap(), vec![100..164]);
        let gone = Arc::downgrade(&ram);
        drop(ram);
        map_held(&gone, &go_on).unwrap();
    }

    #[tokio::test]
    async fn what_is_dropped_after_it_was_stopped_stays_away() {
        let ram = Arc::new(GuestRam::create(&[(0, 256 << 20)], &Backing::Memfd).unwrap());
        let all = 0..ram.pages();
        ram.populate_write(all.clone()).unwrap();
        let ahead = Prefault::start("web1".into(), &ram);
        ahead.stop().await;
        // All but a page here and there, so that nothing passes for empty.
        let apart = 100;
        for first in all.clone().step_by(apart as usize) {
            ram.punch(first + 1..(first + apart).min(all.end)).unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
        let held = ram.data_extents_uncached(all).unwrap();
        assert!(held.iter().all(|extent| extent.end - extent.start == 1), "{held:?}");
    }
}
