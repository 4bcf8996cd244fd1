//! Post-copy at the destination: what the guest waits for goes out at once, on a lane of its own.
//!
//! One thread hears of accesses to missing pages, asks the source for them, and places the answers.
//! It lives as long as pages are missing; the connection to the source may be lost and come back.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memlane_protocol::wire::WireError;
use memlane_protocol::wire::frame::{FRAME_HEADER_BYTES, Frame, PageRequest, RUN_BYTES, Run};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use tracing::warn;

use super::observer::Leg;
use crate::LaneError;
use crate::checksum::check_still;
use crate::postcopy::incoming::{By, PostcopyIncoming};
use crate::priority;
use crate::socket::{hang_up, hasten};

/// Bytes of answers received at once.
const RECEIVED_AT_ONCE: usize = 64 << 10;
/// How often the source is asked whether it is still there, when there is nothing else to ask.
const HEARTBEAT: Duration = Duration::from_millis(250);

/// The thread that serves faults. Dropping it ends the thread.
pub struct Faults {
    shared: Arc<Shared>,
}

struct Shared {
    placing: Arc<PostcopyIncoming>,
    /// A connection that has come, and is to take the place of the one before.
    fresh: Mutex<Option<OwnedFd>>,
    /// Rung when there is a connection, when it is known what is missing, and at the end.
    bell: OwnedFd,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Default)]
struct State {
    connected: bool,
    ended: bool,
}

impl Faults {
    /// Begins to hear of accesses. A source that says nothing for `silence` is given up; `lost` is
    /// called on the thread whenever a connection ends.
    pub fn start(
        placing: Arc<PostcopyIncoming>,
        silence: Duration,
        lost: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { placing, fresh: Mutex::default(), bell, state: Mutex::default() });
        let (buffer, unserved) = (vec![0; RECEIVED_AT_ONCE].into(), Vec::new());
        let server = FaultHandler { shared: shared.clone(), silence, connection: None, buffer, unserved };
        std::thread::Builder::new().name("faults".into()).spawn(move || {
            priority::raise();
            server.run(lost);
        })?;
        Ok(Self { shared })
    }

    /// Asks over this connection from now on, again for everything that is waited for.
    pub fn connect(&self, socket: OwnedFd) {
        hasten(&socket);
        lock(&self.shared.state).connected = true;
        lock(&self.shared.fresh).replace(socket);
        self.wake();
    }

    /// Whether there is a connection.
    pub fn is_connected(&self) -> bool {
        lock(&self.shared.state).connected
    }

    /// It is known now what is missing: what is waited for may be asked for.
    pub fn wake(&self) {
        // An eventfd that is already rung refuses nothing but a counter overflow.
        let _ = rustix::io::write(&self.shared.bell, &1u64.to_ne_bytes());
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        lock(&self.shared.state).ended = true;
        self.wake();
    }
}

/// What the thread has.
struct FaultHandler {
    shared: Arc<Shared>,
    silence: Duration,
    connection: Option<Connection>,
    /// Where answers arrive.
    buffer: Box<[u8]>,
    /// Addresses of accesses that nothing was done about yet.
    unserved: Vec<u64>,
}

/// The lane's connection.
struct Connection {
    socket: OwnedFd,
    /// What has come of the next frame.
    received: Vec<u8>,
    heard: Instant,
    asked: Instant,
    /// Everything that is waited for was asked for over this connection.
    asked_all: bool,
    /// When each page was asked for.
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
                    warn!(%error, "the lane for faults is lost");
                    self.hang_up();
                    lost();
                }
                Err(Ended::Memory(error)) => {
                    // Whoever waits goes on waiting; nothing is placed that is not the guest's.
                    warn!(%error, "cannot serve the faults of a guest");
                    std::thread::sleep(HEARTBEAT);
                }
            }
        }
    }

    /// Waits for something to happen, and deals with it.
    fn turn(&mut self) -> Result<(), Ended> {
        let (heard_of, rung, answered) = self.wait().map_err(|error| Ended::Memory(error.into()))?;
        if rung {
            let _ = rustix::io::read(&self.shared.bell, &mut [0u8; 8]);
            let fresh = lock(&self.shared.fresh).take();
            if let Some(socket) = fresh {
                self.hang_up();
                lock(&self.shared.state).connected = true;
                let now = Instant::now();
                let received = Vec::new();
                let asked_for = HashMap::new();
                self.connection = Some(Connection {
                    socket,
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
        // An access that cannot be served keeps nobody else waiting.
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

    /// Whether accesses wait to be heard of, the bell was rung, and bytes have come.
    fn wait(&self) -> Result<(bool, bool, bool), Errno> {
        let userfault = self.shared.placing.userfault().as_fd();
        let mut ready = vec![
            PollFd::from_borrowed_fd(userfault, PollFlags::IN),
            PollFd::new(&self.shared.bell, PollFlags::IN),
        ];
        ready.extend(self.connection.iter().map(|connection| PollFd::new(&connection.socket, PollFlags::IN)));
        let heartbeat = Timespec::try_from(HEARTBEAT).unwrap_or_default();
        rustix::io::retry_on_intr(|| poll(&mut ready, Some(&heartbeat)))?;
        let is_ready = |index: usize| ready.get(index).is_some_and(|fd| !fd.revents().is_empty());
        Ok((is_ready(0), is_ready(1), is_ready(2)))
    }

    /// Hears of accesses if there are any, and notes the pages to ask for.
    fn hear(&mut self, any: bool, requests: &mut Vec<u64>) -> io::Result<()> {
        let placing = &self.shared.placing;
        let mut heard = Ok(0);
        if any {
            heard = placing.userfault().read(|fault| self.unserved.push(fault.address));
        }
        if !placing.is_known() {
            // A page that is not missing now may yet turn out to be.
            return heard.map(drop);
        }
        let mut failed = Ok(());
        self.unserved.retain(|address| match placing.fault(*address) {
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

    /// Asks for these pages, which are waited for since `seen`, or over a fresh connection for all that
    /// are waited for.
    fn ask(&mut self, mut pages: Vec<u64>, seen: Instant) -> Result<(), Ended> {
        let placing = &self.shared.placing;
        let Some(connection) = &mut self.connection else { return Ok(()) };
        if placing.is_known() && !std::mem::replace(&mut connection.asked_all, true) {
            pages = placing.wanted();
        }
        let mut requests: Vec<u8> = pages.iter().flat_map(|page| PageRequest::Page(*page).encode()).collect();
        if requests.is_empty() && connection.asked.elapsed() >= HEARTBEAT {
            requests.extend(PageRequest::Keepalive.encode());
        }
        if requests.is_empty() {
            return Ok(());
        }
        connection.asked = Instant::now();
        let lost = |error: Errno| Ended::Connection(LaneError::io("ask for pages")(error.into()));
        // A source that does not read what little is asked is as good as gone.
        let sent =
            rustix::net::send(&connection.socket, &requests, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        match sent.map_err(lost)? {
            count if count == requests.len() => {}
            _ => return Err(lost(Errno::AGAIN)),
        }
        if !pages.is_empty() {
            placing.observer().took(Leg::Ask, seen.elapsed());
        }
        let now = Instant::now();
        connection.asked_for.extend(pages.into_iter().map(|page| (page, now)));
        Ok(())
    }

    /// Takes in what has come, and places what is complete.
    fn take_answers(&mut self) -> Result<(), Ended> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        match rustix::net::recv(&connection.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(Ended::Connection(LaneError::HungUp)),
            Ok((count, _)) => connection.received.extend_from_slice(&self.buffer[..count]),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => {
                return Err(Ended::Connection(LaneError::io("receive wanted pages")(error.into())));
            }
        }
        connection.heard = Instant::now();
        let mut runs = Vec::new();
        let mut used = 0;
        let pages = self.shared.placing.pages();
        while let Some((frame, payload)) = complete(&connection.received[used..], pages, &mut runs)? {
            let bytes = &connection.received[used..][payload];
            check_still(&frame, bytes)?;
            let complete = Instant::now();
            self.shared.placing.place(&runs, bytes, By::Fault).map_err(Ended::Memory)?;
            let asked = runs.first().and_then(|run| connection.asked_for.remove(&run.pages.start));
            if let Some(asked) = asked {
                self.shared.placing.observer().took(Leg::Transfer, complete.duration_since(asked));
                self.shared.placing.observer().took(Leg::Place, complete.elapsed());
            }
            used += FRAME_HEADER_BYTES + frame.runs * RUN_BYTES + bytes.len();
        }
        connection.received.drain(..used);
        Ok(())
    }

    fn hang_up(&mut self) {
        if let Some(connection) = self.connection.take() {
            hang_up(&connection.socket);
        }
        lock(&self.shared.state).connected = lock(&self.shared.fresh).is_some();
    }
}

/// Why a turn ended.
enum Ended {
    /// The source cannot be asked over this connection any more.
    Connection(LaneError),
    /// The guest's memory cannot be served.
    Memory(io::Error),
}

impl From<WireError> for Ended {
    fn from(error: WireError) -> Self {
        Self::Connection(error.into())
    }
}

/// The frame at the beginning of `bytes`, its runs, and where its payload lies, if all of it has come.
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
    // What is behind these locks is whole between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
