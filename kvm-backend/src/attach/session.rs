//! One connection to a daemon: greeting, requests, and what they do to the VMM.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memlane_protocol::PageSet;
use memlane_protocol::wire::attach::{
    FromVmm, Hello, MAX_PACKET_BYTES, MAX_STATE_BYTES, Reply, Request, ToVmm, VERSIONS,
};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, MemfdFlags, SealFlags};
use rustix::time::ClockId;

use super::ownership::Ownership;
use super::{AttachError, TrackingPhase, Vmm, VmmError};
use crate::dirty::Paced;
use crate::packet;
use crate::shared::SharedWords;
use crate::userfault;

/// How long a daemon may take to answer the greeting.
const GREETING: Duration = Duration::from_secs(10);
/// When a guest that could not be resumed is resumed again.
const AGAIN: Duration = Duration::from_secs(1);

/// Why a session ended without fault of the connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The daemon ended the guest here.
    Discarded,
    /// This process wants to stop serving.
    Stopped,
}

/// A connection that a daemon has welcomed.
pub(super) struct Session<'a> {
    socket: OwnedFd,
    stop: BorrowedFd<'a>,
    vmm: &'a Mutex<dyn Vmm>,
    ownership: &'a mut Ownership,
    /// The userfaultfd of which a copy is kept.
    kept: &'a mut Option<OwnedFd>,
    /// Where harvested pages go, while tracking is on.
    dirty: Option<PageSet<SharedWords>>,
    all_armed: bool,
    /// When a paused guest runs on by itself.
    pause_ends: Option<Instant>,
}

/// A packet's bytes and descriptors.
type Packet = (Vec<u8>, Vec<OwnedFd>);

/// What a request gives: two values, and descriptors for the daemon.
type Outcome = Result<([u64; 2], Vec<OwnedFd>), VmmError>;

impl<'a> Session<'a> {
    /// Says hello over a fresh connection and waits for the welcome. `None` when asked to stop.
    pub(super) fn greet(
        socket: OwnedFd,
        stop: BorrowedFd<'a>,
        vmm: &'a Mutex<dyn Vmm>,
        ownership: &'a mut Ownership,
        kept: &'a mut Option<OwnedFd>,
    ) -> Result<Option<Self>, AttachError> {
        let (dirty, all_armed, pause_ends) = (None, false, None);
        let session = Self { socket, stop, vmm, ownership, kept, dirty, all_armed, pause_ends };
        session.hello()?;
        let Some((packet, _)) = session.receive(Some(GREETING))? else { return Ok(None) };
        match ToVmm::decode(&packet)? {
            ToVmm::Welcome { version } if (VERSIONS.0..=VERSIONS.1).contains(&version) => Ok(Some(session)),
            ToVmm::Welcome { version } => {
                Err(AttachError::Version { found: version, oldest: VERSIONS.0, newest: VERSIONS.1 })
            }
            ToVmm::Refused { reason } => Err(AttachError::Refused(reason)),
            ToVmm::Request { request, .. } => {
                Err(AttachError::Unexpected { found: request.name(), expected: "a welcome" })
            }
        }
    }

    /// Serves requests until the connection or the guest ends. The connection is closed
    /// afterwards, and tracking is off.
    pub(super) fn run(mut self) -> Result<End, AttachError> {
        loop {
            let left = self.pause_ends.map(|end| end.saturating_duration_since(Instant::now()));
            let received = match left {
                // Whatever the daemon has said since, it was too late.
                Some(Duration::ZERO) => Err(AttachError::Silent(Duration::ZERO)),
                left => self.receive(left),
            };
            let (packet, descriptors) = match received {
                Err(AttachError::Silent(_)) => {
                    self.run_on();
                    continue;
                }
                received => match received? {
                    Some(packet) => packet,
                    None => return Ok(End::Stopped),
                },
            };
            let (id, request) = match ToVmm::decode(&packet)? {
                ToVmm::Request { id, request } => (id, request),
                ToVmm::Welcome { .. } | ToVmm::Refused { .. } => {
                    return Err(AttachError::Unexpected { found: "a greeting", expected: "a request" });
                }
            };
            let outcome = self.serve(&request, descriptors);
            if let Err(error) = &outcome {
                tracing::warn!(request = request.name(), %error, "the daemon's request failed");
            }
            let ended = request == Request::Discard && outcome.is_ok();
            let (outcome, descriptors) = match outcome {
                Ok((values, descriptors)) => (Ok(values), descriptors),
                Err(error) => (Err(error.to_string()), Vec::new()),
            };
            let sent = self.send(&FromVmm::Reply(Reply { id, outcome }), &descriptors);
            if ended {
                // Nobody runs the guest any more, so nobody needs what is missing of it: a thread that waits for
                // that holds up neither the lock nor the VMM's end.
                *self.kept = None;
                // Answered first, as the VMM may end with this.
                self.lock().discard();
                return Ok(End::Discarded);
            }
            sent?;
        }
    }

    fn hello(&self) -> Result<(), AttachError> {
        let (shape, ram) = {
            let vmm = self.lock();
            (vmm.shape(), vmm.ram().clone())
        };
        let hello = Hello {
            oldest: VERSIONS.0,
            newest: VERSIONS.1,
            standing: self.ownership.standing(),
            bond: self.ownership.bond().cloned(),
            shape,
        };
        packet::send(&self.socket, &FromVmm::Hello(hello).encode(), &ram.descriptors())
            .map_err(AttachError::socket("greeting the daemon"))
    }

    /// Carries a request out, if it is in order and carries the descriptors that it should.
    fn serve(&mut self, request: &Request, mut descriptors: Vec<OwnedFd>) -> Outcome {
        let (least, most) = match request {
            Request::Load { .. } => (1, 1),
            Request::OpenUserfault { .. } => (0, 1),
            _ => (0, 0),
        };
        if !(least..=most).contains(&descriptors.len()) {
            return Err(format!("{} descriptors came with it instead of {most}", descriptors.len()).into());
        }
        self.ownership.check(request)?;
        let before = Instant::now();
        let elapsed = || before.elapsed().as_nanos() as u64;
        let none = Vec::new();
        let outcome = match *request {
            Request::StartTracking => ([0; 2], vec![self.start_tracking()?]),
            Request::Arm { first, pages } => {
                self.arm(first, pages)?;
                ([elapsed(), 0], none)
            }
            Request::Harvest => {
                let dirty = self.dirty.as_ref().ok_or("tracking has not been started")?;
                let new = self.lock().tracker().harvest(dirty)?;
                ([elapsed(), new], none)
            }
            Request::Pace { pages_per_second } => {
                let Paced { written_pages, target_pages } = self.lock().tracker().pace(pages_per_second)?;
                ([written_pages, target_pages], none)
            }
            Request::StopTracking => {
                self.stop_tracking()?;
                ([0; 2], none)
            }
            Request::Pause { limit_nanoseconds } => {
                self.pause(limit_nanoseconds)?;
                ([monotonic(), 0], none)
            }
            Request::Resume => {
                self.lock().resume()?;
                ([monotonic(), 0], none)
            }
            Request::Save => {
                let state = self.lock().save()?;
                let memfd = seal_state(&state)?;
                ([state.len() as u64, elapsed()], vec![memfd])
            }
            Request::Load { bytes } => {
                let memfd = descriptors.pop().ok_or("the state's descriptor is missing")?;
                let state = read_state(&File::from(memfd), bytes)?;
                self.lock().load(&state)?;
                ([elapsed(), 0], none)
            }
            Request::Relinquish(_) | Request::Prepare(_) | Request::Discard => ([0; 2], none),
            Request::OpenUserfault { keep } => ([0; 2], self.open_userfault(descriptors.pop(), keep)?),
        };
        self.ownership.done(request);
        self.pause_ends = self.pause_ends.filter(|_| self.ownership.must_resume());
        Ok(outcome)
    }

    fn start_tracking(&mut self) -> Result<OwnedFd, VmmError> {
        if self.dirty.is_some() {
            return Err("tracking has been started already".into());
        }
        let mut vmm = self.lock();
        let pages = vmm.ram().pages();
        let (words, memfd) = SharedWords::create(PageSet::words_needed(pages))?;
        let dirty = PageSet::over(pages, words)?;
        vmm.tracker().start()?;
        vmm.tracking_changed(TrackingPhase::Started);
        drop(vmm);
        self.dirty = Some(dirty);
        self.all_armed = false;
        Ok(memfd)
    }

    fn arm(&mut self, first: u64, pages: u64) -> Result<(), VmmError> {
        let end = first.checked_add(pages).ok_or("the run of pages ends beyond any guest")?;
        let mut vmm = self.lock();
        vmm.tracker().arm(first..end)?;
        let all_armed = vmm.tracker().armed() == vmm.ram().pages();
        if all_armed && !self.all_armed {
            vmm.tracking_changed(TrackingPhase::Armed);
        }
        drop(vmm);
        self.all_armed = all_armed;
        Ok(())
    }

    fn stop_tracking(&mut self) -> Result<(), VmmError> {
        let was_on = self.dirty.take().is_some();
        let mut vmm = self.lock();
        vmm.tracker().stop()?;
        if was_on {
            vmm.tracking_changed(TrackingPhase::Stopped);
        }
        Ok(())
    }

    fn pause(&mut self, limit_nanoseconds: u64) -> Result<(), VmmError> {
        self.ownership.pausing();
        let limit = (limit_nanoseconds != 0).then(|| Duration::from_nanos(limit_nanoseconds));
        // Before the vCPUs stand still, so that they do not for longer.
        self.pause_ends = limit.and_then(|limit| Instant::now().checked_add(limit));
        self.lock().pause()
    }

    /// The daemon neither ends the guest's pause nor takes the guest over: it hangs, and the guest runs on.
    fn run_on(&mut self) {
        self.pause_ends = None;
        if !self.ownership.must_resume() {
            return;
        }
        match self.lock().resume() {
            Ok(()) => {
                self.ownership.runs_on();
                tracing::warn!("the daemon did not end the guest's pause in time; the guest runs on");
            }
            Err(error) => {
                tracing::error!(%error, "the guest could not be resumed");
                self.pause_ends = Some(Instant::now() + AGAIN);
            }
        }
    }

    /// A userfaultfd of this process, made by the rights of whoever opened `device` or by its own;
    /// its page tables; its mappings.
    fn open_userfault(&mut self, device: Option<OwnedFd>, keep: bool) -> Result<Vec<OwnedFd>, VmmError> {
        let opened = match &device {
            Some(device) => userfault::open_by(device.as_fd()),
            None => userfault::open(),
        };
        let opened = opened.map_err(|error| format!("making a userfaultfd: {error}"))?;
        let file = |path| File::open(path).map_err(|error| format!("opening {path}: {error}"));
        let (pagemap, maps) = (file("/proc/self/pagemap")?, file("/proc/self/maps")?);
        // Before the daemon can register anything: memory has one userfaultfd at a time.
        *self.kept = if keep { Some(opened.try_clone()?) } else { None };
        Ok(vec![opened, pagemap.into(), maps.into()])
    }

    fn send(&self, message: &FromVmm, descriptors: &[OwnedFd]) -> Result<(), AttachError> {
        let descriptors: Vec<_> = descriptors.iter().map(OwnedFd::as_fd).collect();
        packet::send(&self.socket, &message.encode(), &descriptors)
            .map_err(AttachError::socket("answering the daemon"))
    }

    /// The next packet; `None` when asked to stop.
    fn receive(&self, patience: Option<Duration>) -> Result<Option<Packet>, AttachError> {
        let mut ready =
            [PollFd::new(&self.socket, PollFlags::IN), PollFd::from_borrowed_fd(self.stop, PollFlags::IN)];
        let deadline = patience.map(|patience| Timespec::try_from(patience).unwrap_or_default());
        let found = rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, deadline.as_ref()))
            .map_err(AttachError::socket("waiting for the daemon"))?;
        if !ready[1].revents().is_empty() {
            return Ok(None);
        }
        if found == 0 {
            return Err(AttachError::Silent(patience.unwrap_or_default()));
        }
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        let (len, descriptors) = packet::recv(&self.socket, &mut buffer)
            .map_err(AttachError::socket("receiving from the daemon"))?;
        if len == 0 {
            return Err(AttachError::Closed);
        }
        buffer.truncate(len);
        Ok(Some((buffer, descriptors)))
    }

    fn lock(&self) -> MutexGuard<'a, dyn Vmm + 'static> {
        lock(self.vmm)
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        if self.dirty.is_some()
            && let Err(error) = self.stop_tracking()
        {
            tracing::error!(%error, "tracking could not be ended");
        }
    }
}

/// The VMM. After a panic elsewhere the guest still must not stay paused, so go on with it.
pub(super) fn lock<'a>(vmm: &'a Mutex<dyn Vmm>) -> MutexGuard<'a, dyn Vmm + 'static> {
    vmm.lock().unwrap_or_else(PoisonError::into_inner)
}

fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A memfd that holds `state` and can change no more.
fn seal_state(state: &[u8]) -> Result<OwnedFd, VmmError> {
    if state.len() as u64 > MAX_STATE_BYTES {
        return Err(format!("the state has {} bytes, at most {MAX_STATE_BYTES} can move", state.len()).into());
    }
    let memfd = rustix::fs::memfd_create("vmm-state", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let file = File::from(memfd);
    file.write_all_at(state, 0)?;
    rustix::fs::fcntl_add_seals(
        &file,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL,
    )?;
    Ok(file.into())
}

/// Reads `bytes` bytes out of a daemon's memfd; a copy, so that it cannot change under the VMM.
fn read_state(file: &File, bytes: u64) -> Result<Vec<u8>, VmmError> {
    let stat = rustix::fs::fstat(file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err("the state's descriptor is no memfd".into());
    }
    if u64::try_from(stat.st_size).unwrap_or(0) < bytes || bytes > MAX_STATE_BYTES {
        return Err(format!("the state's memfd has {} bytes, not {bytes}", stat.st_size).into());
    }
    let mut state = vec![0; bytes as usize];
    file.read_exact_at(&mut state, 0)?;
    Ok(state)
}
