//! [`Connection`]: one connection to a daemon, from the greeting to its end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use memlane_protocol::PageSet;
use memlane_protocol::wire::attach::{FromVmm, MAX_PACKET_BYTES, Reply, Request, ToVmm, VERSIONS, VmmHello};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::lifecycle::Lifecycle;
use super::{AttachError, Vmm, lock};
use crate::packet;
use crate::shared::SharedWords;

/// How long a daemon may take to answer the greeting.
const GREETING: Duration = Duration::from_secs(10);
/// How long it takes until a guest that could not be resumed is resumed again.
const RESUME_RETRY: Duration = Duration::from_secs(1);

/// Why a connection ended without an error.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ConnectionEnd {
    /// The daemon has discarded the guest.
    Discarded,
    /// This process was asked to stop serving.
    Stopped,
}

/// A connection that a daemon has welcomed.
pub(super) struct Connection<'a> {
    socket: OwnedFd,
    stop: BorrowedFd<'a>,
    vmm: &'a Mutex<dyn Vmm>,
    pub(super) lifecycle: &'a mut Lifecycle,
    /// The copy of the guest's userfaultfd that outlives this connection.
    pub(super) kept_userfault: &'a mut Option<OwnedFd>,
    /// The shared set that harvested pages are added to, while tracking is on.
    pub(super) dirty: Option<PageSet<SharedWords>>,
    /// Whether all pages are write-protected.
    pub(super) all_protected: bool,
    /// When a paused guest is resumed even if the daemon has not asked for it.
    pub(super) pause_ends: Option<Instant>,
}

/// A packet's bytes and descriptors.
type Packet = (Vec<u8>, Vec<OwnedFd>);

impl<'a> Connection<'a> {
    /// Greets the daemon over a fresh connection and waits for its welcome. Returns `None` if asked to stop
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// [`AttachError`] says how the connection failed, or why the daemon refused this VMM.
    pub(super) fn greet(
        socket: OwnedFd,
        stop: BorrowedFd<'a>,
        vmm: &'a Mutex<dyn Vmm>,
        lifecycle: &'a mut Lifecycle,
        kept_userfault: &'a mut Option<OwnedFd>,
    ) -> Result<Option<Self>, AttachError> {
        let (dirty, all_protected, pause_ends) = (None, false, None);
        let connection =
            Self { socket, stop, vmm, lifecycle, kept_userfault, dirty, all_protected, pause_ends };
        connection.hello()?;
        let Some((packet, _)) = connection.receive(Some(GREETING))? else { return Ok(None) };
        match ToVmm::decode(&packet)? {
            ToVmm::Welcome { version } if (VERSIONS.0..=VERSIONS.1).contains(&version) => {
                Ok(Some(connection))
            }
            ToVmm::Welcome { version } => {
                Err(AttachError::Version { found: version, oldest: VERSIONS.0, newest: VERSIONS.1 })
            }
            ToVmm::Refused { reason } => Err(AttachError::Refused(reason)),
            ToVmm::Request { request, .. } => {
                Err(AttachError::Unexpected { found: request.name(), expected: "a welcome" })
            }
        }
    }

    /// Serves requests until the connection ends or the guest is discarded. Afterwards the connection is closed,
    /// and tracking is off.
    ///
    /// # Errors
    ///
    /// [`AttachError`] says how the connection failed.
    pub(super) fn run(mut self) -> Result<ConnectionEnd, AttachError> {
        loop {
            let left = self.pause_ends.map(|end| end.saturating_duration_since(Instant::now()));
            let received = match left {
                // What the daemon may have sent since is too late.
                Some(Duration::ZERO) => Err(AttachError::Silent(Duration::ZERO)),
                left => self.receive(left),
            };
            let (packet, descriptors) = match received {
                Err(AttachError::Silent(_)) => {
                    self.resume_overdue();
                    continue;
                }
                received => match received? {
                    Some(packet) => packet,
                    None => return Ok(ConnectionEnd::Stopped),
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
                // The guest runs here no more, and needs no missing page: a thread that waits for one must hold up
                // neither the lock nor the VMM's end.
                *self.kept_userfault = None;
                // The request was answered before, as the VMM may end with this call.
                self.lock().discard();
                return Ok(ConnectionEnd::Discarded);
            }
            sent?;
        }
    }

    /// Sends the greeting, with the descriptors of the guest's memory.
    fn hello(&self) -> Result<(), AttachError> {
        let (shape, ram) = {
            let vmm = self.lock();
            (vmm.shape(), vmm.ram().clone())
        };
        let hello = VmmHello {
            oldest: VERSIONS.0,
            newest: VERSIONS.1,
            run_state: self.lifecycle.run_state(),
            bond: self.lifecycle.bond().cloned(),
            shape,
        };
        packet::send(&self.socket, &FromVmm::Hello(hello).encode(), &ram.descriptors())
            .map_err(AttachError::socket("greet the daemon"))
    }

    /// Resumes a guest whose pause the daemon did not end in time: the daemon hangs.
    fn resume_overdue(&mut self) {
        self.pause_ends = None;
        if !self.lifecycle.must_resume() {
            return;
        }
        match self.lock().resume() {
            Ok(()) => {
                self.lifecycle.runs_on();
                tracing::warn!(
                    "the daemon did not end the guest's pause in time; the guest has been resumed"
                );
            }
            Err(error) => {
                tracing::error!(%error, "the guest could not be resumed; trying again");
                self.pause_ends = Some(Instant::now() + RESUME_RETRY);
            }
        }
    }

    /// Sends a message to the daemon.
    fn send(&self, message: &FromVmm, descriptors: &[OwnedFd]) -> Result<(), AttachError> {
        let descriptors: Vec<_> = descriptors.iter().map(OwnedFd::as_fd).collect();
        packet::send(&self.socket, &message.encode(), &descriptors)
            .map_err(AttachError::socket("answer the daemon"))
    }

    /// Receives the next packet. Returns `None` if asked to stop, and [`AttachError::Silent`] if none comes within
    /// `patience`.
    fn receive(&self, patience: Option<Duration>) -> Result<Option<Packet>, AttachError> {
        let mut ready =
            [PollFd::new(&self.socket, PollFlags::IN), PollFd::from_borrowed_fd(self.stop, PollFlags::IN)];
        let deadline = patience.map(|patience| Timespec::try_from(patience).unwrap_or_default());
        let found = rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, deadline.as_ref()))
            .map_err(AttachError::socket("wait for the daemon"))?;
        if !ready[1].revents().is_empty() {
            return Ok(None);
        }
        if found == 0 {
            return Err(AttachError::Silent(patience.unwrap_or_default()));
        }
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        let (len, descriptors) = packet::recv(&self.socket, &mut buffer)
            .map_err(AttachError::socket("receive from the daemon"))?;
        if len == 0 {
            return Err(AttachError::Closed);
        }
        buffer.truncate(len);
        Ok(Some((buffer, descriptors)))
    }

    /// Locks the VMM.
    pub(super) fn lock(&self) -> MutexGuard<'a, dyn Vmm + 'static> {
        lock(self.vmm)
    }
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        if self.dirty.is_some()
            && let Err(error) = self.stop_tracking()
        {
            tracing::error!(%error, "tracking could not be stopped; the guest may run slower until its VMM ends");
        }
    }
}
