//! The receiving end of a lane.

use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{opcode, types};
use memlane_kvm::ram::{GuestRam, is_zero};
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::WireError;
use memlane_protocol::wire::frame::{
    ACK_BYTES, Ack, Content, FRAME_HEADER_BYTES, Frame, MAX_RUNS, RUN_BYTES, Run, contents_bytes,
};
use memlane_tls::{Records, sealed_bytes};

use crate::checksum::{check, check_paused, checksum};
use crate::compress::grown;
use crate::message::Message;
use crate::postcopy::{By, PostcopyIncoming};
use crate::ring::{InFlight, Ring};
use crate::socket::set_low_water;
use crate::transport::Transport;
use crate::{LaneError, LaneStats};

/// A read of a long message wakes the thread when this many bytes have come.
const WORTH_WAKING: usize = 256 << 10;
/// A message of at least this many bytes is long in this sense.
const WORTH_WAITING: usize = 64 << 10;
/// An encrypted lane receives up to this many bytes at once.
const RECEIVED_AT_ONCE: usize = WORTH_WAKING + (64 << 10);
/// `IORING_RECVSEND_POLL_FIRST`: wait for the socket before reading from it.
const POLL_FIRST: u16 = 1;

const READ: u64 = 1;
const ACK: u64 = 2;

/// The state that the lanes of one migration share at the destination.
pub struct ReceiveState {
    /// The lanes write to this memory of the guest.
    pub ram: Arc<GuestRam>,
    /// Pages are placed through this while the guest may run on the memory (post-copy). If it is `None`, lanes write
    /// pages straight to the memory.
    pub postcopy: Option<Arc<PostcopyIncoming>>,
}

/// Receives pages of one migration from one connection.
pub struct LaneReceiver {
    /// The io_uring is the first field, so that it is dropped before everything that its operations point to.
    ring: Ring,
    receive_state: Arc<ReceiveState>,
    stats: Arc<LaneStats>,
    socket: Arc<OwnedFd>,
    /// These open the frames, and seal the acknowledgements, of a lane that is encrypted.
    records: Option<Box<Records>>,
    head: Box<[u8]>,
    table: Box<[u8]>,
    message: Box<Message>,
    runs: Vec<Run>,
    /// Pages arrive here that do not go straight to guest memory: pages that are placed whole, compressed pages (after
    /// they are decompressed), and pages that are not allocated yet. The buffer grows to the largest frame so far.
    staging: Vec<u8>,
    /// Compressed pages arrive here.
    block: Vec<u8>,
    /// These runs of the frame are not allocated in guest memory yet.
    fresh: Vec<Range<u64>>,
    sequence: u64,
    /// The kernel wakes the thread when this many bytes have come (`SO_RCVLOWAT`).
    low_water: usize,
    ack: Box<[u8]>,
    /// The first so many bytes of `ack` are being sent.
    ack_bytes: usize,
    acking: bool,
}

impl LaneReceiver {
    /// Makes the receiver of a lane over `transport`. The caller makes it on the thread that runs it.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses an io_uring.
    pub fn new(
        receive_state: Arc<ReceiveState>,
        stats: Arc<LaneStats>,
        Transport { socket, mut records }: Transport,
    ) -> Result<Self, LaneError> {
        if let Some(records) = &mut records {
            records.make_room(RECEIVED_AT_ONCE);
        }
        Ok(Self {
            staging: Vec::new(),
            block: Vec::new(),
            fresh: Vec::with_capacity(MAX_RUNS),
            receive_state,
            stats,
            socket,
            records,
            ring: Ring::new(8).map_err(LaneError::io("set up io_uring"))?,
            head: vec![0; FRAME_HEADER_BYTES].into(),
            table: vec![0; MAX_RUNS * RUN_BYTES].into(),
            message: Message::new(),
            runs: Vec::with_capacity(MAX_RUNS),
            sequence: 0,
            low_water: 1,
            ack: vec![0; sealed_bytes(ACK_BYTES)].into(),
            ack_bytes: 0,
            acking: false,
        })
    }

    /// Receives frames until the connection ends, and returns why it ended.
    pub fn run(mut self) -> LaneError {
        loop {
            if let Err(error) = self.receive_frame() {
                return error.or_lost_memory(&self.receive_state.ram);
            }
        }
    }

    fn receive_frame(&mut self) -> Result<(), LaneError> {
        self.message.fill(&mut self.head[..], &self.receive_state.ram, &[]);
        self.read_all()?;
        let frame = Frame::decode_any(&self.head[..])?;
        let expected = self.sequence + 1;
        if frame.sequence != expected {
            return Err(LaneError::Sequence { expected, found: frame.sequence });
        }
        let table = &mut self.table[..frame.runs * RUN_BYTES];
        self.message.fill(table, &self.receive_state.ram, &[]);
        self.read_all()?;
        let pages = self.receive_state.ram.pages();
        frame.decode_runs(&self.table[..frame.runs * RUN_BYTES], pages, &mut self.runs)?;
        match self.receive_state.postcopy.clone() {
            Some(postcopy) => self.place(&frame, &postcopy)?,
            None if frame.compressed => self.write_decompressed(&frame)?,
            None => self.write(&frame)?,
        }
        // If memory was cut off meanwhile, the bytes did not reach the guest's memory.
        self.receive_state.ram.intact().map_err(LaneError::Memory)?;
        self.sequence = expected;
        self.count(&frame);
        self.acknowledge()
    }

    /// Receives the pages beside guest memory, and places them.
    fn place(&mut self, frame: &Frame, postcopy: &PostcopyIncoming) -> Result<(), LaneError> {
        let bytes = self.stage(frame)?;
        let contents = &self.staging[..bytes];
        check_paused(frame, contents)?;
        postcopy.place(&self.runs, contents, By::Stream).map_err(LaneError::io("place pages"))
    }

    /// Receives compressed pages, and writes them decompressed to guest memory.
    fn write_decompressed(&mut self, frame: &Frame) -> Result<(), LaneError> {
        let bytes = self.stage(frame)?;
        let contents = &self.staging[..bytes];
        check(frame, || crc32c::crc32c(contents))?;
        fill(&self.receive_state.ram, &self.runs, contents)
            .map_err(LaneError::io("write pages to the guest's memory"))?;
        self.empty_runs()
    }

    /// Receives the pages straight into guest memory, except those that are not allocated yet: each of them would be a
    /// fault in the midst of receiving, which costs more than a copy.
    fn write(&mut self, frame: &Frame) -> Result<(), LaneError> {
        let ram = &self.receive_state.ram;
        self.fresh.clear();
        let runs = self.runs.iter().filter(|run| run.content == Content::Data);
        self.fresh
            .extend(runs.clone().map(|run| run.pages.clone()).filter(|pages| ram.is_unallocated(pages)));
        let mut staged = grown(&mut self.staging, self.fresh.iter().map(bytes_of).sum());
        let mut fresh = self.fresh.iter().peekable();
        self.message.clear();
        for Run { pages, .. } in runs {
            if fresh.next_if_eq(&pages).is_some() {
                let (buffer, rest) = staged.split_at_mut(bytes_of(pages));
                staged = rest;
                self.message.add(buffer);
            } else {
                // If this fails, the pages are mapped one by one as they are written.
                let _ = ram.populate_read(pages.clone());
                self.message.add_pages(ram, pages.clone());
            }
        }
        self.read_all()?;
        self.write_fresh().map_err(LaneError::io("write pages to the guest's memory"))?;
        check(frame, || checksum(&self.receive_state.ram, &self.runs))?;
        self.empty_runs()
    }

    /// Receives the pages beside guest memory, and returns how many bytes they are. The header has been
    /// checked, and bounds both lengths.
    fn stage(&mut self, frame: &Frame) -> Result<usize, LaneError> {
        let (payload, contents) = (frame.payload_bytes as usize, contents_bytes(&self.runs) as usize);
        let arriving = if frame.compressed { &mut self.block } else { &mut self.staging };
        let arriving = grown(arriving, payload);
        self.message.fill(arriving, &self.receive_state.ram, &[]);
        self.read_all()?;
        if frame.compressed {
            let staging = grown(&mut self.staging, contents);
            let found = lz4_flex::block::decompress_into(&self.block[..payload], staging)?;
            if found != contents {
                let what = "the length of the pages in a compressed frame";
                return Err(WireError::Value { what, found: found as u64 }.into());
            }
        }
        Ok(contents)
    }

    /// Makes those pages empty that the frame describes as zeros or holes.
    fn empty_runs(&self) -> Result<(), LaneError> {
        for run in &self.runs {
            match run.content {
                Content::Data => Ok(()),
                Content::Zero => {
                    make_zero(&self.receive_state, run).map_err(LaneError::io("make pages zero"))
                }
                Content::Hole => {
                    self.receive_state.ram.punch(run.pages.clone()).map_err(LaneError::io("give pages back"))
                }
            }?;
        }
        Ok(())
    }

    /// Writes the staged runs to guest memory.
    fn write_fresh(&self) -> io::Result<()> {
        let mut staged = &self.staging[..];
        for pages in &self.fresh {
            let (bytes, rest) = staged.split_at(bytes_of(pages));
            staged = rest;
            self.receive_state.ram.write_pages(pages.clone(), bytes)?;
        }
        Ok(())
    }

    /// Reads until the message is full. For a long message the kernel wakes this thread only when many bytes have come,
    /// or no more fit into the socket's buffer: each time costs as much as to read 64 KiB.
    fn read_all(&mut self) -> Result<(), LaneError> {
        match self.records {
            Some(_) => self.read_sealed(),
            None => self.read_plain(),
        }
    }

    /// Receives records beside the message, and opens them into it.
    fn read_sealed(&mut self) -> Result<(), LaneError> {
        while self.message.remaining() > 0 {
            let records = self.records.as_mut().expect("the lane is encrypted");
            let data = records.data()?;
            if !data.is_empty() {
                let count = self.message.copy_from(data);
                records.consume(count);
                continue;
            }
            // At least as many bytes are to come as are left of the message, beside those that have come sealed.
            let left = self.message.remaining().saturating_sub(records.unopened_bytes());
            self.wake_at(if left < WORTH_WAITING { 1 } else { left.min(WORTH_WAKING) });
            let fd = types::Fd(self.socket.as_raw_fd());
            let room = self.records.as_mut().expect("the lane is encrypted").room();
            let entry =
                opcode::Recv::new(fd, room.as_mut_ptr(), room.len() as u32).ioprio(POLL_FIRST).build();
            // SAFETY: the room is on the heap, and nothing else touches it until the operation completes, below or in
            // `drop`.
            unsafe { self.ring.push(&entry.user_data(READ)) }.map_err(LaneError::io("receive pages"))?;
            match self.wait_for(READ)? {
                0 => return Err(LaneError::HungUp),
                count => {
                    self.records.iter_mut().for_each(|records| records.received(count as usize));
                    LaneStats::add(&self.stats.wire_bytes, count.into());
                }
            }
        }
        Ok(())
    }

    fn read_plain(&mut self) -> Result<(), LaneError> {
        while self.message.remaining() > 0 {
            let left = self.message.remaining();
            // Headers and tables are read as they come, without two more system calls for each.
            self.wake_at(if left < WORTH_WAITING { 1 } else { left.min(WORTH_WAKING) });
            let fd = types::Fd(self.socket.as_raw_fd());
            let entry = opcode::RecvMsg::new(fd, self.message.as_mut_ptr())
                .ioprio(POLL_FIRST)
                .build()
                .user_data(READ);
            // SAFETY: the buffers are boxed in `self`, or guest memory that `receive_state` keeps
            // mapped. Nothing else touches them until the operation completes, below or in `drop`.
            unsafe { self.ring.push(&entry) }.map_err(LaneError::io("receive pages"))?;
            match self.wait_for(READ)? {
                0 => return Err(LaneError::HungUp),
                count => self.message.advance(count as usize),
            }
        }
        Ok(())
    }

    /// Lets reads wait until so many bytes have come (`SO_RCVLOWAT`, socket(7)).
    fn wake_at(&mut self, bytes: usize) {
        if self.low_water != bytes {
            set_low_water(&*self.socket, bytes);
            self.low_water = bytes;
        }
    }

    fn acknowledge(&mut self) -> Result<(), LaneError> {
        if self.acking {
            self.wait_for(ACK)?;
        }
        let ack = Ack { sequence: self.sequence }.encode();
        self.ack_bytes = match &mut self.records {
            Some(records) => records.seal(ACK_BYTES, &mut self.ack, |place| place.copy_from_slice(&ack))?,
            None => {
                self.ack[..ACK_BYTES].copy_from_slice(&ack);
                ACK_BYTES
            }
        };
        let fd = types::Fd(self.socket.as_raw_fd());
        let flags = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
        let entry = opcode::Send::new(fd, self.ack.as_ptr(), self.ack_bytes as u32).flags(flags).build();
        // SAFETY: the acknowledgement is boxed, and neither written again nor dropped until this
        // send completes.
        unsafe { self.ring.push(&entry.user_data(ACK)) }.map_err(LaneError::io("acknowledge"))?;
        self.acking = true;
        Ok(())
    }

    /// Waits until `operation` completes; returns its count.
    fn wait_for(&mut self, operation: u64) -> Result<u32, LaneError> {
        /// The migration ends a lane by shutting its socket down, so the wait needs no other end.
        const LOOK_AGAIN: Duration = Duration::from_secs(60);
        loop {
            while let Some(completion) = self.ring.completed() {
                if completion.operation == ACK {
                    let count = completion.result.map_err(LaneError::io("acknowledge"))?;
                    if count as usize != self.ack_bytes {
                        return Err(LaneError::HungUp);
                    }
                    self.acking = false;
                    if operation == ACK {
                        return Ok(count);
                    }
                } else {
                    // Only one read is ever under way, so it is the one waited for, or the
                    // one that a wait for an acknowledgement must not swallow.
                    debug_assert_eq!(operation, READ);
                    return completion.result.map_err(LaneError::io("receive pages"));
                }
            }
            self.ring.wait(LOOK_AGAIN).map_err(LaneError::io("wait for the lane's io_uring"))?;
        }
    }

    fn count(&self, frame: &Frame) {
        let bytes = FRAME_HEADER_BYTES as u64 + (frame.runs * RUN_BYTES) as u64 + frame.payload_bytes;
        // What is encrypted is longer, and was counted as it came.
        if self.records.is_none() {
            LaneStats::add(&self.stats.wire_bytes, bytes);
        }
        let contents = contents_bytes(&self.runs);
        LaneStats::add(&self.stats.acked_bytes, frame.payload_bytes);
        LaneStats::add(&self.stats.data_pages, contents / PAGE_SIZE);
        if frame.compressed {
            LaneStats::add(&self.stats.uncompressed_bytes, contents);
            LaneStats::add(&self.stats.compressed_bytes, frame.payload_bytes);
        }
        let zeros = self.runs.iter().filter(|run| run.content != Content::Data);
        LaneStats::add(&self.stats.zero_pages, zeros.map(|run| run.pages.end - run.pages.start).sum());
    }
}

impl Drop for LaneReceiver {
    /// Ends the connection, and frees memory only when the kernel does not use it any more: an acknowledgement may have
    /// failed while pages were being received.
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
        if self.ring.drain() != InFlight::Nothing {
            // The ring is broken: the kernel may yet write to all of it.
            let message = mem::replace(&mut self.message, Message::new());
            let heads = (mem::take(&mut self.head), mem::take(&mut self.table), mem::take(&mut self.ack));
            let contents = (mem::take(&mut self.staging), mem::take(&mut self.block));
            mem::forget((self.receive_state.clone(), message, heads, contents, self.records.take()));
        }
    }
}

/// Writes the bytes of all runs with data to guest memory.
fn fill(ram: &GuestRam, runs: &[Run], contents: &[u8]) -> io::Result<()> {
    let mut rest = contents;
    for Run { pages, .. } in runs.iter().filter(|run| run.content == Content::Data) {
        let (bytes, left) = rest.split_at(bytes_of(pages));
        rest = left;
        ram.write_pages(pages.clone(), bytes)?;
    }
    Ok(())
}

fn bytes_of(pages: &Range<u64>) -> usize {
    ((pages.end - pages.start) * PAGE_SIZE) as usize
}

/// Makes a run of pages zero, without allocating memory for its holes.
fn make_zero(receive_state: &ReceiveState, run: &Run) -> io::Result<()> {
    for extent in receive_state.ram.data_extents(run.pages.clone())? {
        for slice in receive_state.ram.slices(extent) {
            for offset in (0..slice.len).step_by(PAGE_SIZE as usize) {
                // SAFETY: inside the slice, which is mapped as long as the RAM lives; no guest
                // runs on this memory yet.
                unsafe {
                    let page = slice.ptr.add(offset);
                    if !is_zero(page) {
                        page.write_bytes(0, PAGE_SIZE as usize);
                    }
                }
            }
        }
    }
    Ok(())
}
