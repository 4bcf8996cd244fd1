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

use crate::checksum::{check, check_still, checksum};
use crate::compress::grown;
use crate::message::Message;
use crate::postcopy::{By, PostcopyIncoming};
use crate::ring::{Held, Ring};
use crate::socket::set_low_water;
use crate::{LaneError, LaneStats};

/// Bytes to come before the thread is woken to read them,
const WORTH_WAKING: usize = 256 << 10;
/// if there are as many as these.
const WORTH_WAITING: usize = 64 << 10;
/// `IORING_RECVSEND_POLL_FIRST`: wait for the socket before reading from it.
const POLL_FIRST: u16 = 1;

const READ: u64 = 1;
const ACK: u64 = 2;

/// What the lanes of one migration share at the destination.
pub struct ReceiveState {
    /// The memory that the guest will have.
    pub ram: Arc<GuestRam>,
    /// Where pages go while the guest may be running on that memory; otherwise straight there.
    pub placing: Option<Arc<PostcopyIncoming>>,
}

/// Receives pages of one migration from one connection.
pub struct LaneReceiver {
    /// First, so that it goes before all that its operations point to.
    ring: Ring,
    inbound: Arc<ReceiveState>,
    stats: Arc<LaneStats>,
    socket: Arc<OwnedFd>,
    head: Box<[u8]>,
    table: Box<[u8]>,
    message: Box<Message>,
    runs: Vec<Run>,
    /// Where pages arrive that do not go straight to guest memory: those that are placed whole, those that
    /// come compressed, and those of which nothing is there yet. As long as was needed at most.
    staging: Vec<u8>,
    /// Where compressed ones do before that.
    block: Vec<u8>,
    /// Runs of the frame of which nothing is there yet.
    fresh: Vec<Range<u64>>,
    sequence: u64,
    /// Bytes that wake the thread.
    low_water: usize,
    ack: Box<[u8]>,
    acking: bool,
}

impl LaneReceiver {
    /// For a lane into `inbound`, over `socket`. To be made on its own thread.
    pub fn new(
        inbound: Arc<ReceiveState>,
        stats: Arc<LaneStats>,
        socket: Arc<OwnedFd>,
    ) -> Result<Self, LaneError> {
        Ok(Self {
            staging: Vec::new(),
            block: Vec::new(),
            fresh: Vec::with_capacity(MAX_RUNS),
            inbound,
            stats,
            socket,
            ring: Ring::new(8).map_err(LaneError::io("set up io_uring"))?,
            head: vec![0; FRAME_HEADER_BYTES].into(),
            table: vec![0; MAX_RUNS * RUN_BYTES].into(),
            message: Message::new(),
            runs: Vec::with_capacity(MAX_RUNS),
            sequence: 0,
            low_water: 1,
            ack: vec![0; ACK_BYTES].into(),
            acking: false,
        })
    }

    /// Receives until the connection ends.
    pub fn run(mut self) -> LaneError {
        loop {
            if let Err(error) = self.receive_frame() {
                return error.of(&self.inbound.ram);
            }
        }
    }

    fn receive_frame(&mut self) -> Result<(), LaneError> {
        self.message.fill(&mut self.head[..], &self.inbound.ram, &[]);
        self.read_all()?;
        let frame = Frame::decode_any(&self.head[..])?;
        let expected = self.sequence + 1;
        if frame.sequence != expected {
            return Err(LaneError::Sequence { expected, found: frame.sequence });
        }
        let table = &mut self.table[..frame.runs * RUN_BYTES];
        self.message.fill(table, &self.inbound.ram, &[]);
        self.read_all()?;
        let pages = self.inbound.ram.pages();
        frame.decode_runs(&self.table[..frame.runs * RUN_BYTES], pages, &mut self.runs)?;
        match self.inbound.placing.clone() {
            Some(placing) => self.place(&frame, &placing)?,
            None if frame.compressed => self.write_decompressed(&frame)?,
            None => self.write(&frame)?,
        }
        // What was written is the guest's.
        self.inbound.ram.intact().map_err(LaneError::Memory)?;
        self.sequence = expected;
        self.count(&frame);
        self.acknowledge()
    }

    /// Receives the pages beside guest memory, and places them.
    fn place(&mut self, frame: &Frame, placing: &PostcopyIncoming) -> Result<(), LaneError> {
        let bytes = self.stage(frame)?;
        let contents = &self.staging[..bytes];
        check_still(frame, contents)?;
        placing.place(&self.runs, contents, By::Stream).map_err(LaneError::io("place pages"))
    }

    /// Receives compressed pages, and copies what they were into guest memory.
    fn write_decompressed(&mut self, frame: &Frame) -> Result<(), LaneError> {
        let bytes = self.stage(frame)?;
        let contents = &self.staging[..bytes];
        check(frame, || crc32c::crc32c(contents))?;
        fill(&self.inbound.ram, &self.runs, contents)
            .map_err(LaneError::io("write pages to the guest's memory"))?;
        self.empty_runs()
    }

    /// Receives the pages straight into guest memory, but for those of which nothing is there yet: each of
    /// them would be a fault in the midst of receiving, which costs more than a copy.
    fn write(&mut self, frame: &Frame) -> Result<(), LaneError> {
        let ram = &self.inbound.ram;
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
                // What cannot be mapped in one go is when it is written.
                let _ = ram.populate_read(pages.clone());
                self.message.add_pages(ram, pages.clone());
            }
        }
        self.read_all()?;
        self.write_fresh().map_err(LaneError::io("write pages to the guest's memory"))?;
        check(frame, || checksum(&self.inbound.ram, &self.runs))?;
        self.empty_runs()
    }

    /// Receives the pages beside guest memory, and returns how many bytes they are. The header has been
    /// checked, and bounds both lengths.
    fn stage(&mut self, frame: &Frame) -> Result<usize, LaneError> {
        let (payload, contents) = (frame.payload_bytes as usize, contents_bytes(&self.runs) as usize);
        let arriving = if frame.compressed { &mut self.block } else { &mut self.staging };
        let arriving = grown(arriving, payload);
        self.message.fill(arriving, &self.inbound.ram, &[]);
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

    /// Makes the pages empty that the frame says are.
    fn empty_runs(&self) -> Result<(), LaneError> {
        for run in &self.runs {
            match run.content {
                Content::Data => Ok(()),
                Content::Zero => make_zero(&self.inbound, run).map_err(LaneError::io("make pages zero")),
                Content::Hole => {
                    self.inbound.ram.punch(run.pages.clone()).map_err(LaneError::io("give pages back"))
                }
            }?;
        }
        Ok(())
    }

    /// Puts the staged runs where they belong.
    fn write_fresh(&self) -> io::Result<()> {
        let mut staged = &self.staging[..];
        for pages in &self.fresh {
            let (bytes, rest) = staged.split_at(bytes_of(pages));
            staged = rest;
            self.inbound.ram.write_pages(pages.clone(), bytes)?;
        }
        Ok(())
    }

    /// Reads until the message is full. Of long ones the kernel wakes this thread only when much has
    /// come, or when no more fits into the socket's buffer: each time costs as much as reading 64 KiB.
    fn read_all(&mut self) -> Result<(), LaneError> {
        while self.message.remaining() > 0 {
            let left = self.message.remaining();
            // Headers and tables are read as they come, without two more system calls for each.
            self.wake_at(if left < WORTH_WAITING { 1 } else { left.min(WORTH_WAKING) });
            let fd = types::Fd(self.socket.as_raw_fd());
            let entry = opcode::RecvMsg::new(fd, self.message.as_mut_ptr())
                .ioprio(POLL_FIRST)
                .build()
                .user_data(READ);
            // SAFETY: the buffers are boxed in `self`, or guest memory that `inbound` keeps
            // mapped. Nothing else touches them until the operation completes, below or in `drop`.
            unsafe { self.ring.push(&entry) }.map_err(LaneError::io("receive pages"))?;
            match self.wait_for(READ)? {
                0 => return Err(LaneError::HungUp),
                count => self.message.advance(count as usize),
            }
        }
        Ok(())
    }

    /// Has reads wait until so many bytes have come (`SO_RCVLOWAT`, socket(7)).
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
        self.ack.copy_from_slice(&Ack { sequence: self.sequence }.encode());
        let fd = types::Fd(self.socket.as_raw_fd());
        let flags = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
        let entry = opcode::Send::new(fd, self.ack.as_ptr(), ACK_BYTES as u32).flags(flags).build();
        // SAFETY: the acknowledgement is boxed, and neither written again nor dropped until this
        // send completes.
        unsafe { self.ring.push(&entry.user_data(ACK)) }.map_err(LaneError::io("acknowledge"))?;
        self.acking = true;
        Ok(())
    }

    /// Waits until `operation` completes; returns its count.
    fn wait_for(&mut self, operation: u64) -> Result<u32, LaneError> {
        /// The migration ends a lane by shutting its socket down, so waiting needs no end.
        const LOOK_AGAIN: Duration = Duration::from_secs(60);
        loop {
            while let Some(completion) = self.ring.completed() {
                if completion.operation == ACK {
                    let count = completion.result.map_err(LaneError::io("acknowledge"))?;
                    if count as usize != ACK_BYTES {
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
        LaneStats::add(&self.stats.wire_bytes, bytes);
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
    /// Ends the connection, and lets go of memory only when the kernel has: an acknowledgement
    /// may have failed while pages were being received.
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
        if self.ring.drain() != Held::Nothing {
            // The ring is broken: the kernel may yet write to all of it.
            let message = mem::replace(&mut self.message, Message::new());
            let heads = (mem::take(&mut self.head), mem::take(&mut self.table), mem::take(&mut self.ack));
            let contents = (mem::take(&mut self.staging), mem::take(&mut self.block));
            mem::forget((self.inbound.clone(), message, heads, contents));
        }
    }
}

/// Copies the bytes of all runs with data to where they belong.
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

/// Makes a run of pages zero, without bringing memory into being where there is none.
fn make_zero(inbound: &ReceiveState, run: &Run) -> io::Result<()> {
    for extent in inbound.ram.data_extents(run.pages.clone())? {
        for slice in inbound.ram.slices(extent) {
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
