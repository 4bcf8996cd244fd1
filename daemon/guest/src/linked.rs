//! The driver for VMMs that link `memlane-kvm` and attach over the Unix socket.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use memlane_kvm::packet;
use memlane_kvm::ram::GuestRam;
use memlane_kvm::shared::SharedWords;
use memlane_net::task;
use memlane_protocol::PageSet;
use memlane_protocol::wire::attach::{
    Bond, FromVmm, HANDS_OVER_AGAIN, HANDS_OVER_MEMORY, MAX_PACKET_BYTES, MAX_STATE_BYTES, Reply, Request,
    ToVmm,
};
use rustix::net::sockopt::socket_peercred;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, oneshot, watch};
use tracing::{debug, warn};

use super::memory::{DEVICE, Handles, open_device};
use super::{
    Driver, DriverError, Harvest, LoadedState, SavedState, StateReader, StateWriter, ThrottleStats, VmmMemory,
};
use crate::process::Hang;

/// A VMM may take this long for one request.
const PATIENCE: Duration = Duration::from_secs(10);

/// An attached VMM.
pub struct Linked {
    socket: Rc<AsyncFd<OwnedFd>>,
    /// This lock is held while a request is under way.
    asking: Mutex<()>,
    next_id: Cell<u32>,
    /// This is the version of the protocol that both sides speak.
    version: u16,
    /// This is the guest's memory. A shim has none, because it knows of no guest.
    ram: Option<Arc<GuestRam>>,
    harvested: RefCell<Option<Rc<PageSet<SharedWords>>>>,
    /// This takes the VMM's state when it is saved.
    state: RefCell<Option<StateWriter>>,
    connection: Rc<Connection>,
}

/// The reading task and the tasks that ask share this state.
struct Connection {
    waiting: RefCell<HashMap<u32, oneshot::Sender<Answer>>>,
    gone: watch::Sender<bool>,
}

/// A reply of the VMM, and the descriptors that came with it.
type Answer = (Reply, Vec<OwnedFd>);

impl Linked {
    /// Drives the VMM at the other end of `socket`, which speaks `version` of the protocol, and whose guest's memory is
    /// `ram`.
    pub fn new(socket: AsyncFd<OwnedFd>, version: u16, ram: Option<Arc<GuestRam>>) -> Self {
        let socket = Rc::new(socket);
        let connection = Rc::new(Connection { waiting: RefCell::default(), gone: watch::Sender::new(false) });
        task::spawn("answers of a VMM", read_replies(socket.clone(), connection.clone()));
        Self {
            socket,
            asking: Mutex::new(()),
            next_id: Cell::new(1),
            version,
            ram,
            harvested: RefCell::default(),
            state: RefCell::default(),
            connection,
        }
    }

    /// Asks for a userfaultfd of the process, made with the `device` if there is one, and for the descriptors from
    /// which its memory can be found.
    pub(super) async fn open_userfault(
        &self,
        device: Option<&OwnedFd>,
        keep: bool,
    ) -> Result<Handles, DriverError> {
        let request = Request::OpenUserfault { keep };
        let lent = device.map(OwnedFd::as_fd);
        self.ask_for_handles(request, lent.as_slice()).await
    }

    /// Asks for the userfaultfd that the process keeps, and for the descriptors from which its memory can be found.
    pub(super) async fn kept_userfault(&self) -> Result<Handles, DriverError> {
        let request = Request::KeptUserfault;
        if self.version < HANDS_OVER_AGAIN || is_of_before() {
            let reason = "it links a memlane-kvm of before version 4 of the attach protocol".into();
            return Err(DriverError::Failed { request: request.name(), reason });
        }
        self.ask_for_handles(request, &[]).await
    }

    /// Asks for the file that the process has mapped at an address.
    pub(super) async fn mapped_file(&self, address: u64) -> Result<OwnedFd, DriverError> {
        let request = Request::MappedFile { address };
        let name = request.name();
        if self.version < HANDS_OVER_MEMORY {
            let reason = "it is of before version 5 of the attach protocol; start the VMM anew".into();
            return Err(DriverError::Failed { request: name, reason });
        }
        let (_, descriptors) = self.ask(request).await?;
        let count = descriptors.len();
        let [file] = <[OwnedFd; 1]>::try_from(descriptors).map_err(|_| {
            let reason = format!("{count} descriptors came instead of 1");
            DriverError::Broken { request: name, reason }
        })?;
        Ok(file)
    }

    async fn ask_for_handles(
        &self,
        request: Request,
        lent: &[BorrowedFd<'_>],
    ) -> Result<Handles, DriverError> {
        let name = request.name();
        let (_, descriptors) = self.ask_with(request, lent).await?;
        Handles::take(descriptors)
            .map_err(|error| DriverError::Broken { request: name, reason: error.to_string() })
    }

    fn pages(&self) -> u64 {
        self.ram.as_ref().map_or(0, |ram| ram.pages())
    }

    async fn ask(&self, request: Request) -> Result<([u64; 2], Vec<OwnedFd>), DriverError> {
        self.ask_with(request, &[]).await
    }

    /// Sends one request. Returns the reply's values and descriptors.
    async fn ask_with(
        &self,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<([u64; 2], Vec<OwnedFd>), DriverError> {
        let _one_at_a_time = self.asking.lock().await;
        let id = self.next_id.replace(self.next_id.get().wrapping_add(1));
        let (sender, answer) = oneshot::channel();
        if *self.connection.gone.borrow() {
            return Err(DriverError::Unheard);
        }
        self.connection.waiting.borrow_mut().insert(id, sender);
        let name = request.name();
        let exchange = async {
            let packet = ToVmm::Request { id, request }.encode();
            send(&self.socket, &packet, descriptors).await.map_err(|_| DriverError::Unheard)?;
            answer.await.map_err(|_| DriverError::Gone)
        };
        match tokio::time::timeout(PATIENCE, exchange).await {
            Ok(Ok((Reply { outcome: Ok(values), .. }, descriptors))) => Ok((values, descriptors)),
            Ok(Ok((Reply { outcome: Err(reason), .. }, _))) => {
                Err(DriverError::Failed { request: name, reason })
            }
            Ok(Err(gone)) => Err(gone),
            Err(_) => {
                let pid =
                    socket_peercred(&*self.socket).map_or(0, |peer| peer.pid.as_raw_nonzero().get() as u32);
                Err(DriverError::Slow { request: name, after: PATIENCE, hang: Hang::of(pid) })
            }
        }
    }
}

/// Tells, in debug builds only, whether `MEMLANE_DEBUG_OLD_VMMS` is set, so that tests find VMMs that link a library of
/// before.
fn is_of_before() -> bool {
    cfg!(debug_assertions) && std::env::var_os("MEMLANE_DEBUG_OLD_VMMS").is_some()
}

#[async_trait(?Send)]
impl Driver for Linked {
    async fn start_tracking(&self) -> Result<(), DriverError> {
        let broken = |reason: String| DriverError::Broken { request: "start tracking", reason };
        let (_, mut descriptors) = self.ask(Request::StartTracking).await?;
        let fd = descriptors.pop().ok_or_else(|| broken("it has no descriptor".into()))?;
        let words = SharedWords::map(&fd, PageSet::words_needed(self.pages()));
        let words = words.map_err(|error| broken(error.to_string()))?;
        let set = PageSet::over(self.pages(), words).map_err(|error| broken(error.to_string()))?;
        *self.harvested.borrow_mut() = Some(Rc::new(set));
        Ok(())
    }

    async fn write_protect(&self, pages: Range<u64>) -> Result<Option<Vec<Range<u64>>>, DriverError> {
        self.ask(Request::WriteProtect { first: pages.start, pages: pages.end - pages.start })
            .await
            .map(|_| None)
    }

    async fn harvest(&self, into: &PageSet) -> Result<Harvest, DriverError> {
        self.ask(Request::Harvest).await?;
        let harvested = self.harvested.borrow().clone();
        let Some(harvested) = harvested else {
            let reason = "tracking has not been started".into();
            return Err(DriverError::Failed { request: "harvest", reason });
        };
        let mut new = 0;
        task::in_pieces(self.pages(), |piece| new += harvested.drain_into(piece, into)).await;
        Ok(Harvest { new, holes: false })
    }

    async fn throttle(&self, pages_per_second: u64) -> Result<Option<ThrottleStats>, DriverError> {
        match self.ask(Request::Throttle { pages_per_second }).await {
            Ok(([written_pages, target_pages], _)) => Ok(Some(ThrottleStats { written_pages, target_pages })),
            Err(DriverError::Failed { reason, .. }) => {
                debug!(reason, "the VMM cannot hold up who writes");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn stop_tracking(&self) -> Result<(), DriverError> {
        *self.harvested.borrow_mut() = None;
        self.ask(Request::StopTracking).await.map(drop)
    }

    async fn open_memory(&self, keep: bool) -> Result<VmmMemory, DriverError> {
        let failed = |reason: String| DriverError::Failed { request: "open userfaultfd", reason };
        let ram = self.ram.as_ref().ok_or_else(|| failed("it has no guest".into()))?;
        let device = open_device();
        let handles = self.open_userfault(device.as_ref().ok(), keep).await;
        let handles = handles.map_err(|error| match (error, &device) {
            (DriverError::Failed { reason, .. }, Err(device)) => failed(format!(
                "{reason}; this daemon cannot lend it {DEVICE} ({device}): let the daemon's user read and write that"
            )),
            (error, _) => error,
        })?;
        // The trackers of such a VMM would not notice.
        let ram = ram.clone();
        let found = task::aside(move || handles.find(&ram, false)).await;
        found.map_err(|error| failed(error.to_string()))
    }

    async fn reopen_memory(&self) -> Result<VmmMemory, DriverError> {
        let failed = |reason: String| DriverError::Failed { request: Request::KeptUserfault.name(), reason };
        let ram = self.ram.clone().ok_or_else(|| failed("it has no guest".into()))?;
        let handles = self.kept_userfault().await?;
        let found = task::aside(move || handles.find(&ram, false)).await;
        found.map_err(|error| failed(error.to_string()))
    }

    async fn prepare_pause(&self, state: StateWriter, _soon: bool) -> Result<(), DriverError> {
        self.state.replace(Some(state));
        Ok(())
    }

    async fn pause(&self, limit: Duration) -> Result<Instant, DriverError> {
        let asked = Instant::now();
        let limit_nanoseconds = limit.as_nanos().try_into().unwrap_or(u64::MAX);
        self.ask(Request::Pause { limit_nanoseconds }).await.map(|_| asked)
    }

    async fn resume(&self) -> Result<Option<Duration>, DriverError> {
        self.ask(Request::Resume).await.map(|_| None)
    }

    async fn save(&self) -> Result<SavedState, DriverError> {
        let broken = |reason: String| DriverError::Broken { request: "save", reason };
        let ([bytes, nanoseconds], mut descriptors) = self.ask(Request::Save).await?;
        let fd = descriptors.pop().ok_or_else(|| broken("it has no descriptor".into()))?;
        let read = task::aside(move || read_state(fd, bytes)).await;
        let state = read.map_err(|error| broken(error.to_string()))?;
        if let Some(writer) = self.state.take() {
            // Whoever does not want it any more has given up.
            let _ = writer.send(state);
        }
        Ok(SavedState { bytes, took: Duration::from_nanos(nanoseconds), stays: None })
    }

    async fn load(&self, mut state: StateReader, bond: &Bond) -> Result<LoadedState, DriverError> {
        let failed = |error: io::Error| DriverError::Failed { request: "load", reason: error.to_string() };
        let (file, bytes) = state_file(&mut state).await.map_err(failed)?;
        let whole = Instant::now();
        self.ask_with(Request::Load { bytes }, &[file.as_fd()]).await?;
        self.ask(Request::Prepare(bond.clone())).await.map_err(|error| match error {
            // It has loaded a guest by now, and is of no use for another.
            DriverError::Failed { request, reason } => DriverError::Broken { request, reason },
            error => error,
        })?;
        Ok(LoadedState { took: whole.elapsed(), stays: None })
    }

    async fn relinquish(&self, bond: &Bond) -> Result<(), DriverError> {
        self.ask(Request::Relinquish(bond.clone())).await.map(drop)
    }

    async fn discard(&self) -> Result<(), DriverError> {
        self.ask(Request::Discard).await.map(drop)
    }

    async fn gone(&self) {
        // The sender lives as long as the reading task, which sets it last.
        let _ = self.connection.gone.subscribe().wait_for(|gone| *gone).await;
    }

    fn hang_up(&self) {
        memlane_lane::socket::hang_up(self.socket.get_ref());
        self.connection.gone.send_replace(true);
    }
}

impl Drop for Linked {
    fn drop(&mut self) {
        memlane_lane::socket::hang_up(self.socket.get_ref());
    }
}

/// Sends a packet when the socket takes it.
pub(super) async fn send(
    socket: &AsyncFd<OwnedFd>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    loop {
        let mut ready = socket.writable().await?;
        if let Ok(result) = ready.try_io(|socket| packet::send(socket.get_ref(), bytes, descriptors)) {
            return result;
        }
    }
}

/// Receives the next packet and its descriptors. Returns `None` when the connection was closed.
pub(super) async fn receive(socket: &AsyncFd<OwnedFd>) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    loop {
        let mut ready = socket.readable().await?;
        if let Ok(result) = ready.try_io(|socket| packet::recv(socket.get_ref(), &mut buffer)) {
            let (bytes, descriptors) = result?;
            buffer.truncate(bytes);
            return Ok((bytes > 0).then_some((buffer, descriptors)));
        }
    }
}

async fn read_replies(socket: Rc<AsyncFd<OwnedFd>>, connection: Rc<Connection>) {
    loop {
        let reply = match receive(&socket).await {
            Ok(Some((packet, descriptors))) => FromVmm::decode(&packet).map(|reply| (reply, descriptors)),
            Ok(None) => break,
            Err(error) => {
                warn!(%error, "cannot read from a VMM; it is taken for gone");
                break;
            }
        };
        match reply {
            Ok((FromVmm::Reply(reply), descriptors)) => {
                // The task that asked may have given up meanwhile.
                if let Some(sender) = connection.waiting.borrow_mut().remove(&reply.id) {
                    let _ = sender.send((reply, descriptors));
                }
            }
            Ok((FromVmm::Hello(_) | FromVmm::Shim { .. }, _)) => {
                warn!("a VMM said hello twice; it is taken for gone");
                break;
            }
            Err(error) => {
                warn!(%error, "a VMM broke the protocol; it is taken for gone");
                break;
            }
        }
    }
    connection.gone.send_replace(true);
    connection.waiting.borrow_mut().clear();
}

fn read_state(fd: OwnedFd, bytes: u64) -> io::Result<Vec<u8>> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    if bytes > MAX_STATE_BYTES {
        return Err(invalid(format!("its state has {bytes} bytes, at most {MAX_STATE_BYTES} are allowed")));
    }
    // Only memory can be sealed: a file of some file system might keep its reader waiting.
    rustix::fs::fcntl_get_seals(&fd).map_err(|_| invalid("its state is not in a memfd".into()))?;
    let mut file = std::fs::File::from(fd);
    file.seek(SeekFrom::Start(0))?;
    let mut state = Vec::new();
    file.take(bytes).read_to_end(&mut state)?;
    if state.len() as u64 != bytes {
        return Err(invalid(format!("its state ends after {} of {bytes} bytes", state.len())));
    }
    Ok(state)
}

/// Writes a state to memory while it comes. Returns the file and its length.
async fn state_file(state: &mut StateReader) -> io::Result<(std::fs::File, u64)> {
    let fd = rustix::fs::memfd_create("vmm-state", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    while let Some(piece) = state.recv().await {
        file.write_all(&piece)?;
    }
    let bytes = file.stream_position()?;
    file.seek(SeekFrom::Start(0))?;
    Ok((file, bytes))
}
