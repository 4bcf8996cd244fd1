//! The connection to the daemon, which is standard input.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use memlane_protocol::wire::WireError;
use memlane_protocol::wire::starter::{
    FIRST_DESCRIPTOR, GO, HEADER_BYTES, MAX_DESCRIPTORS, READY, StartRequest,
};
use rustix::cmsg_space;
use rustix::io::fcntl_dupfd_cloexec;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_type};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType, socketpair,
};

/// The daemon may take this long for its part of the conversation.
const PATIENCE: Duration = Duration::from_secs(30);

/// Descriptors of the starter's own have at least this number, so that those of QEMU are free for their use.
pub(crate) const ABOVE: i32 = (FIRST_DESCRIPTOR + MAX_DESCRIPTORS) as i32;

/// The conversation with the daemon broke off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    /// Standard input is no connection to a daemon.
    #[error(
        "standard input is no connection: memlaned or memlane-guest.socket starts this program, nobody else"
    )]
    NoSocket,
    /// The kernel refuses something.
    #[error("the connection to memlaned broke: {0}")]
    Broken(#[from] io::Error),
    /// The daemon asks for something that cannot be understood.
    #[error("the request of memlaned is not understood: {0}")]
    Wire(#[from] WireError),
    /// The daemon sent more descriptors than it may.
    #[error("more than {MAX_DESCRIPTORS} descriptors came with the request")]
    TooManyDescriptors,
    /// The daemon has thought better of it.
    #[error("memlaned gave up before QEMU was started")]
    GivenUp,
}

/// A connection to the daemon.
pub(crate) struct Connection(File);

impl Connection {
    /// Takes the connection over from standard input, which is empty from then on.
    ///
    /// # Errors
    ///
    /// Fails if standard input is no socket.
    pub(crate) fn from_stdin() -> Result<Self, ConnectionError> {
        let stdin = io::stdin();
        if socket_type(&stdin) != Ok(SocketType::STREAM) {
            return Err(ConnectionError::NoSocket);
        }
        let connection = Self::out_of_the_way(&stdin)?;
        rustix::stdio::dup2_stdin(File::open("/dev/null")?).map_err(io::Error::from)?;
        Ok(connection)
    }

    /// Has a connection under a number that QEMU does not need.
    fn out_of_the_way(socket: impl AsFd) -> Result<Self, ConnectionError> {
        let socket = fcntl_dupfd_cloexec(socket, ABOVE).map_err(io::Error::from)?;
        for timeout in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, timeout, Some(PATIENCE)).map_err(io::Error::from)?;
        }
        Ok(Self(socket.into()))
    }

    /// Receives the request, and the descriptors that come with it.
    ///
    /// # Errors
    ///
    /// Fails if it is none, or does not come.
    pub(crate) fn receive(&self) -> Result<(StartRequest, Vec<OwnedFd>), ConnectionError> {
        let mut header = [0; HEADER_BYTES];
        let (bytes, descriptors) = self.receive_first(&mut header)?;
        (&self.0).read_exact(&mut header[bytes..])?;
        let mut body = vec![0; StartRequest::body_bytes(&header)?];
        (&self.0).read_exact(&mut body)?;
        Ok((StartRequest::decode(&body)?, descriptors))
    }

    /// Receives the first bytes, with which the descriptors come, and returns their number.
    fn receive_first(&self, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), ConnectionError> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            let mut into = [IoSliceMut::new(buffer)];
            rustix::net::recvmsg(&self.0, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        });
        let received = received.map_err(io::Error::from)?;
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        match received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > MAX_DESCRIPTORS {
            true => Err(ConnectionError::TooManyDescriptors),
            false => Ok((received.bytes, descriptors)),
        }
    }

    /// Shows the daemon which process is about to become QEMU, and waits until it knows that. From here on this is another
    /// connection: nobody else has it, so the daemon hears when QEMU begins to run and closes it. (systemd keeps the first
    /// one open for as long as its unit runs.)
    ///
    /// # Errors
    ///
    /// Fails if the daemon gives up.
    pub(crate) fn introduce(&mut self) -> Result<(), ConnectionError> {
        // The kernel tells the daemon that this process has made it.
        let (theirs, ours) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(io::Error::from)?;
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let socket = [theirs.as_fd()];
        let fits = ancillary.push(SendAncillaryMessage::ScmRights(&socket));
        assert!(fits, "there is room for one descriptor");
        let send = || {
            let bytes = [IoSlice::new(&[READY])];
            rustix::net::sendmsg(&self.0, &bytes, &mut ancillary, SendFlags::NOSIGNAL)
        };
        rustix::io::retry_on_intr(send).map_err(io::Error::from)?;
        drop(theirs);
        *self = Self::out_of_the_way(ours)?;
        let mut answer = [0];
        match (&self.0).read(&mut answer) {
            Ok(1) if answer == [GO] => Ok(()),
            Ok(_) => Err(ConnectionError::GivenUp),
            Err(error) => Err(error.into()),
        }
    }

    /// Tells the daemon why QEMU does not run.
    pub(crate) fn say(&self, text: &str) {
        // A daemon that is gone hears nothing; the text is in the log too.
        let _ = (&self.0).write_all(text.as_bytes());
        let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
    }
}
