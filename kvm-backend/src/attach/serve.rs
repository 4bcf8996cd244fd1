//! [`serve`]: a thread keeps a VMM attached to its daemon: it connects, serves, and connects again.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memlane_protocol::wire::attach::RunState;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::connection::{Connection, ConnectionEnd};
use super::lifecycle::Lifecycle;
use super::{AttachError, Vmm, lock};

/// The first and the longest wait between two attempts to connect.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// How a VMM attaches.
#[derive(Clone, Debug)]
pub struct Options {
    /// The path of the daemon's attach socket.
    pub socket: PathBuf,
    /// The guest's standing: [`RunState::Running`], or [`RunState::Incoming`] for a VMM that awaits a guest.
    pub run_state: RunState,
    /// Whether a refusal by the daemon ends the attachment. Otherwise the refusal is logged and the thread
    /// connects again, as its reason (such as a name that is taken) may go away.
    pub refusal_is_final: bool,
}

/// Why an attachment ended.
#[derive(Debug)]
pub enum Ended {
    /// The guest runs elsewhere or will never run here, and [`Vmm::discard`] has been called.
    Discarded,
    /// [`Attachment::stop`] was called, or the attachment was dropped.
    Stopped,
    /// The daemon refused this VMM, and [`Options::refusal_is_final`] was set.
    Refused(String),
}

/// The thread that keeps a VMM attached. Dropping this value ends the attachment, as [`Attachment::stop`] does.
#[derive(Debug)]
pub struct Attachment {
    stop: OwnedFd,
    thread: Option<JoinHandle<Ended>>,
}

/// Keeps the VMM attached to a daemon, by a thread of its own. The daemon need not run yet.
///
/// # Errors
///
/// `InvalidInput` if the run state is neither running nor incoming; otherwise the thread could not be started.
pub fn serve(options: Options, vmm: Arc<Mutex<dyn Vmm>>) -> io::Result<Attachment> {
    if !matches!(options.run_state, RunState::Running | RunState::Incoming) {
        let reason = format!("a VMM attaches as running or incoming, not as {:?}", options.run_state);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let thread = AttachThread {
        stop: stop.try_clone()?,
        lifecycle: Lifecycle::new(options.run_state),
        options,
        vmm,
        kept_userfault: ManuallyDrop::new(None),
    };
    let thread = std::thread::Builder::new().name("attach".into()).spawn(|| thread.run())?;
    Ok(Attachment { stop, thread: Some(thread) })
}

impl Attachment {
    /// Ends the attachment and returns why it ended. A guest that a daemon has paused and not taken over is
    /// resumed.
    pub fn stop(mut self) -> Ended {
        self.signal();
        self.join()
    }

    /// Waits until the attachment ends, and returns why it ended.
    pub fn wait(mut self) -> Ended {
        self.join()
    }

    /// Returns whether the attachment has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn signal(&self) {
        // An error would mean that the counter is full of signals already.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }

    fn join(&mut self) -> Ended {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(ended)) => ended,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ended::Stopped,
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.signal();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by its hook.
            let _ = thread.join();
        }
    }
}

/// The thread's own state.
struct AttachThread {
    options: Options,
    stop: OwnedFd,
    vmm: Arc<Mutex<dyn Vmm>>,
    lifecycle: Lifecycle,
    /// A copy of the guest's userfaultfd, so that threads which wait for missing pages go on waiting when the
    /// daemon's copy is closed. Only a request of a daemon closes it: the guest would find zeros in place of these
    /// pages.
    kept_userfault: ManuallyDrop<Option<OwnedFd>>,
}

impl AttachThread {
    /// Attaches again and again until the attachment ends.
    fn run(mut self) -> Ended {
        let mut wait = BACK_OFF.0;
        let mut last_error = String::new();
        loop {
            self.resume_if_paused();
            let (mut welcomed, began) = (false, Instant::now());
            let ended = self.attach_once(&mut welcomed);
            if self.lifecycle.run_state() == RunState::Incoming {
                // No guest has arrived whose pages could be missing.
                *self.kept_userfault = None;
            }
            self.resume_if_paused();
            match ended {
                Ok(ConnectionEnd::Discarded) => return Ended::Discarded,
                Ok(ConnectionEnd::Stopped) => return Ended::Stopped,
                Err(AttachError::Refused(reason)) if self.options.refusal_is_final => {
                    return Ended::Refused(reason);
                }
                Err(error) => {
                    let error = error.to_string();
                    // The same line is not logged every two seconds while there is no daemon.
                    if welcomed || error != last_error {
                        tracing::warn!(socket = %self.options.socket.display(), error, "not attached to the daemon; trying again");
                    }
                    last_error = error;
                }
            }
            // The wait grows on if the daemon hangs up right after its welcome.
            wait = if welcomed && began.elapsed() > BACK_OFF.1 { BACK_OFF.0 } else { wait };
            if self.stopped_within(wait) {
                self.resume_if_paused();
                return Ended::Stopped;
            }
            wait = (wait * 2).min(BACK_OFF.1);
        }
    }

    /// Attaches once, and serves until the connection ends. `welcomed` is set once the daemon has welcomed this
    /// VMM.
    fn attach_once(&mut self, welcomed: &mut bool) -> Result<ConnectionEnd, AttachError> {
        let socket = connect(&self.options.socket)
            .map_err(AttachError::socket("connect to the daemon (is memlaned running?)"))?;
        let Self { stop, vmm, lifecycle, kept_userfault, .. } = self;
        match Connection::greet(socket, stop.as_fd(), &**vmm, lifecycle, kept_userfault)? {
            Some(connection) => {
                *welcomed = true;
                tracing::info!(socket = %self.options.socket.display(), "attached");
                connection.run()
            }
            None => Ok(ConnectionEnd::Stopped),
        }
    }

    /// Resumes a guest that a daemon has paused and not taken over, as no daemon is connected.
    fn resume_if_paused(&mut self) {
        if !self.lifecycle.must_resume() {
            return;
        }
        match lock(&self.vmm).resume() {
            Ok(()) => {
                self.lifecycle.runs_on();
                tracing::warn!("the daemon went away while the guest was paused; the guest has been resumed");
            }
            // It is tried again before the next attempt to connect.
            Err(error) => tracing::error!(%error, "the guest could not be resumed; trying again"),
        }
    }

    /// Waits, and returns whether the thread was asked to stop meanwhile.
    fn stopped_within(&self, wait: Duration) -> bool {
        let mut ready = [PollFd::new(&self.stop, PollFlags::IN)];
        let wait = Timespec::try_from(wait).unwrap_or_default();
        // If a signal interrupts the wait, it is shorter.
        rustix::event::poll(&mut ready, Some(&wait)).is_ok_and(|found| found != 0)
    }
}

/// Connects to the socket at `path`.
fn connect(path: &Path) -> rustix::io::Result<OwnedFd> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}
