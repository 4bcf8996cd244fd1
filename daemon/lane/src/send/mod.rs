//! The sending end of a lane: one thread that runs a loop on its io_uring.
//!
//! This file has the loop. `fill` claims pages and makes frames of them, `submit` hands the frames to the kernel, and
//! `acks` takes the acknowledgements and moves the window. [`SendState`] is what all lanes of a migration share.

mod acks;
mod backlog;
pub(crate) mod encode;
mod fill;
mod health;
mod method;
mod slot;
mod splice;
mod state;
mod submit;
mod wakers;

use std::collections::VecDeque;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use memlane_protocol::liveness::Condition;
use memlane_protocol::window::Window;
use memlane_protocol::wire::frame::ACK_BYTES;
use memlane_tls::Records;

use self::health::{CHECK_INTERVAL, ConnectionHealth};
use self::method::MethodTrials;
use self::slot::Slot;
use self::splice::Splicer;
use crate::compress::Compressor;
use crate::ring::{InFlight, Ring};
use crate::socket::reset;
use crate::thread_clock::ThreadClock;
use crate::transport::{Sealed, Transport};
use crate::{LaneError, LaneStats};

pub use state::SendState;
pub use wakers::Waker;

/// The bytes of send buffer that the kernel gives a connection by itself, unless the host is configured otherwise.
const SELF_TUNED_BYTES: u64 = 4 << 20;
/// The number of acknowledgements that one read can take.
const ACKS_AT_ONCE: usize = 64;
/// The time after which an idle lane wakes up even though nothing has happened.
const HEARTBEAT: Duration = Duration::from_millis(250);

const WAKE: u64 = 0;
const ACKS: u64 = 1;
/// Operations with this number or a higher one are sends: the frame's number is the difference.
const FRAMES: u64 = 2;

/// Sends pages of one migration over one connection.
pub struct LaneSender {
    /// The io_uring is the first field, so that it is dropped before everything that its operations point to.
    ring: Ring,
    send_state: Arc<SendState>,
    stats: Arc<LaneStats>,
    socket: Arc<OwnedFd>,
    waker: Arc<Waker>,
    number: u16,
    silence: Duration,
    health: ConnectionHealth,
    /// The clock of the lane's thread, where something depends on it and the kernel keeps one.
    clock: Option<ThreadClock>,
    trials: MethodTrials,
    /// The pipe is `None` where the system refused to give one.
    splicer: Option<Splicer>,
    /// The compressor is `None` if the order does not allow compression, or there is no clock.
    compressor: Option<Compressor>,
    /// These seal the frames, and open the acknowledgements, of a lane that is encrypted.
    encryption: Option<Encryption>,
    cursor: u64,
    /// The newest frame has this number.
    sequence: u64,
    /// The destination has acknowledged all frames up to this number.
    acknowledged: u64,
    /// These frames, the oldest first, are sent or being sent, and not yet acknowledged.
    window: VecDeque<Slot>,
    /// This decides how much the window may hold.
    limit: Window,
    /// The window has been full since `limit` was last updated.
    full: bool,
    /// The lane has asked the kernel for a send buffer of this many bytes.
    send_buffer: u64,
    /// These frames are acknowledged, but the kernel may still read their pages.
    lingering: Vec<Slot>,
    spare: Vec<Slot>,
    /// The window holds this many bytes of payload.
    window_bytes: u64,
    /// The destination has acknowledged this many bytes of pages, counted before compression.
    delivered_bytes: u64,
    /// The newest frame of the window is not yet handed over to the kernel completely.
    sending: bool,
    wake_value: Box<u64>,
    acks: Box<[u8]>,
    /// The first so many bytes of `acks` are filled.
    acks_filled: usize,
    last_ack: Instant,
}

/// What an encrypted lane seals and opens with.
struct Encryption {
    records: Box<Records>,
    /// This part of the newest frame is being sent.
    sealed: Sealed,
}

impl LaneSender {
    /// Makes the sender of a lane over `transport`, which `waker` wakes and both ends know as `number`. The caller makes it
    /// on the thread that runs it. A destination that acknowledges nothing for `silence` is given up.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses an io_uring.
    pub fn new(
        send_state: Arc<SendState>,
        stats: Arc<LaneStats>,
        Transport { socket, records }: Transport,
        (waker, number): (Arc<Waker>, u16),
        silence: Duration,
    ) -> Result<Self, LaneError> {
        // Lanes begin apart, so that each walks through memory of its own.
        let first = waker.beginning(send_state.ram.pages());
        let health = ConnectionHealth::new(&*socket);
        let limit = Window::new(health.round_trip());
        let compress = send_state.compress;
        let clock = if compress || records.is_some() { ThreadClock::open() } else { None };
        // What is sealed is a copy already.
        let splicer = if records.is_none() { Splicer::new().ok() } else { None };
        let encryption = records.map(|records| Encryption { records, sealed: Sealed::default() });
        Ok(Self {
            ring: Ring::new(64).map_err(LaneError::io("set up io_uring"))?,
            cursor: send_state.ram.whole(first..first + 1).start,
            send_state,
            stats,
            socket,
            waker,
            number,
            silence,
            health,
            trials: MethodTrials::new(splicer.is_some()),
            splicer,
            compressor: (compress && clock.is_some()).then(Compressor::new),
            clock,
            encryption,
            sequence: 0,
            acknowledged: 0,
            window: VecDeque::new(),
            limit,
            full: false,
            send_buffer: SELF_TUNED_BYTES,
            lingering: Vec::new(),
            spare: Vec::new(),
            window_bytes: 0,
            delivered_bytes: 0,
            sending: false,
            wake_value: Box::new(0),
            acks: vec![0; ACK_BYTES * ACKS_AT_ONCE].into(),
            acks_filled: 0,
            last_ack: Instant::now(),
        })
    }

    /// Sends all pages that it can claim until the connection ends, and returns why it ended. Pages that were not
    /// acknowledged by then wait to be [taken back](SendState::take_back).
    pub fn run(mut self) -> LaneError {
        let error = self.serve().or_lost_memory(&self.send_state.ram);
        if matches!(error, LaneError::Silent(_)) {
            reset(&*self.socket);
        }
        error
    }

    fn serve(&mut self) -> LaneError {
        let result = self.listen_for_wake().and_then(|()| self.listen_for_acks());
        if let Err(error) = result {
            return error;
        }
        loop {
            if let Err(error) = self.turn() {
                return error;
            }
        }
    }

    /// Fills the window, waits for something to happen, and deals with it.
    fn turn(&mut self) -> Result<(), LaneError> {
        self.fill_window()?;
        let longest = if self.window.is_empty() { HEARTBEAT } else { CHECK_INTERVAL };
        self.ring.wait(longest).map_err(LaneError::io("wait for the lane's io_uring"))?;
        while let Some(completion) = self.ring.completed() {
            match completion.operation {
                WAKE => self.listen_for_wake()?,
                ACKS => self.take_acks(completion)?,
                operation => self.take_sent(operation - FRAMES, completion)?,
            }
        }
        self.check_connection()
    }

    /// Fails if the connection carries nothing any more, or if the destination has stopped to acknowledge.
    fn check_connection(&mut self) -> Result<(), LaneError> {
        if self.window.is_empty() {
            self.last_ack = Instant::now();
        } else if self.last_ack.elapsed() > self.silence {
            return Err(LaneError::Silent(self.last_ack.elapsed()));
        }
        let Some(condition) = self.health.check(&*self.socket) else { return Ok(()) };
        self.waker.set_doubtful(condition != Condition::Well);
        self.measure();
        match condition {
            // If all ports are silent at once, the network may only pause, and no other lane could take over.
            Condition::Silent(silence) if self.send_state.wakers.others_are_well(&self.waker) => {
                Err(LaneError::Silent(silence))
            }
            _ => Ok(()),
        }
    }

    /// Brings up to date what the lane knows of its connection and its thread.
    fn measure(&self) {
        let store = |counter: &AtomicU64, time: Duration| {
            counter.store(time.as_micros() as u64, Ordering::Relaxed);
        };
        store(&self.stats.round_trip_us, self.health.round_trip());
        store(&self.stats.receiver_limited_us, self.health.receiver_limited());
        if let Some((ran, crowded)) = self.clock.as_ref().and_then(ThreadClock::read) {
            store(&self.stats.ran_us, ran);
            store(&self.stats.crowded_us, crowded);
        }
    }

    fn listen_for_wake(&mut self) -> Result<(), LaneError> {
        let waker = types::Fd(self.waker.as_fd().as_raw_fd());
        let value: *mut u64 = &mut *self.wake_value;
        let entry = opcode::Read::new(waker, value.cast(), size_of::<u64>() as u32).build();
        // SAFETY: the value is boxed, no code reads it, and `drop` keeps it until this completes.
        unsafe { self.ring.push(&entry.user_data(WAKE)) }.map_err(LaneError::io("wait to be woken"))
    }
}

impl Drop for LaneSender {
    /// Ends the connection, leaves the frames that were not acknowledged to the migration, and frees memory only when
    /// the kernel does not use it any more.
    fn drop(&mut self) {
        // These two end every operation that is under way.
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
        self.waker.wake();
        let frames = self.window.iter_mut().map(|slot| mem::take(&mut slot.runs));
        self.send_state.orphan(self.number, frames);
        let in_flight = self.ring.drain();
        if in_flight != InFlight::Nothing {
            // TCP goes on trying to deliver these frames, perhaps for minutes. The kernel has
            // pinned the pages, but that does not keep the allocator from handing out the heads
            // again, and then bytes of something else would go out as a table of runs.
            mem::forget((mem::take(&mut self.window), mem::take(&mut self.lingering)));
        }
        if in_flight == InFlight::All {
            // The ring is broken: the kernel may yet read guest memory and write to the buffers.
            if let Some(compressor) = &mut self.compressor {
                compressor.leak();
            }
            let buffers = (mem::take(&mut self.acks), mem::take(&mut self.wake_value));
            mem::forget((self.send_state.clone(), buffers, self.encryption.take()));
        }
    }
}
