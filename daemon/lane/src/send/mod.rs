//! The sending end of a lane.

mod backlog;
pub(crate) mod encode;
mod health;
mod method;
mod slot;
mod splice;
mod state;
mod wakers;

use std::collections::VecDeque;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use memlane_protocol::liveness::Condition;
use memlane_protocol::window::{Flow, Window};
use memlane_protocol::wire::frame::{ACK_BYTES, Ack, Content, contents_bytes, encode_compressed_head};
use rustix::net::sockopt::set_socket_send_buffer_size_force;

use self::encode::{claim_frame, encode_frame};
use self::health::{ConnectionHealth, LOOK};
use self::method::{MethodTrials, SendMethod};
use self::slot::Slot;
use self::splice::{Progress, Splicer};
use crate::compress::{Block, Compressor};
use crate::ring::{Completion, Held, Ring};
use crate::{LaneError, LaneStats};

pub use state::SendState;
pub use wakers::Waker;

use crate::socket::reset;

/// What the kernel gives a connection as send buffer by itself, unless the host is configured otherwise.
const SELF_TUNED_BYTES: u64 = 4 << 20;
/// Acknowledgements read at once.
const ACKS_AT_ONCE: usize = 64;
/// How often a lane looks at the clock when nothing happens, and nothing is to happen.
const HEARTBEAT: Duration = Duration::from_millis(250);

const WAKE: u64 = 0;
const ACKS: u64 = 1;
/// Operations from here on are sends; the number above this is the frame's.
const FRAMES: u64 = 2;

/// Sends pages of one migration over one connection.
pub struct LaneSender {
    /// First, so that it goes before all that its operations point to.
    ring: Ring,
    outbound: Arc<SendState>,
    stats: Arc<LaneStats>,
    socket: Arc<OwnedFd>,
    waker: Arc<Waker>,
    number: u16,
    silence: Duration,
    health: ConnectionHealth,
    trials: MethodTrials,
    /// Where the system has a pipe to spare.
    splicer: Option<Splicer>,
    /// Where the order and the other end allow it.
    compressor: Option<Compressor>,
    cursor: u64,
    /// Number of the newest frame.
    sequence: u64,
    /// Number of the last frame that the destination has.
    acknowledged: u64,
    /// Sent or being sent, oldest first, not yet acknowledged.
    window: VecDeque<Slot>,
    /// How much that may be,
    limit: Window,
    /// and whether it was that much since the limit was thought over.
    full: bool,
    /// The send buffer that was asked for, in bytes.
    send_buffer: u64,
    /// Acknowledged, but the kernel may still look at them.
    lingering: Vec<Slot>,
    spare: Vec<Slot>,
    /// Bytes of payload on their way.
    window_bytes: u64,
    /// Bytes of pages that have arrived, as they are before they are compressed.
    delivered_bytes: u64,
    /// The newest frame of the window is still being handed to the kernel.
    sending: bool,
    wake_value: Box<u64>,
    acks: Box<[u8]>,
    /// Bytes in `acks`.
    acks_filled: usize,
    last_ack: Instant,
}

impl LaneSender {
    /// For a lane that `waker` wakes and both ends know as `number`, over `socket`. To be
    /// made on its own thread.
    pub fn new(
        outbound: Arc<SendState>,
        stats: Arc<LaneStats>,
        socket: Arc<OwnedFd>,
        (waker, number): (Arc<Waker>, u16),
        silence: Duration,
    ) -> Result<Self, LaneError> {
        // Lanes begin apart, so that each walks through memory of its own.
        let first = waker.beginning(outbound.ram.pages());
        let health = ConnectionHealth::new(&*socket);
        let limit = Window::new(health.round_trip());
        let compress = outbound.compress;
        let splicer = Splicer::new().ok();
        Ok(Self {
            ring: Ring::new(64).map_err(LaneError::io("set up io_uring"))?,
            cursor: outbound.ram.whole(first..first + 1).start,
            outbound,
            stats,
            socket,
            waker,
            number,
            silence,
            health,
            trials: MethodTrials::new(splicer.is_some()),
            splicer,
            compressor: compress.then(Compressor::new).flatten(),
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

    /// Sends whatever can be claimed until the connection ends. What was not acknowledged by
    /// then waits to be [taken back](SendState::take_back).
    pub fn run(mut self) -> LaneError {
        let error = self.serve().of(&self.outbound.ram);
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
        let longest = if self.window.is_empty() { HEARTBEAT } else { LOOK };
        self.ring.wait(longest).map_err(LaneError::io("wait for the lane's io_uring"))?;
        while let Some(completion) = self.ring.completed() {
            match completion.operation {
                WAKE => self.listen_for_wake()?,
                ACKS => self.take_acks(completion)?,
                operation => self.take_sent(operation - FRAMES, completion)?,
            }
        }
        self.look_at_the_way()
    }

    fn fill_window(&mut self) -> Result<(), LaneError> {
        // A frame that is not handed over yet waits for room in the send buffer.
        self.full |= self.sending;
        while !self.sending {
            self.full |= self.window_bytes >= self.limit.bytes();
            let hold = self.outbound.left.hold();
            let full = self.window_bytes >= self.limit.bytes_held(hold);
            if full || self.window.len() >= self.limit.frames() || !self.send_next(hold)? {
                break;
            }
        }
        Ok(())
    }

    /// Whether there is still a way to the other end, and somebody there who acknowledges.
    fn look_at_the_way(&mut self) -> Result<(), LaneError> {
        if self.window.is_empty() {
            self.last_ack = Instant::now();
        } else if self.last_ack.elapsed() > self.silence {
            return Err(LaneError::Silent(self.last_ack.elapsed()));
        }
        let Some(condition) = self.health.look(&*self.socket) else { return Ok(()) };
        self.waker.set_doubtful(condition != Condition::Well);
        self.stats.round_trip_us.store(self.health.round_trip().as_micros() as u64, Ordering::Relaxed);
        match condition {
            // Where all ports are silent at once, there may just be a pause, and nobody to take over.
            Condition::Silent(silence) if self.outbound.wakers.others_are_well(&self.waker) => {
                Err(LaneError::Silent(silence))
            }
            _ => Ok(()),
        }
    }

    /// Claims a frame and hands it to the kernel; rings the bell and returns false if there is none to claim.
    fn send_next(&mut self, hold: Duration) -> Result<bool, LaneError> {
        let mut slot = self.spare.pop().unwrap_or_else(Slot::new);
        let most_bytes = self.limit.frame_bytes(hold);
        claim_frame(&self.outbound, &mut self.cursor, most_bytes, &mut slot.runs);
        if slot.runs.is_empty() {
            self.spare.push(slot);
            self.outbound.settle(1);
            (self.outbound.bell)();
            if self.window.is_empty() {
                self.full = false;
                self.limit.rest();
            }
            if let Some(compressor) = &mut self.compressor {
                compressor.idle();
            }
            return Ok(false);
        }
        self.sequence += 1;
        slot.sequence = self.sequence;
        slot.contents_bytes = contents_bytes(&slot.runs);
        if !self.encode_compressed(&mut slot) {
            slot.payload_bytes = encode_frame(&self.outbound, slot.sequence, &slot.runs, &mut slot.head);
            slot.way = if self.outbound.comes_to_rest() {
                SendMethod::Copy
            } else {
                self.trials.choose(slot.payload_bytes)
            };
            slot.message.fill(&mut slot.head, &self.outbound.ram, &slot.runs);
        }
        self.window_bytes += slot.payload_bytes;
        LaneStats::add(&self.stats.wire_bytes, slot.message.remaining() as u64);
        self.window.push_back(slot);
        // What was looked at, summed up or compressed was the guest's.
        self.outbound.ram.intact().map_err(LaneError::Memory)?;
        self.hand_over_newest()?;
        Ok(true)
    }

    /// Makes a frame of what the pages are compressed to, if that is to be done.
    fn encode_compressed(&mut self, slot: &mut Slot) -> bool {
        let compressor = self.compressor.as_mut();
        let block = compressor.and_then(|compressor| compressor.compress(&self.outbound.ram, &slot.runs));
        let Some(Block { bytes, contents }) = block else { return false };
        slot.payload_bytes = bytes.len() as u64;
        slot.way = SendMethod::Copy;
        let checksum = self.outbound.still.load(Ordering::Acquire).then(|| crc32c::crc32c(contents));
        encode_compressed_head(&mut slot.head, slot.sequence, &slot.runs, checksum, slot.payload_bytes);
        // The block is left alone until this frame has been handed over, and the next one begins.
        slot.message.fill_plain(&mut slot.head, bytes);
        LaneStats::add(&self.stats.uncompressed_bytes, slot.contents_bytes);
        LaneStats::add(&self.stats.compressed_bytes, slot.payload_bytes);
        true
    }

    /// Hands what remains of the newest frame to the kernel.
    fn hand_over_newest(&mut self) -> Result<(), LaneError> {
        self.sending = true;
        let slot = self.window.back_mut().expect("a frame has just been put into the window");
        match (slot.way, &mut self.splicer) {
            (SendMethod::Splice, Some(_)) => self.splice_newest(),
            _ => self.submit_newest(),
        }
    }

    fn submit_newest(&mut self) -> Result<(), LaneError> {
        /// `IORING_SEND_ZC_REPORT_USAGE`: say in the notification whether the pages were copied.
        const REPORT_USAGE: u16 = 1 << 3;
        let fd = types::Fd(self.socket.as_raw_fd());
        let slot = self.window.back_mut().expect("the frame being sent stays in the window");
        let flags = (libc::MSG_WAITALL | libc::MSG_NOSIGNAL) as u32;
        let message = slot.message.as_ptr();
        let entry = if slot.way == SendMethod::ZeroCopy {
            slot.notifications += 1;
            opcode::SendMsgZc::new(fd, message).ioprio(REPORT_USAGE).flags(flags).build()
        } else {
            opcode::SendMsg::new(fd, message).flags(flags).build()
        };
        // SAFETY: the message and its head lie on the heap and are left alone until the send is
        // complete, the frame acknowledged, and its pages released by the kernel. `outbound`
        // keeps guest memory mapped. A compressed block is never sent without copying, and is
        // written over by the next frame at the earliest, which begins when this send is complete.
        // When the lane ends earlier, `drop` waits for the same, or gives up the memory for good.
        unsafe { self.ring.push(&entry.user_data(FRAMES + slot.sequence)) }
            .map_err(LaneError::io("submit a frame"))
    }

    /// Sends through the pipe what the socket has room for, and the rest when it has more.
    fn splice_newest(&mut self) -> Result<(), LaneError> {
        let slot = self.window.back_mut().expect("the frame being sent stays in the window");
        let splicer = self.splicer.as_mut().expect("who splices has a pipe");
        // SAFETY: the message points to the slot's head and to guest memory, which `outbound` keeps mapped.
        let progress = unsafe { splicer.send(&*self.socket, &mut slot.message, slot.payload_bytes as usize) };
        match progress.map_err(LaneError::io("send pages"))? {
            Progress::Done => {
                self.handed_over();
                Ok(())
            }
            Progress::NoRoom => {
                let fd = types::Fd(self.socket.as_raw_fd());
                let entry = opcode::PollAdd::new(fd, libc::POLLOUT as u32).build();
                // SAFETY: it points to nothing.
                unsafe { self.ring.push(&entry.user_data(FRAMES + slot.sequence)) }
                    .map_err(LaneError::io("wait for room in the send buffer"))
            }
            Progress::Impossible => {
                self.trials.give_up(SendMethod::Splice);
                slot.way = SendMethod::Copy;
                self.submit_newest()
            }
        }
    }

    fn take_sent(&mut self, sequence: u64, completion: Completion) -> Result<(), LaneError> {
        if let Some(copied) = completion.released {
            self.release(sequence, copied);
            return Ok(());
        }
        let slot = self.window.back_mut().expect("the frame being sent stays in the window");
        if !completion.more && slot.way == SendMethod::ZeroCopy {
            slot.notifications -= 1; // the send failed, so no notification follows
        }
        match completion.result {
            // There is room.
            Ok(_) if slot.way == SendMethod::Splice => {}
            Ok(count) => slot.message.advance(count as usize),
            Err(error) if slot.way == SendMethod::ZeroCopy && cannot_zero_copy(&error) => {
                self.trials.give_up(SendMethod::ZeroCopy);
                slot.way = SendMethod::Copy;
            }
            Err(error) => return Err(LaneError::io("send pages")(error)),
        }
        if slot.message.remaining() > 0 || slot.way == SendMethod::Splice {
            return self.hand_over_newest();
        }
        self.handed_over();
        Ok(())
    }

    /// The kernel has taken the newest frame.
    fn handed_over(&mut self) {
        let slot = self.window.back().expect("the frame being sent stays in the window");
        match slot.way {
            SendMethod::Copy => LaneStats::add(&self.stats.copied_bytes, slot.payload_bytes),
            SendMethod::Splice => LaneStats::add(&self.stats.zero_copy_bytes, slot.payload_bytes),
            // The notification tells.
            SendMethod::ZeroCopy => {}
        }
        self.sending = false;
        self.retire();
    }

    /// The kernel has let go of the pages of a zero-copy send.
    fn release(&mut self, sequence: u64, copied: bool) {
        self.trials.learn(copied);
        let mut slots = self.window.iter_mut().chain(&mut self.lingering);
        let Some(slot) = slots.find(|slot| slot.sequence == sequence) else { return };
        slot.notifications -= 1;
        if slot.notifications == 0 && slot.way == SendMethod::ZeroCopy {
            let counter = if copied { &self.stats.copied_bytes } else { &self.stats.zero_copy_bytes };
            LaneStats::add(counter, slot.payload_bytes);
        }
        if let Some(index) = self.lingering.iter().position(|slot| slot.notifications == 0) {
            self.spare.push(self.lingering.swap_remove(index));
        }
    }

    fn take_acks(&mut self, completion: Completion) -> Result<(), LaneError> {
        match completion.result {
            Ok(0) => return Err(LaneError::HungUp),
            Ok(count) => self.acks_filled += count as usize,
            Err(error) => return Err(LaneError::io("read acknowledgements")(error)),
        }
        let whole = self.acks_filled / ACK_BYTES * ACK_BYTES;
        for bytes in self.acks[..whole].chunks_exact(ACK_BYTES) {
            let found = Ack::decode(bytes)?.sequence;
            if found > self.sequence {
                return Err(LaneError::Sequence { expected: self.sequence, found });
            }
            self.acknowledged = self.acknowledged.max(found);
            self.last_ack = Instant::now();
        }
        self.acks.copy_within(whole..self.acks_filled, 0);
        self.acks_filled -= whole;
        self.retire();
        self.think_over_the_limit();
        self.listen_for_acks()
    }

    fn think_over_the_limit(&mut self) {
        let flow = Flow {
            acked_bytes: self.stats.acked_bytes.load(Ordering::Relaxed),
            round_trip: self.health.round_trip(),
            full: mem::take(&mut self.full),
        };
        self.limit.observe(self.health.now(), &flow);
        self.waker.set_bytes_per_second(self.limit.bytes_per_second());
        if let Some(compressor) = &mut self.compressor {
            compressor.observe(
                self.health.now(),
                self.stats.acked_bytes.load(Ordering::Relaxed),
                self.delivered_bytes,
            );
        }
        let wanted = self.limit.bytes();
        // Less than a quarter more is not worth a system call.
        if wanted > self.send_buffer + self.send_buffer / 4 {
            // In vain without CAP_NET_ADMIN: the kernel then goes on sizing the buffer by itself. `SO_SNDBUF`
            // would stop it from that, and often at less.
            let _ = set_socket_send_buffer_size_force(&*self.socket, wanted as usize);
            self.send_buffer = wanted;
        }
    }

    /// Takes frames that are in the destination's memory out of the window.
    fn retire(&mut self) {
        let handed_over = self.sequence - u64::from(self.sending);
        let done = self.acknowledged.min(handed_over);
        while self.window.front().is_some_and(|slot| slot.sequence <= done) {
            let slot = self.window.pop_front().expect("the front was there");
            for run in &slot.runs {
                let pages = run.pages.end - run.pages.start;
                match run.content {
                    Content::Data => LaneStats::add(&self.stats.data_pages, pages),
                    Content::Zero | Content::Hole => LaneStats::add(&self.stats.zero_pages, pages),
                }
                self.outbound.in_flight.remove_range(run.pages.clone());
            }
            self.outbound.settle(1);
            self.window_bytes -= slot.payload_bytes;
            self.delivered_bytes += slot.contents_bytes;
            LaneStats::add(&self.stats.acked_bytes, slot.payload_bytes);
            let rest = if slot.notifications == 0 { &mut self.spare } else { &mut self.lingering };
            rest.push(slot);
        }
        if self.window.is_empty() {
            (self.outbound.bell)();
        }
    }

    fn listen_for_wake(&mut self) -> Result<(), LaneError> {
        let waker = types::Fd(self.waker.as_fd().as_raw_fd());
        let value: *mut u64 = &mut *self.wake_value;
        let entry = opcode::Read::new(waker, value.cast(), size_of::<u64>() as u32).build();
        // SAFETY: the value is boxed, nobody reads it, and `drop` keeps it until this completes.
        unsafe { self.ring.push(&entry.user_data(WAKE)) }.map_err(LaneError::io("wait to be woken"))
    }

    fn listen_for_acks(&mut self) -> Result<(), LaneError> {
        let free = &mut self.acks[self.acks_filled..];
        let fd = types::Fd(self.socket.as_raw_fd());
        let entry = opcode::Recv::new(fd, free.as_mut_ptr(), free.len() as u32).build();
        // SAFETY: the buffer is boxed, this part of it is not touched until the operation
        // completes, and `drop` keeps it until then.
        unsafe { self.ring.push(&entry.user_data(ACKS)) }.map_err(LaneError::io("read acknowledgements"))
    }
}

impl Drop for LaneSender {
    /// Ends the connection, leaves what was not acknowledged to the migration, and lets go of
    /// memory only when the kernel has.
    fn drop(&mut self) {
        // These two end every operation that is under way.
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
        self.waker.wake();
        let frames = self.window.iter_mut().map(|slot| mem::take(&mut slot.runs));
        self.outbound.orphan(self.number, frames);
        let held = self.ring.drain();
        if held != Held::Nothing {
            // TCP goes on trying to deliver these frames, perhaps for minutes. The kernel has
            // pinned the pages, but that does not keep the allocator from handing out the heads
            // again, and then somebody else's bytes would go out as a table of runs.
            mem::forget((mem::take(&mut self.window), mem::take(&mut self.lingering)));
        }
        if held == Held::All {
            // The ring is broken: the kernel may yet read guest memory and write to the buffers.
            if let Some(compressor) = &mut self.compressor {
                compressor.leak();
            }
            let buffers = (mem::take(&mut self.acks), mem::take(&mut self.wake_value));
            mem::forget((self.outbound.clone(), buffers));
        }
    }
}

/// Errors that concern zero-copy alone: not supported on this socket, or too much pinned.
fn cannot_zero_copy(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOMEM | libc::ENOBUFS | libc::EINVAL))
}
