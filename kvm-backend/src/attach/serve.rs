//! The thread that keeps a VMM attached: connects, serves, and connects again.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memlane_protocol::wire::attach::Standing;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::ownership::Ownership;
use super::session::{End, Session, lock};
use super::{AttachError, Vmm};

/// First and longest wait between two attempts to connect.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// How to attach.
#[derive(Clone, Debug)]
pub struct Options {
    /// The daemon's attach socket.
    pub socket: PathBuf,
    /// [`Standing::Running`], or [`Standing::Incoming`] for a VMM that waits for a guest.
    pub standing: Standing,
    /// Whether a refusal by the daemon ends the attachment. Otherwise it is logged and tried
    /// again, as what was in the way (a name that is taken) may go away.
    pub refusal_is_final: bool,
}

/// Why an attachment ended.
#[derive(Debug)]
pub enum Ended {
    /// The guest runs elsewhere, or will never run here; [`Vmm::discard`] has been called.
    Discarded,
    /// [`Attachment::stop`] was called, or the attachment dropped.
    Stopped,
    /// The daemon refused this VMM, and [`Options::refusal_is_final`] was set.
    Refused(String),
}

/// A VMM that is being kept attached. Dropping it ends that.
#[derive(Debug)]
pub struct Attachment {
    stop: OwnedFd,
    thread: Option<JoinHandle<Ended>>,
}

/// Keeps the VMM attached to a daemon, from a thread of its own.
///
/// The daemon need not be there yet. Fails if the standing is none to begin with, or the
/// thread cannot be started.
pub fn serve(options: Options, vmm: Arc<Mutex<dyn Vmm>>) -> io::Result<Attachment> {
    if !matches!(options.standing, Standing::Running | Standing::Incoming) {
        let reason = format!("a VMM attaches as running or incoming, not as {:?}", options.standing);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let attached = Attached {
        stop: stop.try_clone()?,
        ownership: Ownership::new(options.standing),
        options,
        vmm,
        kept: ManuallyDrop::new(None),
    };
    let thread = std::thread::Builder::new().name("attach".into()).spawn(|| attached.keep())?;
    Ok(Attachment { stop, thread: Some(thread) })
}

impl Attachment {
    /// Ends the attachment and returns why it ended. A guest that a daemon had paused and not
    /// taken over runs on.
    pub fn stop(mut self) -> Ended {
        self.signal();
        self.join()
    }

    /// Waits until the attachment ends.
    pub fn wait(mut self) -> Ended {
        self.join()
    }

    /// Whether the attachment has ended.
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

/// What the thread owns.
struct Attached {
    options: Options,
    stop: OwnedFd,
    vmm: Arc<Mutex<dyn Vmm>>,
    ownership: Ownership,
    /// A copy of a userfaultfd, which whoever waits for missing pages goes on to wait by. Only a
    /// daemon has it closed: the guest would find zeros in place of these pages.
    kept: ManuallyDrop<Option<OwnedFd>>,
}

impl Attached {
    /// Attaches again and again until there is an end to it.
    fn keep(mut self) -> Ended {
        let mut wait = BACK_OFF.0;
        let mut last_error = String::new();
        loop {
            self.run_on();
            let (mut welcomed, began) = (false, Instant::now());
            let ended = self.attach_once(&mut welcomed);
            if self.ownership.standing() == Standing::Incoming {
                // No guest has come whose pages could be missing: the next one finds memory as any other.
                *self.kept = None;
            }
            self.run_on();
            match ended {
                Ok(End::Discarded) => return Ended::Discarded,
                Ok(End::Stopped) => return Ended::Stopped,
                Err(AttachError::Refused(reason)) if self.options.refusal_is_final => {
                    return Ended::Refused(reason);
                }
                Err(error) => {
                    let error = error.to_string();
                    // Not the same line every two seconds while there is no daemon.
                    if welcomed || error != last_error {
                        tracing::warn!(socket = %self.options.socket.display(), error, "not attached");
                    }
                    last_error = error;
                }
            }
            // A daemon that hangs up right after its welcome has its reasons.
            wait = if welcomed && began.elapsed() > BACK_OFF.1 { BACK_OFF.0 } else { wait };
            if self.stopped_within(wait) {
                self.run_on();
                return Ended::Stopped;
            }
            wait = (wait * 2).min(BACK_OFF.1);
        }
    }

    fn attach_once(&mut self, welcomed: &mut bool) -> Result<End, AttachError> {
        let socket =
            connect(&self.options.socket).map_err(AttachError::socket("connecting to the daemon"))?;
        let Self { stop, vmm, ownership, kept, .. } = self;
        match Session::greet(socket, stop.as_fd(), &**vmm, ownership, kept)? {
            Some(session) => {
                *welcomed = true;
                tracing::info!(socket = %self.options.socket.display(), "attached");
                session.run()
            }
            None => Ok(End::Stopped),
        }
    }

    /// No daemon is there: a guest that it paused and did not take over runs on.
    fn run_on(&mut self) {
        if !self.ownership.must_resume() {
            return;
        }
        match lock(&self.vmm).resume() {
            Ok(()) => {
                self.ownership.runs_on();
                tracing::warn!("the daemon went away while the guest was paused; the guest runs on");
            }
            // Tried again before the next attempt to connect.
            Err(error) => tracing::error!(%error, "the guest could not be resumed"),
        }
    }

    /// Waits; true if asked to stop meanwhile.
    fn stopped_within(&self, wait: Duration) -> bool {
        let mut ready = [PollFd::new(&self.stop, PollFlags::IN)];
        let wait = Timespec::try_from(wait).unwrap_or_default();
        // An interrupted wait is a short one.
        rustix::event::poll(&mut ready, Some(&wait)).is_ok_and(|found| found != 0)
    }
}

fn connect(path: &Path) -> rustix::io::Result<OwnedFd> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}
