//! Post-copy at the source: answers what the destination's guest waits for, before anything else.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::frame::{
    Content, FRAME_HEADER_BYTES, MAX_RUNS, PAGE_REQUEST_BYTES, PageRequest, RUN_BYTES, Run,
};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::message::Message;
use crate::priority;
use crate::send::encode::{encode_frame, sort_out_zeros};
use crate::socket::hasten;
use crate::{LaneError, LaneStats, SendState};

/// Page requests read at once.
const AT_ONCE: usize = 64;

/// Answers requests over one connection.
pub struct PageServer {
    outbound: Arc<SendState>,
    stats: Arc<LaneStats>,
    socket: Arc<OwnedFd>,
    sequence: u64,
    runs: Vec<Run>,
    head: Vec<u8>,
    message: Box<Message>,
    /// What has come and is not dealt with.
    requests: Vec<u8>,
    silence: Duration,
}

impl PageServer {
    /// For the lane over `socket`, on which something is asked again and again: whoever says nothing
    /// for `silence` is gone.
    pub fn new(
        outbound: Arc<SendState>,
        stats: Arc<LaneStats>,
        socket: Arc<OwnedFd>,
        silence: Duration,
    ) -> Result<Self, LaneError> {
        hasten(&*socket);
        set_socket_timeout(&*socket, Timeout::Recv, Some(silence))
            .and_then(|()| set_socket_timeout(&*socket, Timeout::Send, Some(silence)))
            .map_err(|error| LaneError::io("prepare the lane for faults")(error.into()))?;
        Ok(Self {
            outbound,
            stats,
            socket,
            sequence: 0,
            runs: Vec::with_capacity(MAX_RUNS),
            head: Vec::with_capacity(FRAME_HEADER_BYTES + MAX_RUNS * RUN_BYTES),
            message: Message::new(),
            requests: Vec::with_capacity(AT_ONCE * PAGE_REQUEST_BYTES),
            silence,
        })
    }

    /// Answers until the connection ends.
    pub fn run(mut self) -> LaneError {
        priority::raise();
        loop {
            if let Err(error) = self.turn() {
                return error.of(&self.outbound.ram);
            }
        }
    }

    fn turn(&mut self) -> Result<(), LaneError> {
        let mut bytes = [0; AT_ONCE * PAGE_REQUEST_BYTES];
        let room = AT_ONCE * PAGE_REQUEST_BYTES - self.requests.len();
        match rustix::net::recv(&*self.socket, &mut bytes[..room], RecvFlags::empty()) {
            Ok((0, _)) => return Err(LaneError::HungUp),
            Ok((count, _)) => self.requests.extend_from_slice(&bytes[..count]),
            Err(Errno::INTR) => return Ok(()),
            Err(Errno::AGAIN) => return Err(LaneError::Silent(self.silence)),
            Err(error) => return Err(LaneError::io("read which pages are wanted")(error.into())),
        }
        let whole = self.requests.len() / PAGE_REQUEST_BYTES * PAGE_REQUEST_BYTES;
        for at in (0..whole).step_by(PAGE_REQUEST_BYTES) {
            let request =
                PageRequest::decode(&self.requests[at..at + PAGE_REQUEST_BYTES], self.outbound.ram.pages())?;
            self.answer(request)?;
        }
        self.requests.drain(..whole);
        Ok(())
    }

    fn answer(&mut self, request: PageRequest) -> Result<(), LaneError> {
        self.runs.clear();
        if let PageRequest::Page(page) = request {
            let pages = self.outbound.ram.whole(page..page + 1);
            self.outbound.on_wanted(pages.clone());
            self.sort_out(pages);
        }
        self.sequence += 1;
        let payload = encode_frame(&self.outbound, self.sequence, &self.runs, &mut self.head);
        self.message.fill(&mut self.head, &self.outbound.ram, &self.runs);
        LaneStats::add(&self.stats.wire_bytes, self.message.remaining() as u64);
        // What was looked at and summed up was the guest's; if it is cut from here on, the sum does not fit.
        self.outbound.ram.intact().map_err(LaneError::Memory)?;
        self.message.send_all(&*self.socket).map_err(LaneError::io("answer with a wanted page"))?;
        LaneStats::add(&self.stats.data_pages, payload / PAGE_SIZE);
        Ok(())
    }

    /// A huge page may fall apart into more runs than a frame has: it is then sent as it is.
    fn sort_out(&mut self, pages: Range<u64>) {
        sort_out_zeros(&self.outbound.ram, pages.clone(), &mut self.runs);
        if self.runs.len() > MAX_RUNS {
            self.runs.clear();
            self.runs.push(Run { pages, content: Content::Data });
        }
    }
}
