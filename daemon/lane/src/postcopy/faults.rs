//! Post-copy at the destination: requests for pages that the guest waits for go out at once, on a lane of their own.
//!
//! One thread reads accesses to missing pages from the kernel, requests the pages from the source, and places the answers.
//! It lives as long as pages are missing. The connection to the source may be lost and come back.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memlane_protocol::wire::WireError;
use memlane_protocol::wire::frame::{FRAME_HEADER_BYTES, Frame, PageRequest, RUN_BYTES, Run};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use tracing::warn;

use super::observer::FaultStage;
use crate::LaneError;
use crate::checksum::check_paused;
use crate::postcopy::incoming::{By, PostcopyIncoming};
use crate::priority;
use crate::socket::{hang_up, prioritize};
use crate::transport::Transport;

/// One read takes at most this many bytes of answers.
const RECEIVED_AT_ONCE: usize = 64 << 10;
/// A keepalive goes to the source this often when there is no page to request.
const HEARTBEAT: Duration = Duration::from_millis(250);

/// The thread that serves faults. Dropping it ends the thread.
pub struct Faults {
    shared: Arc<Shared>,
}

struct Shared {
    incoming: Arc<PostcopyIncoming>,
    /// This connection is to replace the one before.
    fresh: Mutex<Option<Transport>>,
    /// This eventfd is written when there is a connection, when all missing pages are known, and at the end.
    bell: OwnedFd,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Default)]
struct State {
    connected: bool,
    ended: bool,
}

impl Faults {
    /// Starts the thread. It gives a connection up whose source sends nothing for `silence`, and calls `lost` whenever a
    /// connection ends.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses an eventfd or a thread.
    pub fn start(
        incoming: Arc<PostcopyIncoming>,
        silence: Duration,
        lost: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { incoming, fresh: Mutex::default(), bell, state: Mutex::default() });
        let (buffer, unserved) = (vec![0; RECEIVED_AT_ONCE].into(), Vec::new());
        let server = FaultHandler { shared: shared.clone(), silence, connection: None, buffer, unserved };
        std::thread::Builder::new().name("faults".into()).spawn(move || {
            priority::raise();
            server.run(lost);
        })?;
        Ok(Self { shared })
    }

    /// Uses this connection from now on, and requests all pages again that accesses wait for.
    pub fn connect(&self, mut transport: Transport) {
        if let Some(records) = &mut transport.records {
            records.make_room(RECEIVED_AT_ONCE);
        }
        prioritize(&*transport.socket);
        lock(&self.shared.state).connected = true;
        lock(&self.shared.fresh).replace(transport);
        self.wake();
    }

    /// Returns whether there is a connection.
    pub fn is_connected(&self) -> bool {
        lock(&self.shared.state).connected
    }

    /// Wakes the thread, because all missing pages are known now and may be requested.
    pub fn wake(&self) {
        // The write fails only if the counter would overflow, and then the thread is woken anyway.
        let _ = rustix::io::write(&self.shared.bell, &1u64.to_ne_bytes());
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        lock(&self.shared.state).ended = true;
        self.wake();
    }
}

/// The state of the thread.
struct FaultHandler {
    shared: Arc<Shared>,
    silence: Duration,
    connection: Option<Connection>,
    /// Answers are read into this buffer.
    buffer: Box<[u8]>,
    /// These addresses were accessed, and their pages are neither placed nor requested yet.
    unserved: Vec<u64>,
}

/// The connection to the source.
struct Connection {
    transport: Transport,
    /// This is the part of the next frame that has come.
    received: Vec<u8>,
    heard: Instant,
    asked: Instant,
    /// All pages that accesses wait for were requested over this connection.
    asked_all: bool,
    /// Each page was requested at this time.
    asked_for: HashMap<u64, Instant>,
}

impl FaultHandler {
    fn run(mut self, lost: impl Fn()) {
        loop {
            let turn = self.turn();
            if lock(&self.shared.state).ended {
                return;
            }
            match turn {
                Ok(()) => {}
                Err(Ended::Connection(error)) => {
                    warn!(%error, "the lane for faults is lost; the guest waits for missing pages until it is connected again");
                    self.hang_up();
                    lost();
                }
                Err(Ended::Memory(error)) => {
                    // The vCPUs that wait go on waiting: a page must not be placed with wrong contents.
                    warn!(%error, "cannot place missing pages of a guest; its vCPUs wait, and the daemon tries again");
                    std::thread::sleep(HEARTBEAT);
                }
            }
        }
    }

    /// Waits for an event, and handles it.
    fn turn(&mut self) -> Result<(), Ended> {
        let (heard_of, rung, answered) = self.wait().map_err(|error| Ended::Memory(error.into()))?;
        if rung {
            let _ = rustix::io::read(&self.shared.bell, &mut [0u8; 8]);
            let fresh = lock(&self.shared.fresh).take();
            if let Some(transport) = fresh {
                self.hang_up();
                lock(&self.shared.state).connected = true;
                let now = Instant::now();
                let received = Vec::new();
                let asked_for = HashMap::new();
                self.connection = Some(Connection {
                    transport,
                    received,
                    heard: now,
                    asked: now,
                    asked_all: false,
                    asked_for,
                });
            }
        }
        let (mut requests, seen) = (Vec::new(), Instant::now());
        let heard = self.hear(heard_of, &mut requests);
        self.ask(requests, seen)?;
        // An access that cannot be served must not delay the others.
        let taken = if answered { self.take_answers() } else { Ok(()) };
        heard.map_err(Ended::Memory)?;
        taken?;
        match &self.connection {
            Some(connection) if connection.heard.elapsed() > self.silence => {
                Err(Ended::Connection(LaneError::Silent(connection.heard.elapsed())))
            }
            _ => Ok(()),
        }
    }

    /// Waits, and returns whether accesses can be read, whether the bell was rung, and whether answers can be read.
    fn wait(&self) -> Result<(bool, bool, bool), Errno> {
        let userfault = self.shared.incoming.userfault().as_fd();
        let mut ready = vec![
            PollFd::from_borrowed_fd(userfault, PollFlags::IN),
            PollFd::new(&self.shared.bell, PollFlags::IN),
        ];
        ready.extend(
            self.connection
                .iter()
                .map(|connection| PollFd::new(&*connection.transport.socket, PollFlags::IN)),
        );
        let heartbeat = Timespec::try_from(HEARTBEAT).unwrap_or_default();
        rustix::io::retry_on_intr(|| poll(&mut ready, Some(&heartbeat)))?;
        let is_ready = |index: usize| ready.get(index).is_some_and(|fd| !fd.revents().is_empty());
        Ok((is_ready(0), is_ready(1), is_ready(2)))
    }

    /// Reads accesses from the kernel if there are any, and adds the pages to request.
    fn hear(&mut self, any: bool, requests: &mut Vec<u64>) -> io::Result<()> {
        let incoming = &self.shared.incoming;
        let mut heard = Ok(0);
        if any {
            heard = incoming.userfault().read(|fault| self.unserved.push(fault.address));
        }
        if !incoming.is_known() {
            // A page that is not missing now may yet turn out to be.
            return heard.map(drop);
        }
        let mut failed = Ok(());
        self.unserved.retain(|address| match incoming.fault(*address) {
            Ok(page) => {
                requests.extend(page);
                false
            }
            Err(error) => {
                failed = Err(error);
                true
            }
        });
        heard.and(failed)
    }

    /// Requests these pages, whose accesses were read at `seen`. Over a new connection requests all pages that accesses
    /// wait for.
    fn ask(&mut self, mut pages: Vec<u64>, seen: Instant) -> Result<(), Ended> {
        let incoming = &self.shared.incoming;
        let Some(connection) = &mut self.connection else { return Ok(()) };
        if incoming.is_known() && !std::mem::replace(&mut connection.asked_all, true) {
            pages = incoming.awaited();
        }
        let mut requests: Vec<u8> = pages.iter().flat_map(|page| PageRequest::Page(*page).encode()).collect();
        if requests.is_empty() && connection.asked.elapsed() >= HEARTBEAT {
            requests.extend(PageRequest::Keepalive.encode());
        }
        if requests.is_empty() {
            return Ok(());
        }
        connection.asked = Instant::now();
        // A source that does not even read these few bytes is taken for dead.
        connection.transport.send_now(&requests).map_err(Ended::Connection)?;
        if !pages.is_empty() {
            incoming.observer().took(FaultStage::Request, seen.elapsed());
        }
        let now = Instant::now();
        connection.asked_for.extend(pages.into_iter().map(|page| (page, now)));
        Ok(())
    }

    /// Reads answers, and places the pages of complete ones.
    fn take_answers(&mut self) -> Result<(), Ended> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let Connection { transport, received, .. } = connection;
        if !transport.receive(received, &mut self.buffer, RecvFlags::DONTWAIT).map_err(Ended::Connection)? {
            return Ok(());
        }
        connection.heard = Instant::now();
        let mut runs = Vec::new();
        let mut used = 0;
        let pages = self.shared.incoming.pages();
        while let Some((frame, payload)) = complete(&connection.received[used..], pages, &mut runs)? {
            let bytes = &connection.received[used..][payload];
            check_paused(&frame, bytes)?;
            let complete = Instant::now();
            self.shared.incoming.place(&runs, bytes, By::Fault).map_err(Ended::Memory)?;
            let asked = runs.first().and_then(|run| connection.asked_for.remove(&run.pages.start));
            if let Some(asked) = asked {
                self.shared.incoming.observer().took(FaultStage::Transfer, complete.duration_since(asked));
                self.shared.incoming.observer().took(FaultStage::Place, complete.elapsed());
            }
            used += FRAME_HEADER_BYTES + frame.runs * RUN_BYTES + bytes.len();
        }
        connection.received.drain(..used);
        Ok(())
    }

    fn hang_up(&mut self) {
        if let Some(connection) = self.connection.take() {
            hang_up(&*connection.transport.socket);
        }
        lock(&self.shared.state).connected = lock(&self.shared.fresh).is_some();
    }
}

/// The reason why a turn of the loop failed.
enum Ended {
    /// The connection to the source is lost.
    Connection(LaneError),
    /// Pages cannot be placed in the guest's memory.
    Memory(io::Error),
}

impl From<WireError> for Ended {
    fn from(error: WireError) -> Self {
        Self::Connection(error.into())
    }
}

/// Decodes the frame at the beginning of `bytes` and its runs, and returns the frame and the place of its payload.
/// Returns `None` if the frame is not complete.
fn complete(
    bytes: &[u8],
    pages: u64,
    runs: &mut Vec<Run>,
) -> Result<Option<(Frame, std::ops::Range<usize>)>, WireError> {
    let Some(header) = bytes.get(..FRAME_HEADER_BYTES) else { return Ok(None) };
    let frame = Frame::decode(header)?;
    let table_end = FRAME_HEADER_BYTES + frame.runs * RUN_BYTES;
    let payload = table_end..table_end + frame.payload_bytes as usize;
    if bytes.len() < payload.end {
        return Ok(None);
    }
    frame.decode_runs(&bytes[FRAME_HEADER_BYTES..table_end], pages, runs)?;
    Ok(Some((frame, payload)))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code panics while the values behind these locks are half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
