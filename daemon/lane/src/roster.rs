//! The lanes that send for one migration: how they are woken, and what they know of each other.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::event::{EventfdFlags, eventfd};

/// All lanes that there are. They come and go.
#[derive(Default)]
pub struct Roster {
    seats: Mutex<Vec<Weak<Seat>>>,
    taken: AtomicU64,
}

/// One lane's place among the others; given up when it is dropped.
pub struct Seat {
    waker: OwnedFd,
    doubtful: AtomicBool,
    bytes_per_second: AtomicU64,
    /// Lanes that came before.
    before: u64,
}

impl Roster {
    /// For one lane more.
    pub fn take(&self) -> io::Result<Arc<Seat>> {
        let waker = eventfd(0, EventfdFlags::CLOEXEC)?;
        let before = self.taken.fetch_add(1, Ordering::Relaxed);
        let seat = Arc::new(Seat {
            waker,
            doubtful: AtomicBool::new(false),
            bytes_per_second: AtomicU64::new(0),
            before,
        });
        let mut seats = self.seats.lock().unwrap_or_else(PoisonError::into_inner);
        seats.retain(|seat| seat.strong_count() > 0);
        seats.push(Arc::downgrade(&seat));
        Ok(seat)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.seats().len()
    }

    /// What all of them deliver together, as far as they know.
    pub fn bytes_per_second(&self) -> u64 {
        self.seats().iter().map(|seat| seat.bytes_per_second.load(Ordering::Relaxed)).sum()
    }

    /// Wakes all of them.
    pub fn wake(&self) {
        self.seats().iter().for_each(|seat| seat.wake());
    }

    /// Whether a lane other than the one on `own` is well, as far as it knows.
    pub fn others_are_well(&self, own: &Seat) -> bool {
        let well = |seat: &Arc<Seat>| !std::ptr::eq(&**seat, own) && !seat.doubtful.load(Ordering::Relaxed);
        self.seats().iter().any(well)
    }

    fn seats(&self) -> Vec<Arc<Seat>> {
        // The list is whole whenever somebody may panic.
        self.seats.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect()
    }
}

impl Seat {
    /// Wakes the lane.
    pub fn wake(&self) {
        // An eventfd that is already rung refuses nothing but a counter overflow.
        let _ = rustix::io::write(&self.waker, &1u64.to_ne_bytes());
    }

    /// Tells the others whether an answer is overdue on this lane.
    pub fn set_doubtful(&self, doubtful: bool) {
        self.doubtful.store(doubtful, Ordering::Relaxed);
    }

    /// Tells the others what this lane delivers at its best.
    pub fn set_bytes_per_second(&self, rate: u64) {
        self.bytes_per_second.store(rate, Ordering::Relaxed);
    }

    /// Where the lane begins among `pages` pages: far from all others, however many there are.
    pub fn beginning(&self, pages: u64) -> u64 {
        /// Multiples of the golden ratio lie apart, modulo 1. Here 1 is 2^32.
        const GOLDEN: u64 = 0x9e37_79b9;
        let share = self.before.wrapping_mul(GOLDEN) & 0xffff_ffff;
        ((u128::from(pages) * u128::from(share)) >> 32) as u64
    }
}

impl AsFd for Seat {
    /// What is rung to wake the lane.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waker.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_know_of_each_other_while_they_last() {
        let roster = Roster::default();
        let first = roster.take().unwrap();
        assert!(!roster.others_are_well(&first), "there are no others");
        let second = roster.take().unwrap();
        assert!(roster.others_are_well(&first) && roster.len() == 2);
        second.set_doubtful(true);
        assert!(!roster.others_are_well(&first) && roster.others_are_well(&second));
        second.set_doubtful(false);
        drop(second);
        assert!(!roster.others_are_well(&first) && roster.len() == 1);
    }

    #[test]
    fn lanes_begin_apart() {
        let roster = Roster::default();
        let seats: Vec<_> = (0..8).map(|_| roster.take().unwrap()).collect();
        let mut beginnings: Vec<u64> = seats.iter().map(|seat| seat.beginning(1000)).collect();
        assert_eq!(beginnings[0], 0);
        beginnings.sort_unstable();
        beginnings.push(1000);
        assert!(beginnings.windows(2).all(|pair| pair[1] - pair[0] >= 50), "{beginnings:?}");
    }
}
