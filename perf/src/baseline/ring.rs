//! An io_uring that moves one buffer at a time over one socket.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, squeue, types};
use rustix::net::{RecvFlags, SendFlags};

/// A ring for one socket. Only the thread that made it may use it.
pub(crate) struct SocketRing {
    // Before `socket`: the ring goes first, and takes what is in flight with it.
    ring: IoUring,
    socket: TcpStream,
}

impl SocketRing {
    pub(crate) fn new(socket: TcpStream) -> io::Result<Self> {
        let ring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(2)?;
        Ok(Self { ring, socket })
    }

    /// Sends all of `buffer`.
    pub(crate) fn send(&mut self, buffer: &[u8]) -> io::Result<()> {
        // The kernel goes on after a short send by itself if it is told to wait for all.
        let flags = (SendFlags::NOSIGNAL.bits() | RecvFlags::WAITALL.bits()) as i32;
        let mut rest = buffer;
        while !rest.is_empty() {
            let entry =
                opcode::Send::new(types::Fd(self.socket.as_raw_fd()), rest.as_ptr(), length(rest.len()))
                    .flags(flags)
                    .build();
            // SAFETY: the entry reads from `rest`, which is borrowed until the call returns.
            rest = &rest[unsafe { self.complete(&entry)? }..];
        }
        Ok(())
    }

    /// Fills all of `buffer`.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let flags = RecvFlags::WAITALL.bits() as i32;
        let mut rest = buffer;
        while !rest.is_empty() {
            let entry =
                opcode::Recv::new(types::Fd(self.socket.as_raw_fd()), rest.as_mut_ptr(), length(rest.len()))
                    .flags(flags)
                    .build();
            // SAFETY: the entry writes to `rest`, which is exclusively borrowed until the call returns.
            rest = &mut rest[unsafe { self.complete(&entry)? }..];
        }
        Ok(())
    }

    /// Submits `entry`, waits for it, and returns how many bytes it moved, which is more than 0.
    ///
    /// # Safety
    ///
    /// The buffer that `entry` names must stay valid until this returns.
    unsafe fn complete(&mut self, entry: &squeue::Entry) -> io::Result<usize> {
        // SAFETY: by the caller's promise; and this returns before completion only where nothing was submitted.
        unsafe { self.ring.submission().push(entry) }.expect("the queue is empty between operations");
        let result = loop {
            // Fails only if it submitted nothing: the first turn before the operation starts, later ones on a signal.
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                Ok(_) | Err(_) => {}
            }
            if let Some(completion) = self.ring.completion().next() {
                break completion.result();
            }
        };
        match usize::try_from(result) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other end closed the connection")),
            Ok(bytes) => Ok(bytes),
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
        }
    }
}

/// Returns how many bytes one operation may move; the callers' loops continue with the rest.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(1 << 30)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let client = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
        (client, listener.accept().expect("a connection").0)
    }

    #[test]
    fn moves_more_than_the_socket_buffers_hold() {
        let (client, server) = pair();
        let sent: Vec<u8> = (0..16_u32 << 20).map(|index| (index % 251) as u8).collect();
        let received = std::thread::scope(|scope| {
            scope.spawn(|| SocketRing::new(client).expect("a ring").send(&sent).expect("a send"));
            let mut received = vec![0; sent.len()];
            SocketRing::new(server).expect("a ring").receive(&mut received).expect("a receive");
            received
        });
        assert!(received == sent);
    }

    #[test]
    fn a_closed_connection_is_an_error() {
        let (client, server) = pair();
        drop(client);
        let error = SocketRing::new(server).expect("a ring").receive(&mut [0; 8]).expect_err("nothing came");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
