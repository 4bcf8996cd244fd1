//! Packets with file descriptors (`SCM_RIGHTS`, unix(7)) on a `SOCK_SEQPACKET` Unix socket.
//!
//! Both ends of the attach protocol use these functions, on blocking and on non-blocking sockets alike.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use memlane_protocol::wire::machine::MAX_REGIONS;
use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::descriptors::exhausted;

/// The largest number of descriptors that one packet can carry.
pub const MAX_DESCRIPTORS: usize = MAX_REGIONS;

/// Sends `bytes` and `descriptors` as one packet (sendmsg(2)).
///
/// # Errors
///
/// `InvalidInput` for more than [`MAX_DESCRIPTORS`] descriptors or no bytes, and the errors of the socket,
/// `WouldBlock` among them. If the peer is gone, the error is `BrokenPipe`, and no signal is sent.
pub fn send<Fd: AsFd>(socket: Fd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_some(socket, bytes, descriptors).map(drop)
}

/// Sends `bytes` and `descriptors` on a stream socket, which may take only the first bytes, and returns how many
/// it took. The descriptors go with the first byte.
///
/// # Errors
///
/// The errors are those of [`send`].
pub fn send_some<Fd: AsFd>(socket: Fd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if descriptors.len() > MAX_DESCRIPTORS || bytes.is_empty() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let socket = socket.as_fd();
    let send = || rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL);
    Ok(rustix::io::retry_on_intr(send)?)
}

/// Receives one packet into `buffer` (recvmsg(2)), and returns its length in bytes and its descriptors, which
/// close on exec. A length of 0 says that the peer closed the connection.
///
/// # Errors
///
/// `InvalidData` for a packet that is longer than the buffer or has more than [`MAX_DESCRIPTORS`] descriptors, an
/// error that says so if this process may have no more descriptors, and the errors of the socket, `WouldBlock`
/// among them. After an error, what came of the packet is dropped and closed.
pub fn recv<Fd: AsFd>(socket: Fd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let socket = socket.as_fd();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        let mut into = [IoSliceMut::new(buffer)];
        rustix::net::recvmsg(socket, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let refuse = |what: String| Err(io::Error::new(io::ErrorKind::InvalidData, what));
    if received.flags.contains(ReturnFlags::TRUNC) {
        return refuse(format!("a packet is longer than {} bytes", buffer.len()));
    }
    // The kernel makes as many descriptors as it can: if it made fewer than there is room for, this process may
    // have no more.
    if received.flags.contains(ReturnFlags::CTRUNC) && descriptors.len() < MAX_DESCRIPTORS {
        drop(descriptors);
        return Err(exhausted());
    }
    // The buffer is a little larger than was asked for, as it is aligned.
    if received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > MAX_DESCRIPTORS {
        return refuse(format!("a packet carries more than {MAX_DESCRIPTORS} descriptors"));
    }
    Ok((received.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use rustix::io::{FdFlags, fcntl_getfd};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn packets_keep_their_borders_and_descriptors() {
        let (here, there) = pair();
        let (pipe, _end) = rustix::pipe::pipe().unwrap();
        send(&here, b"one", &[]).unwrap();
        send(&here, b"three", &[pipe.as_fd(); 3]).unwrap();
        send(&here, b"most", &[pipe.as_fd(); MAX_DESCRIPTORS]).unwrap();
        let mut buffer = [0; 16];
        let (len, descriptors) = recv(&there, &mut buffer).unwrap();
        assert_eq!((&buffer[..len], descriptors.len()), (&b"one"[..], 0));
        let (len, descriptors) = recv(&there, &mut buffer).unwrap();
        assert_eq!((&buffer[..len], descriptors.len()), (&b"three"[..], 3));
        assert!(descriptors.iter().all(|fd| fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC)));
        assert_eq!(recv(&there, &mut buffer).unwrap().1.len(), MAX_DESCRIPTORS);
    }

    #[test]
    fn too_much_is_refused_and_the_rest_is_read_on() {
        let (here, there) = pair();
        let (pipe, _end) = rustix::pipe::pipe().unwrap();
        let too_many = [pipe.as_fd(); MAX_DESCRIPTORS + 1];
        assert_eq!(send(&here, b"x", &too_many).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(send(&here, b"", &[]).unwrap_err().kind(), io::ErrorKind::InvalidInput);

        // A peer that keeps to no limit: a long packet, and one with too many descriptors.
        send(&here, &[7; 100], &[pipe.as_fd()]).unwrap();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS + 1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&too_many)));
        rustix::net::sendmsg(&here, &[IoSlice::new(b"y")], &mut ancillary, SendFlags::empty()).unwrap();
        send(&here, b"fine", &[]).unwrap();

        let mut buffer = [0; 16];
        for what in ["longer than 16 bytes", "more than 64 descriptors"] {
            let error = recv(&there, &mut buffer).unwrap_err();
            assert!(
                error.kind() == io::ErrorKind::InvalidData && error.to_string().contains(what),
                "{error}"
            );
        }
        assert_eq!(recv(&there, &mut buffer).unwrap().0, 4);
    }

    /// The test runs in a process of its own, in which no other test needs descriptors.
    #[test]
    fn a_process_that_has_run_out_says_so() {
        const ALONE: &str = "MEMLANE_TEST_FEW_DESCRIPTORS";
        if std::env::var_os(ALONE).is_none() {
            let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
            alone.args(["packet::tests::a_process_that_has_run_out_says_so", "--exact", "--nocapture"]);
            assert!(alone.env(ALONE, "1").status().unwrap().success());
            return;
        }
        let (here, there) = pair();
        let (pipe, _end) = rustix::pipe::pipe().unwrap();
        send(&here, b"many", &[pipe.as_fd(); MAX_DESCRIPTORS]).unwrap();
        send(&here, b"fine", &[]).unwrap();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let few = rustix::process::Rlimit { current: Some(30), ..limit };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, few).unwrap();
        let mut buffer = [0; 16];
        let error = recv(&there, &mut buffer).unwrap_err();
        assert!(error.to_string().contains("run out of file descriptors (limit 30)"), "{error}");
        // What had come was closed.
        assert_eq!(recv(&there, &mut buffer).unwrap().0, 4);
        assert!(rustix::pipe::pipe().is_ok());
    }

    #[test]
    fn an_end_and_an_empty_socket_are_told_apart() {
        let (here, there) = pair();
        let mut buffer = [0; 16];
        rustix::io::ioctl_fionbio(&there, true).unwrap();
        assert_eq!(recv(&there, &mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(here);
        assert_eq!(recv(&there, &mut buffer).unwrap().0, 0);
        assert_eq!(send(&there, b"x", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
