//! A cable with a delay, and with losses if asked for: a thread that carries packets between two tun interfaces.
//!
//! It stands in for netem, which few kernels of test machines have.

mod queue;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::namespace::Namespace;
use crate::tun::Tun;

use queue::Queue;

/// A cable holds at most what this many bytes a second (20 Gbit/s) put into it during its delay, plus [`LITTLE_BYTES`],
/// in each direction. More is lost, as at a switch whose buffer is full.
const MAX_BYTES_PER_SECOND: f64 = 2.5e9;
const LITTLE_BYTES: usize = 4 << 20;
const MAX_QUEUE_BYTES: usize = 512 << 20;
/// The number of packets that are taken from one end before the other end has its turn.
const AT_ONCE: usize = 64;

/// The longest delay that a cable may have.
pub(crate) const MAX_DELAY: Duration = Duration::from_secs(10);

/// The packet loss of a port.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// The share of the packets that is lost, from 0 to 1. A packet is what the network stack hands over, up to 64 KiB.
    pub share: f64,
    /// The seed that decides which packets are lost.
    pub seed: u64,
}

/// A running cable. Its interfaces are removed with it, once no other part of the program holds their ends.
#[derive(Debug)]
pub(crate) struct Cable {
    ends: [Arc<Tun>; 2],
    quality: Arc<Quality>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// What a cable does to packets now.
#[derive(Debug)]
struct Quality {
    delay_nanoseconds: AtomicU64,
    /// The share of the packets that is lost, as the bits of an `f64`.
    loss: AtomicU64,
}

impl Cable {
    /// Joins two namespaces by interfaces of the same name. Each packet arrives `delay` after it was sent.
    pub(crate) fn lay(
        namespaces: [&Namespace; 2],
        interface: &str,
        delay: Duration,
        loss: Option<Loss>,
    ) -> Result<Self> {
        let quality = Quality { delay_nanoseconds: AtomicU64::new(0), loss: AtomicU64::new(0) };
        quality.set(delay, loss.map_or(0.0, |loss| loss.share))?;
        let quality = Arc::new(quality);
        let [a, b] = namespaces.map(|namespace| Tun::create(namespace, interface).map(Arc::new));
        let ends = [a?, b?];
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).context("making an eventfd")?);
        let seed = loss.map_or(0, |loss| loss.seed);
        let dice = |direction| LossDice { state: seed ^ direction };
        let mut forwarder = Forwarder {
            ways: [Direction::new(delay, dice(0)), Direction::new(delay, dice(u64::MAX))],
            ends: ends.clone(),
            quality: quality.clone(),
            stop: stop.clone(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("cable-{interface}"))
            .spawn(move || forwarder.run())
            .context("starting a thread for a cable")?;
        Ok(Self { ends, quality, stop, thread: Some(thread) })
    }

    /// Returns the two ends of the cable, in the order of the namespaces.
    pub(crate) fn ends(&self) -> &[Arc<Tun>; 2] {
        &self.ends
    }

    /// From now on each packet arrives `delay` after it was sent, and this share of them, from 0 to 1, never does. The
    /// cable's room was made for the delay that it was laid with.
    pub(crate) fn set_quality(&self, delay: Duration, loss: f64) -> Result<()> {
        self.quality.set(delay, loss)
    }
}

impl Quality {
    fn set(&self, delay: Duration, loss: f64) -> Result<()> {
        ensure!(delay <= MAX_DELAY, "a port is delayed by {MAX_DELAY:?} at most, not {delay:?}");
        ensure!((0.0..=1.0).contains(&loss), "a port loses a share of 0 to 1 of its packets, not {loss}");
        self.delay_nanoseconds.store(delay.as_nanos() as u64, Ordering::Relaxed);
        self.loss.store(loss.to_bits(), Ordering::Relaxed);
        Ok(())
    }

    fn delay(&self) -> Duration {
        Duration::from_nanos(self.delay_nanoseconds.load(Ordering::Relaxed))
    }

    fn loss(&self) -> f64 {
        f64::from_bits(self.loss.load(Ordering::Relaxed))
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        // Fails only if it is rung already.
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // It has said what went wrong, if anything did.
            let _ = thread.join();
        }
    }
}

struct Forwarder {
    ends: [Arc<Tun>; 2],
    /// The two directions: from the first end to the second, and back.
    ways: [Direction; 2],
    quality: Arc<Quality>,
    stop: Arc<OwnedFd>,
}

/// One direction of a cable.
struct Direction {
    queue: Queue,
    dice: LossDice,
}

impl Direction {
    fn new(delay: Duration, dice: LossDice) -> Self {
        let bytes = (delay.as_secs_f64() * MAX_BYTES_PER_SECOND) as usize + LITTLE_BYTES;
        Self { queue: Queue::new(bytes.min(MAX_QUEUE_BYTES)), dice }
    }

    /// Delivers the packets that are due.
    fn deliver(&mut self, to: &Tun, now: Instant) -> io::Result<()> {
        while self.queue.due().is_some_and(|due| due <= now) {
            let packet = self.queue.front().expect("a packet is due");
            match rustix::io::write(to, packet) {
                // An interface that is down takes nothing, and one that cannot keep up loses what comes.
                Ok(_) | Err(Errno::IO | Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => self.queue.pop(),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Takes in the packets that were sent; returns false if there may be more.
    fn take(&mut self, from: &Tun, quality: &Quality) -> io::Result<bool> {
        let (delay, loss) = (quality.delay(), quality.loss());
        let mut now = None;
        for _ in 0..AT_ONCE {
            let Some(room) = self.queue.room() else { return Ok(true) };
            match rustix::io::read(from, room) {
                Ok(0) => return Ok(true),
                Ok(length) => {
                    if !self.dice.hit(loss) {
                        self.queue.push(length, *now.get_or_insert_with(Instant::now) + delay);
                    }
                }
                Err(Errno::AGAIN) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(false)
    }
}

impl Forwarder {
    fn run(&mut self) {
        loop {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return eprintln!("a port's cable is cut: {error}"),
            }
        }
    }

    /// Carries the packets that there are, and waits until there are more; returns false when the thread is to stop.
    fn turn(&mut self) -> io::Result<bool> {
        let mut idle = true;
        for (from, way) in self.ways.iter_mut().enumerate() {
            idle &= way.take(&self.ends[from], &self.quality)?;
            way.deliver(&self.ends[1 - from], Instant::now())?;
        }
        if idle { self.wait() } else { Ok(true) }
    }

    fn wait(&mut self) -> io::Result<bool> {
        let due = self.ways.iter().filter_map(|way| way.queue.due()).min();
        let left = due.map(|due| due.saturating_duration_since(Instant::now()));
        let left = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        // A queue without room waits for what is due in it.
        let wanted = self.ways.each_mut().map(|way| match way.queue.room() {
            Some(_) => PollFlags::IN,
            None => PollFlags::empty(),
        });
        let mut fds = [
            PollFd::new(&self.stop, PollFlags::IN),
            PollFd::new(&self.ends[0], wanted[0]),
            PollFd::new(&self.ends[1], wanted[1]),
        ];
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(fds[0].revents().is_empty()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Decides which packets are lost.
#[derive(Debug)]
struct LossDice {
    state: u64,
}

impl LossDice {
    /// Draws whether a packet is lost where this share of them is, with SplitMix64 by Steele, Lea and Flood: "Fast Splittable Pseudorandom Number
    /// Generators", 2014.
    fn hit(&mut self, share: f64) -> bool {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        ((mixed >> 11) as f64) < share * (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dice_hit_as_often_as_they_should_and_the_same_each_time() {
        let rolls = |share, seed| {
            let mut dice = LossDice { state: seed };
            (0..100_000).map(|_| dice.hit(share)).collect::<Vec<_>>()
        };
        let hits = rolls(0.01, 7).iter().filter(|hit| **hit).count();
        assert!((900..1100).contains(&hits), "{hits}");
        assert_eq!(rolls(0.01, 7), rolls(0.01, 7));
        assert_ne!(rolls(0.01, 7), rolls(0.01, 8));
        assert!(rolls(1.0, 7).iter().all(|hit| *hit) && rolls(0.0, 7).iter().all(|hit| !*hit));
    }
}
