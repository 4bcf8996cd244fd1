//! The daemon's end, played by the test.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use memlane_kvm::packet;
use memlane_protocol::wire::attach::{FromVmm, MAX_PACKET_BYTES, Reply, Request, ToVmm, VERSIONS};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::LONG;

/// A daemon that listens.
pub(crate) struct Daemon {
    listener: OwnedFd,
    path: PathBuf,
}

/// A shim's connection to it.
pub(crate) struct Connection(OwnedFd);

/// What a shim hands over.
pub(crate) struct Handles {
    pub userfault: OwnedFd,
    pub pagemap: File,
    pub maps: File,
}

impl Daemon {
    pub(crate) fn new(path: &Path) -> Self {
        let flags = SocketFlags::CLOEXEC;
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
        rustix::net::listen(&listener, 16).unwrap();
        Self { listener, path: path.into() }
    }

    /// Waits for the shim of process `pid`, and welcomes it.
    pub(crate) fn welcome(&self, pid: u32) -> Connection {
        let connection = self.accept(pid);
        connection.send(&ToVmm::Welcome { version: VERSIONS.1 }, &[]);
        connection
    }

    /// Waits for the shim of process `pid`, and welcomes it; those of other processes may come before.
    pub(crate) fn welcome_among_others(&self, pid: u32) -> Connection {
        loop {
            let (connection, found) = self.accept_any();
            if found == pid {
                connection.send(&ToVmm::Welcome { version: VERSIONS.1 }, &[]);
                return connection;
            }
        }
    }

    /// Waits for the shim of process `pid`, up to its greeting.
    pub(crate) fn accept(&self, pid: u32) -> Connection {
        let (connection, found) = self.accept_any();
        assert_eq!(found, pid);
        connection
    }

    fn accept_any(&self) -> (Connection, u32) {
        wait_for(self.listener.as_fd());
        let socket = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC).unwrap();
        let peer = rustix::net::sockopt::socket_peercred(&socket).unwrap();
        let connection = Connection(socket);
        let (greeting, descriptors) = connection.receive().expect("a greeting");
        assert_eq!(
            (greeting, descriptors.len()),
            (FromVmm::Shim { oldest: VERSIONS.0, newest: VERSIONS.1 }, 0)
        );
        (connection, peer.pid.as_raw_nonzero().get() as u32)
    }

    /// Returns whether a shim has connected and was not accepted yet.
    pub(crate) fn has_caller(&self) -> bool {
        is_ready(self.listener.as_fd(), &Timespec { tv_sec: 0, tv_nsec: 0 })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        std::fs::remove_file(&self.path).unwrap();
    }
}

impl Connection {
    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    pub(crate) fn send(&self, message: &ToVmm, descriptors: &[BorrowedFd<'_>]) {
        packet::send(&self.0, &message.encode(), descriptors).unwrap();
    }

    /// The next message, or `None` where the shim has closed the connection.
    pub(crate) fn receive(&self) -> Option<(FromVmm, Vec<OwnedFd>)> {
        wait_for(self.0.as_fd());
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        match packet::recv(&self.0, &mut buffer) {
            Ok((0, _)) | Err(_) => None,
            Ok((length, descriptors)) => Some((FromVmm::decode(&buffer[..length]).unwrap(), descriptors)),
        }
    }

    pub(crate) fn ask(
        &self,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> (Result<[u64; 2], String>, Vec<OwnedFd>) {
        let id = 0x1234_5678;
        self.send(&ToVmm::Request { id, request }, descriptors);
        let (message, descriptors) = self.receive().expect("a reply");
        let FromVmm::Reply(Reply { id: replied, outcome }) = message else { panic!("{message:?}") };
        assert_eq!(replied, id);
        (outcome, descriptors)
    }

    /// Asks for a userfaultfd, by the rights of `device` or by those of the shim's process.
    pub(crate) fn open_userfault(&self, device: Option<&File>) -> Result<Handles, String> {
        self.open(device, false)
    }

    /// The same, and the shim is to keep a copy of it.
    pub(crate) fn keep_userfault(&self, device: &File) -> Handles {
        self.open(Some(device), true).unwrap()
    }

    fn open(&self, device: Option<&File>, keep: bool) -> Result<Handles, String> {
        let lent: Vec<_> = device.iter().map(|device| device.as_fd()).collect();
        let (outcome, descriptors) = self.ask(Request::OpenUserfault { keep }, &lent);
        let count = descriptors.len();
        match (outcome, <[OwnedFd; 3]>::try_from(descriptors)) {
            (Ok(values), Ok([userfault, pagemap, maps])) => {
                assert_eq!(values, [0; 2]);
                Ok(Handles { userfault, pagemap: pagemap.into(), maps: maps.into() })
            }
            (Err(reason), Err(_)) if count == 0 => Err(reason),
            (outcome, _) => panic!("{outcome:?} with {count} descriptors"),
        }
    }
}

fn wait_for(fd: BorrowedFd<'_>) {
    assert!(is_ready(fd, &Timespec::try_from(LONG).unwrap()), "nothing came");
}

fn is_ready(fd: BorrowedFd<'_>, patience: &Timespec) -> bool {
    let mut ready = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, Some(patience))).unwrap() == 1
}
