//! Wakers of the lanes that send for one migration, through which lanes also learn of each other's condition.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::event::{EventfdFlags, eventfd};

/// The wakers of all lanes of a migration. Lanes come and go.
#[derive(Default)]
pub(crate) struct Wakers {
    wakers: Mutex<Vec<Weak<Waker>>>,
    taken: AtomicU64,
}

/// Wakes one lane, and publishes the lane's condition. The lane belongs to the migration until this is dropped.
pub struct Waker {
    eventfd: OwnedFd,
    doubtful: AtomicBool,
    bytes_per_second: AtomicU64,
    /// This many lanes were added before this one.
    before: u64,
}

impl Wakers {
    /// Adds a lane and returns its waker.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses an eventfd.
    pub(crate) fn take(&self) -> io::Result<Arc<Waker>> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC)?;
        let before = self.taken.fetch_add(1, Ordering::Relaxed);
        let waker = Arc::new(Waker {
            eventfd,
            doubtful: AtomicBool::new(false),
            bytes_per_second: AtomicU64::new(0),
            before,
        });
        let mut wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        wakers.retain(|waker| waker.strong_count() > 0);
        wakers.push(Arc::downgrade(&waker));
        Ok(waker)
    }

    /// Returns the number of lanes.
    pub(crate) fn len(&self) -> usize {
        self.wakers().len()
    }

    /// Returns how many bytes per second all lanes deliver together, as far as they know.
    pub(crate) fn bytes_per_second(&self) -> u64 {
        self.wakers().iter().map(|waker| waker.bytes_per_second.load(Ordering::Relaxed)).sum()
    }

    /// Wakes all lanes.
    pub(crate) fn wake(&self) {
        self.wakers().iter().for_each(|waker| waker.wake());
    }

    /// Returns whether a lane other than the one of `own` is well, as far as that lane knows.
    pub(crate) fn others_are_well(&self, own: &Waker) -> bool {
        let well =
            |waker: &Arc<Waker>| !std::ptr::eq(&**waker, own) && !waker.doubtful.load(Ordering::Relaxed);
        self.wakers().iter().any(well)
    }

    fn wakers(&self) -> Vec<Arc<Waker>> {
        // No code panics while the list is half changed.
        self.wakers.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect()
    }
}

impl Waker {
    /// Wakes the lane.
    pub fn wake(&self) {
        // The write fails only if the counter would overflow, and then the lane is woken anyway.
        let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
    }

    /// Publishes whether an answer is overdue on this lane.
    pub fn set_doubtful(&self, doubtful: bool) {
        self.doubtful.store(doubtful, Ordering::Relaxed);
    }

    /// Publishes how many bytes per second this lane delivers at its best.
    pub fn set_bytes_per_second(&self, rate: u64) {
        self.bytes_per_second.store(rate, Ordering::Relaxed);
    }

    /// Returns the page among `pages` pages where the lane begins: far from the beginnings of all other lanes, however
    /// many there are.
    pub fn beginning(&self, pages: u64) -> u64 {
        /// Multiples of the golden ratio lie apart, modulo 1. Here 1 is 2^32.
        const GOLDEN: u64 = 0x9e37_79b9;
        let share = self.before.wrapping_mul(GOLDEN) & 0xffff_ffff;
        ((u128::from(pages) * u128::from(share)) >> 32) as u64
    }
}

impl AsFd for Waker {
    /// Returns the eventfd that becomes readable when the lane is woken.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_know_of_each_other_while_they_last() {
        let wakers = Wakers::default();
        let first = wakers.take().unwrap();
        assert!(!wakers.others_are_well(&first), "there are no others");
        let second = wakers.take().unwrap();
        assert!(wakers.others_are_well(&first) && wakers.len() == 2);
        second.set_doubtful(true);
        assert!(!wakers.others_are_well(&first) && wakers.others_are_well(&second));
        second.set_doubtful(false);
        drop(second);
        assert!(!wakers.others_are_well(&first) && wakers.len() == 1);
    }

    #[test]
    fn lanes_begin_apart() {
        let wakers = Wakers::default();
        let wakers: Vec<_> = (0..8).map(|_| wakers.take().unwrap()).collect();
        let mut beginnings: Vec<u64> = wakers.iter().map(|waker| waker.beginning(1000)).collect();
        assert_eq!(beginnings[0], 0);
        beginnings.sort_unstable();
        beginnings.push(1000);
        assert!(beginnings.windows(2).all(|pair| pair[1] - pair[0] >= 50), "{beginnings:?}");
    }
}
