//! Post-copy at the source: answers the destination's page requests, ahead of all other pages.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::frame::{
    Content, FRAME_HEADER_BYTES, MAX_RUNS, PAGE_REQUEST_BYTES, PageRequest, RUN_BYTES, Run,
};
use rustix::net::RecvFlags;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::message::Message;
use crate::priority;
use crate::send::encode::{classify_zeros, encode_frame};
use crate::socket::prioritize;
use crate::transport::{Sealed, Transport};
use crate::{LaneError, LaneStats, SendState};

/// One read takes at most this many page requests.
const AT_ONCE: usize = 64;

/// Answers page requests over one connection.
pub struct PageServer {
    send_state: Arc<SendState>,
    stats: Arc<LaneStats>,
    transport: Transport,
    /// Answers of an encrypted lane are sealed here.
    sealed: Sealed,
    sequence: u64,
    runs: Vec<Run>,
    head: Vec<u8>,
    message: Box<Message>,
    /// These bytes of requests have come and are not answered yet.
    requests: Vec<u8>,
    silence: Duration,
}

impl PageServer {
    /// Makes the page server of the lane over `transport`. The destination sends requests or keepalives all the time, so a
    /// connection on which nothing comes for `silence` is given up.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the socket's timeouts.
    pub fn new(
        send_state: Arc<SendState>,
        stats: Arc<LaneStats>,
        transport: Transport,
        silence: Duration,
    ) -> Result<Self, LaneError> {
        prioritize(&*transport.socket);
        let socket = &*transport.socket;
        set_socket_timeout(socket, Timeout::Recv, Some(silence))
            .and_then(|()| set_socket_timeout(socket, Timeout::Send, Some(silence)))
            .map_err(|error| LaneError::io("prepare the lane for faults")(error.into()))?;
        Ok(Self {
            send_state,
            stats,
            transport,
            sealed: Sealed::default(),
            sequence: 0,
            runs: Vec::with_capacity(MAX_RUNS),
            head: Vec::with_capacity(FRAME_HEADER_BYTES + MAX_RUNS * RUN_BYTES),
            message: Message::new(),
            requests: Vec::with_capacity(AT_ONCE * PAGE_REQUEST_BYTES),
            silence,
        })
    }

    /// Answers requests until the connection ends, and returns why it ended.
    pub fn run(mut self) -> LaneError {
        priority::raise();
        loop {
            if let Err(error) = self.turn() {
                return error.or_lost_memory(&self.send_state.ram);
            }
        }
    }

    fn turn(&mut self) -> Result<(), LaneError> {
        let mut bytes = [0; AT_ONCE * PAGE_REQUEST_BYTES];
        if !self.transport.receive(&mut self.requests, &mut bytes, RecvFlags::empty())? {
            return Err(LaneError::Silent(self.silence));
        }
        let whole = self.requests.len() / PAGE_REQUEST_BYTES * PAGE_REQUEST_BYTES;
        for at in (0..whole).step_by(PAGE_REQUEST_BYTES) {
            let request = PageRequest::decode(
                &self.requests[at..at + PAGE_REQUEST_BYTES],
                self.send_state.ram.pages(),
            )?;
            self.answer(request)?;
        }
        self.requests.drain(..whole);
        Ok(())
    }

    fn answer(&mut self, request: PageRequest) -> Result<(), LaneError> {
        self.runs.clear();
        if let PageRequest::Page(page) = request {
            let pages = self.send_state.ram.whole(page..page + 1);
            self.send_state.on_page_request(pages.clone());
            self.classify(pages);
        }
        self.sequence += 1;
        let payload = encode_frame(&self.send_state, self.sequence, &self.runs, &mut self.head);
        self.message.fill(&mut self.head, &self.send_state.ram, &self.runs);
        // Up to here the memory held the guest's data. If it is cut off from here on, the checksum does not fit.
        self.send_state.ram.intact().map_err(LaneError::Memory)?;
        let bytes = self.transport.send_all(&mut self.message, &mut self.sealed)?;
        LaneStats::add(&self.stats.wire_bytes, bytes);
        LaneStats::add(&self.stats.data_pages, payload / PAGE_SIZE);
        Ok(())
    }

    /// Splits a page into runs of zeros and data. A huge page that has more runs than fit into a frame is sent as data.
    fn classify(&mut self, pages: Range<u64>) {
        classify_zeros(&self.send_state.ram, pages.clone(), &mut self.runs);
        if self.runs.len() > MAX_RUNS {
            self.runs.clear();
            self.runs.push(Run { pages, content: Content::Data });
        }
    }
}
