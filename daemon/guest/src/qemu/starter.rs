//! This module has the starter (`tools/starter`) start a QEMU as the user of its guest.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use memlane_kvm::packet;
use memlane_net::unix_socket::peer;
use memlane_protocol::wire::plain;
use memlane_protocol::wire::starter::{GO, READY, StartRequest};
use socket2::{Domain, SockAddr, Socket, Type};

use super::child::collect;
use crate::config::GuestsConfig;

/// The starter may take this long for its part of the conversation: systemd may be busy with other things.
const PATIENCE: Duration = Duration::from_secs(30);
/// A starter says at most this many bytes of why it does not start QEMU.
const MAX_REASON: u64 = 2 << 10;

/// No QEMU was started.
#[derive(Debug, thiserror::Error)]
pub enum StarterError {
    /// Nobody can change the user.
    #[error(
        "this daemon is not root, so it cannot start QEMU as a user of its own, and nobody listens at {}, who \
         could: `systemctl enable --now memlane-guest.socket`, or name the socket in guests.starter_socket of the \
         configuration",
        .0.display()
    )]
    Nobody(PathBuf),
    /// The starter cannot be connected to.
    #[error("cannot connect to {}: {source}; see `systemctl status memlane-guest.socket`", socket.display())]
    Connect {
        /// This is its socket.
        socket: PathBuf,
        /// This is what the kernel said.
        source: io::Error,
    },
    /// The starter cannot be run.
    #[error("cannot run {}: {source}; install it, or name it in guests.starter of the configuration", starter.display())]
    Run {
        /// This is its path.
        starter: PathBuf,
        /// This is what the kernel said.
        source: io::Error,
    },
    /// The conversation broke off.
    #[error(
        "the starter broke off: {0}; see `journalctl -u 'memlane-guest@*'`, and whether daemon and starter are of one \
         build"
    )]
    Broken(io::Error),
    /// The starter refuses.
    #[error("{0}")]
    Refused(String),
    /// The starter is not what it should be.
    #[error("what listens at {} is no starter: {why}", socket.display())]
    Impostor {
        /// This is the socket.
        socket: PathBuf,
        /// This is what is wrong.
        why: &'static str,
    },
}

/// A starter that is about to become QEMU.
pub(super) struct Ready {
    connection: UnixStream,
    child: Option<Child>,
    pid: u32,
}

impl Ready {
    /// Has a starter check a request, and returns when it is about to become QEMU.
    ///
    /// # Errors
    ///
    /// Fails if there is no starter, or if it refuses.
    pub(super) fn ask(
        guests: &GuestsConfig,
        request: &StartRequest,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Self, StarterError> {
        let (connection, child) = connect(guests)?;
        let mut ready = Self { connection, child, pid: 0 };
        set_patience(&ready.connection)?;
        (ready.connection, ready.pid) = ready.converse(guests, request, descriptors)?;
        set_patience(&ready.connection)?;
        Ok(ready)
    }

    /// Returns the number of the process, which waits until [`Self::go`].
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Lets the process become QEMU. Returns the process as a child, if it is one of the daemon, which must be collected
    /// when it has ended.
    ///
    /// # Errors
    ///
    /// Fails if QEMU cannot be run.
    pub(super) fn go(mut self) -> Result<Option<Child>, StarterError> {
        let told = (&self.connection).write_all(&[GO]).and_then(|()| rest(&self.connection, Vec::new()));
        match told {
            Ok(reason) if reason.is_empty() => Ok(self.child.take()),
            other => Err(other.map_or_else(StarterError::Broken, StarterError::Refused)),
        }
    }

    fn converse(
        &self,
        guests: &GuestsConfig,
        request: &StartRequest,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(UnixStream, u32), StarterError> {
        let socket = || match self.child {
            Some(_) => guests.starter.clone(),
            None => guests.starter_socket.clone(),
        };
        // A starter that has heard enough says why, and does not listen to the end.
        let sent = send(&self.connection, &request.encode(), descriptors);
        let mut answer = [0];
        let received = packet::recv(&self.connection, &mut answer).map_err(StarterError::Broken)?;
        let made = match received {
            (1, made) if answer == [READY] => made,
            (1, _) => {
                let reason = rest(&self.connection, answer.into()).map_err(StarterError::Broken)?;
                return Err(StarterError::Refused(reason));
            }
            _ => {
                let end = || io::Error::other("it hung up without a word");
                return Err(StarterError::Broken(sent.err().unwrap_or_else(end)));
            }
        };
        let impostor = |why| StarterError::Impostor { socket: socket(), why };
        // What the kernel says of the socket holds for the starter, who has made it.
        let [made] = <[OwnedFd; 1]>::try_from(made).map_err(|_| impostor("it does not show its process"))?;
        let process = peer(&made).map_err(StarterError::Broken)?;
        match process.uid {
            0 => Ok((made.into(), process.pid)),
            _ => Err(impostor("it is not root, and so cannot change its user")),
        }
    }
}

impl Drop for Ready {
    /// Gives up, and collects the process. A starter hears the end of the connection.
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            collect(&mut child);
        }
    }
}

/// Connects to systemd's socket, or runs a starter as a child, if nobody listens there and this daemon is root.
fn connect(guests: &GuestsConfig) -> Result<(UnixStream, Option<Child>), StarterError> {
    let (connection, child) = match connect_to(&guests.starter_socket) {
        Ok(connection) => (connection, None),
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Err(StarterError::Connect { socket: guests.starter_socket.clone(), source: error });
        }
        Err(_) if !rustix::process::geteuid().is_root() => {
            return Err(StarterError::Nobody(guests.starter_socket.clone()));
        }
        Err(_) => {
            let failed = |source| StarterError::Run { starter: guests.starter.clone(), source };
            run(guests).map(|(connection, child)| (connection, Some(child))).map_err(failed)?
        }
    };
    Ok((connection, child))
}

fn set_patience(connection: &UnixStream) -> Result<(), StarterError> {
    let set = connection.set_read_timeout(Some(PATIENCE));
    set.and_then(|()| connection.set_write_timeout(Some(PATIENCE))).map_err(StarterError::Broken)
}

fn connect_to(path: &Path) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Where many wait to be accepted, connecting waits as well.
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(OwnedFd::from(socket).into())
}

fn run(guests: &GuestsConfig) -> io::Result<(UnixStream, Child)> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(&guests.starter);
    command.arg("--users").arg(guests.users.to_string()).arg("--shim").arg(&guests.shim);
    for program in &guests.qemu {
        command.arg("--qemu").arg(program);
    }
    for group in &guests.groups {
        command.arg("--group").arg(group.to_string());
    }
    command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).env_clear();
    Ok((ours, command.spawn()?))
}

/// Sends the descriptors with the first of the bytes, and all of these; without a signal if the starter is gone.
fn send(connection: &UnixStream, mut bytes: &[u8], mut descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    while !bytes.is_empty() {
        let sent = packet::send_some(connection.as_fd(), bytes, descriptors)?;
        (bytes, descriptors) = (&bytes[sent..], &[]);
    }
    Ok(())
}

/// Reads what the starter says to the end of the connection.
fn rest(connection: &UnixStream, mut text: Vec<u8>) -> io::Result<String> {
    connection.take(MAX_REASON).read_to_end(&mut text)?;
    Ok(plain(&String::from_utf8_lossy(&text)).into_owned())
}
