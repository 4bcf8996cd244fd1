//! A shim (`tools/shim`) acts for the daemon inside a VMM that knows nothing of Memlane.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use memlane_net::task;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::debug;

use super::driver::{Driver, DriverError};
use super::linked::Linked;
use super::memory::{DEVICE, Handles, open_device};
use super::process::Hang;

/// This many shims may be connected at once. Children of a VMM that load the shim count as well.
pub const MOST: usize = 1024;

/// A shim may take this long for a request: it makes three system calls.
const PATIENCE: Duration = Duration::from_secs(5);

/// The memory of a process cannot be tracked from here.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// No shim has connected from the process.
    #[error(
        "there is no shim in process {0}: start it with LD_PRELOAD=/usr/lib/memlane/libmemlane_shim.so and \
         MEMLANE_ATTACH_SOCKET set to the attach_socket of this daemon, as a user that attach_users names"
    )]
    Missing(u32),
    /// Neither the daemon nor the process may make a userfaultfd.
    #[error(
        "a userfaultfd of process {pid} is not permitted: this daemon cannot open {DEVICE} ({device}), and \
         the process may not do without ({reason}); let the daemon's user read and write {DEVICE}, or set \
         vm.unprivileged_userfaultfd to 1"
    )]
    NotPermitted {
        /// This is the number of the process.
        pid: u32,
        /// This is why the daemon could not open the device.
        device: io::Error,
        /// This is what the shim said.
        reason: String,
    },
    /// The kernel has no such device.
    #[error(
        "there is no {DEVICE} here, and process {pid} may not do without ({reason}); Memlane needs Linux 6.7 \
         or newer with CONFIG_USERFAULTFD, and in a container the device must be passed into it"
    )]
    NoDevice {
        /// This is the number of the process.
        pid: u32,
        /// This is what the shim said.
        reason: String,
    },
    /// The shim has tried with the daemon's device, and failed.
    #[error(
        "the shim in process {pid} failed: {reason}; see whether a seccomp filter (QEMU's -sandbox, systemd's \
         SystemCallFilter=) or a limit on open files forbids it"
    )]
    Failed {
        /// This is the number of the process.
        pid: u32,
        /// This is what the shim said.
        reason: String,
    },
    /// The shim does not answer.
    #[error("the shim in process {pid} did not answer within {after:.0?}{hang}")]
    Slow {
        /// This is the number of the process.
        pid: u32,
        /// The answer was waited for this long.
        after: Duration,
        /// This is why, as far as it can be seen.
        hang: Hang,
    },
    /// The shim's answer makes no sense, or the connection was lost over it.
    #[error(
        "the shim in process {pid} broke off: {reason}; see whether the process still runs, and try again"
    )]
    Broken {
        /// This is the number of the process.
        pid: u32,
        /// This is what happened.
        reason: String,
    },
}

impl ShimError {
    /// Says of the shim in process `pid` what its driver says.
    fn of(pid: u32, error: DriverError) -> Self {
        match error {
            DriverError::Failed { reason, .. } => Self::Failed { pid, reason },
            DriverError::Slow { after, hang, .. } => Self::Slow { pid, after, hang },
            DriverError::Broken { reason, .. } => Self::Broken { pid, reason },
            other => Self::Broken { pid, reason: other.to_string() },
        }
    }
}

/// Lists the shims that are connected, by the numbers of their processes.
#[derive(Default)]
pub struct Shims {
    connected: watch::Sender<HashMap<u32, Rc<Linked>>>,
}

impl Shims {
    /// Asks the shim in process `pid` for a userfaultfd of the process, and for the descriptors from which its memory
    /// can be found. With `keep` the process keeps a copy of the userfaultfd.
    ///
    /// The device that userfaultfds are made with is opened here, so that the process needs no rights. Where that fails, the process's own rights decide.
    ///
    /// # Errors
    ///
    /// Fails if no shim has connected from the process, if the shim does not answer, or if it may not make a
    /// userfaultfd.
    pub(crate) async fn open_userfault(&self, pid: u32, keep: bool) -> Result<Handles, ShimError> {
        let shim = self.of(pid)?;
        let device = open_device();
        let answer = timeout(PATIENCE, shim.open_userfault(device.as_ref().ok(), keep)).await;
        let answer = match answer {
            Ok(answer) => answer.map_err(|error| ShimError::of(pid, error)),
            Err(_) => Err(ShimError::Slow { pid, after: PATIENCE, hang: Hang::of(pid) }),
        };
        match (answer, device) {
            (Err(ShimError::Failed { reason, .. }), Err(Errno::NOENT | Errno::NXIO | Errno::NODEV)) => {
                Err(ShimError::NoDevice { pid, reason })
            }
            (Err(ShimError::Failed { reason, .. }), Err(error)) => {
                Err(ShimError::NotPermitted { pid, device: error.into(), reason })
            }
            (answer, _) => answer,
        }
    }

    /// Asks the shim in process `pid` for the userfaultfd that it keeps, and for the descriptors from which its memory can
    /// be found.
    ///
    /// # Errors
    ///
    /// Fails if no shim has connected from the process, if it keeps none, or if it does not answer.
    pub(crate) async fn kept_userfault(&self, pid: u32) -> Result<Handles, ShimError> {
        let shim = self.of(pid)?;
        match timeout(PATIENCE, shim.kept_userfault()).await {
            Ok(answer) => answer.map_err(|error| ShimError::of(pid, error)),
            Err(_) => Err(ShimError::Slow { pid, after: PATIENCE, hang: Hang::of(pid) }),
        }
    }

    /// Asks the shim in process `pid` for the file that the process has mapped at an address.
    ///
    /// # Errors
    ///
    /// Fails if no shim has connected from the process, if the process has no such file, or if it does not answer.
    pub(crate) async fn mapped_file(&self, pid: u32, address: u64) -> Result<OwnedFd, ShimError> {
        let shim = self.of(pid)?;
        match timeout(PATIENCE, shim.mapped_file(address)).await {
            Ok(answer) => answer.map_err(|error| ShimError::of(pid, error)),
            Err(_) => Err(ShimError::Slow { pid, after: PATIENCE, hang: Hang::of(pid) }),
        }
    }

    fn of(&self, pid: u32) -> Result<Rc<Linked>, ShimError> {
        self.connected.borrow().get(&pid).cloned().ok_or(ShimError::Missing(pid))
    }

    /// Waits for the shim in process `pid`, at most for `patience`. Returns whether it is there.
    pub async fn wait_for(&self, pid: u32, patience: Duration) -> bool {
        let mut connected = self.connected.subscribe();
        timeout(patience, connected.wait_for(|shims| shims.contains_key(&pid))).await.is_ok()
    }

    /// Tells whether the shim in process `pid` may connect.
    pub(super) fn has_room(&self, pid: u32) -> bool {
        let connected = self.connected.borrow();
        connected.len() < MOST || connected.contains_key(&pid)
    }

    /// Takes in the shim in process `pid`, which stays until its connection ends, and keeps `share` for as long.
    pub(super) fn add(
        self: &Rc<Self>,
        pid: u32,
        version: u16,
        socket: AsyncFd<OwnedFd>,
        share: impl Sized + 'static,
    ) {
        // There may have been room only while it was being greeted; it comes again.
        if !self.has_room(pid) {
            return;
        }
        debug!(pid, "a shim connected");
        // Of the guest's pages it knows nothing.
        let shim = Rc::new(Linked::new(socket, version, None));
        let shims = self.clone();
        let connected = shim.clone();
        task::spawn("watch of a shim", async move {
            connected.gone().await;
            debug!(pid, "a shim is gone");
            drop(share);
            shims.connected.send_if_modified(|shims| {
                let is_this = shims.get(&pid).is_some_and(|other| Rc::ptr_eq(other, &connected));
                is_this && shims.remove(&pid).is_some()
            });
        });
        self.connected.send_modify(|shims| {
            // Its process may have run another program, and with it connected anew.
            if let Some(before) = shims.insert(pid, shim) {
                before.hang_up();
            }
        });
    }
}

#[cfg(test)]
mod tests;
