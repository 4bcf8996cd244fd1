//! Sends guest memory by reference where the kernel copies zero-copy sends.
//!
//! Over veth, tap and loopback the kernel copies what is sent with `MSG_ZEROCOPY`: the receiver might keep it for as
//! long as it likes, and the sender wait as long for its notification. Pages that come out of a pipe are referred to all
//! the way, because the kernel does not report when they are free. A lane does not need that report: a page is not sent
//! again until the destination has acknowledged it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use crate::message::Message;

/// The pipe holds this many bytes: as many as any user may have by default (`fs.pipe-max-size`).
const PIPE_BYTES: usize = 1 << 20;

/// A pipe that memory goes through on its way into a socket.
pub(super) struct Splicer {
    into: OwnedFd,
    out_of: OwnedFd,
    /// The pipe contains this many bytes.
    filled: usize,
}

/// The progress of sending a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// All of the message is handed over.
    Done,
    /// The socket is full, and the rest must wait until it has room.
    NoRoom,
    /// The kernel cannot send this memory by reference. The caller must send the rest by another method.
    Impossible,
}

impl Splicer {
    pub(super) fn new() -> io::Result<Self> {
        let (out_of, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // An account with very many lanes only gets small ones more, which take more system calls than they save.
        fcntl_setpipe_size(&into, PIPE_BYTES)?;
        Ok(Self { into, out_of, filled: 0 })
    }

    /// Hands `message` over to `socket`: its last `body_bytes` by reference, and what is before them, which may be
    /// written again at once, by copying. The caller repeats the call with the same message until it is done.
    ///
    /// # Safety
    ///
    /// What the message points to must be there to be read until this returns, and the body be memory that
    /// may be written while it is sent.
    pub(super) unsafe fn send(
        &mut self,
        socket: impl AsFd,
        message: &mut Message,
        body_bytes: usize,
    ) -> io::Result<Progress> {
        let socket = socket.as_fd();
        // Only here, since an operation of io_uring does not wait on a socket that does not block.
        rustix::io::ioctl_fionbio(socket, true)?;
        // SAFETY: passed on to the caller.
        let progress = unsafe { self.send_now(socket, message, body_bytes) };
        rustix::io::ioctl_fionbio(socket, false)?;
        match progress {
            Err(Errno::AGAIN) => Ok(Progress::NoRoom),
            other => Ok(other?),
        }
    }

    /// # Safety
    ///
    /// As [`send`](Self::send).
    unsafe fn send_now(
        &mut self,
        socket: BorrowedFd<'_>,
        message: &mut Message,
        body_bytes: usize,
    ) -> Result<Progress, Errno> {
        while let Some(head) = message.remaining().checked_sub(body_bytes).filter(|head| *head > 0) {
            // SAFETY: passed on to the caller.
            let sent = unsafe { send_head(socket, message, head) }?;
            message.advance(sent);
        }
        loop {
            self.empty(socket, message.remaining() > 0)?;
            if message.remaining() == 0 {
                return Ok(Progress::Done);
            }
            // SAFETY: the pieces are there, by the caller's promise.
            match unsafe { fill(&self.into, message.rest()) } {
                Ok(count) if count > 0 => {
                    self.filled = count;
                    message.advance(count);
                }
                Err(Errno::INTR) => {}
                _ => return Ok(Progress::Impossible),
            }
        }
    }

    /// Moves what is in the pipe into the socket.
    fn empty(&mut self, socket: BorrowedFd<'_>, more: bool) -> Result<(), Errno> {
        let flags = if more { SpliceFlags::MORE } else { SpliceFlags::empty() };
        while self.filled > 0 {
            match splice(&self.out_of, None, socket, None, self.filled, flags) {
                Ok(0) => return Err(Errno::PIPE),
                Ok(count) => self.filled -= count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Sends from the first piece, at most `most` bytes.
///
/// # Safety
///
/// The first piece must be there to be read.
unsafe fn send_head(socket: BorrowedFd<'_>, message: &Message, most: usize) -> Result<usize, Errno> {
    let piece = message.rest().first().ok_or(Errno::INVAL)?;
    let flags = libc::MSG_MORE | libc::MSG_NOSIGNAL;
    // SAFETY: by the caller's promise.
    let sent = unsafe { libc::send(socket.as_raw_fd(), piece.iov_base, piece.iov_len.min(most), flags) };
    usize::try_from(sent).map_err(|_| last_error())
}

/// Puts references to as many pages into the pipe as it has room for.
///
/// # Safety
///
/// The pieces must be there to be read.
unsafe fn fill(pipe: &OwnedFd, pieces: &[libc::iovec]) -> Result<usize, Errno> {
    /// `UIO_MAXIOV`: more pieces than these are refused.
    const MAX: usize = 1024;
    let count = pieces.len().min(MAX);
    // SAFETY: the pieces are there, by the caller's promise, and the call only reads where they are.
    let taken = unsafe { libc::vmsplice(pipe.as_raw_fd(), pieces.as_ptr(), count, 0) };
    usize::try_from(taken).map_err(|_| last_error())
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    use memlane_kvm::ram::{Backing, GuestRam};
    use memlane_protocol::PAGE_SIZE;
    use memlane_protocol::wire::frame::{Content, Run};
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    const PAGES: u64 = 4096;
    const HEAD: [u8; 100] = [7; 100];

    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    /// Memory in which every word says where it is.
    fn ram() -> GuestRam {
        let ram = GuestRam::create(&[(0, PAGES * PAGE_SIZE)], &Backing::Memfd).unwrap();
        let slice = ram.slices(0..PAGES).next().unwrap();
        (0..slice.len / 8).for_each(|word| {
            // SAFETY: within the slice, which no other thread uses.
            unsafe { slice.ptr.cast::<u64>().add(word).write(word as u64) };
        });
        ram
    }

    fn words(pages: std::ops::Range<u64>) -> Vec<u8> {
        (pages.start * PAGE_SIZE / 8..pages.end * PAGE_SIZE / 8).flat_map(u64::to_ne_bytes).collect()
    }

    fn send_all(splicer: &mut Splicer, socket: &TcpStream, head: &mut [u8], ram: &GuestRam, runs: &[Run]) {
        let mut message = Message::new();
        message.fill(head, ram, runs);
        let body = message.remaining() - head.len();
        // SAFETY: head and memory are there until it is done.
        while unsafe { splicer.send(socket, &mut message, body) }.unwrap() == Progress::NoRoom {
            poll(&mut [PollFd::new(socket, PollFlags::OUT)], None).unwrap();
        }
    }

    #[test]
    fn all_of_it_arrives_in_order_where_there_is_little_room() {
        let ((near, mut far), ram) = (connection(), ram());
        rustix::net::sockopt::set_socket_send_buffer_size(&near, 256 << 10).unwrap();
        let runs =
            [3..4, 9..2000, 2001..2002, 2500..PAGES].map(|pages| Run { pages, content: Content::Data });
        let mut expected = HEAD.to_vec();
        runs.iter().for_each(|run| expected.extend(words(run.pages.clone())));
        let received = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut received = Vec::new();
                far.read_to_end(&mut received).map(|_| received).unwrap()
            });
            let mut splicer = Splicer::new().unwrap();
            for _ in 0..2 {
                let mut head = HEAD;
                send_all(&mut splicer, &near, &mut head, &ram, &runs);
            }
            rustix::net::shutdown(&near, rustix::net::Shutdown::Write).unwrap();
            reader.join().unwrap()
        });
        assert!(received == [&expected[..], &expected[..]].concat());
    }

    #[test]
    fn heads_are_copied_and_pages_are_not() {
        let ((near, mut far), ram) = (connection(), ram());
        let (mut splicer, mut head) = (Splicer::new().unwrap(), HEAD);
        let runs = [Run { pages: 8..10, content: Content::Data }];
        send_all(&mut splicer, &near, &mut head, &ram, &runs);
        head.fill(0);
        // What the guest writes on the way arrives, or not: here it does.
        let page = ram.slices(9..10).next().unwrap();
        // SAFETY: within the slice, which only the kernel reads.
        unsafe { page.ptr.write_bytes(0xee, page.len) };
        let mut received = vec![0; HEAD.len() + 2 * PAGE_SIZE as usize];
        far.read_exact(&mut received).unwrap();
        let expected = [&HEAD[..], &words(8..9), &[0xee; PAGE_SIZE as usize]].concat();
        assert!(received == expected);
    }

    #[test]
    fn the_socket_waits_as_before_and_its_end_is_an_error() {
        let ((near, far), ram) = (connection(), ram());
        let (mut splicer, mut head) = (Splicer::new().unwrap(), HEAD);
        let runs = [Run { pages: 0..PAGES, content: Content::Data }];
        let mut message = Message::new();
        message.fill(&mut head, &ram, &runs);
        let body = message.remaining() - HEAD.len();
        // SAFETY: head and memory outlive the message.
        let mut send = || unsafe { splicer.send(&near, &mut message, body) };
        assert_eq!(send().unwrap(), Progress::NoRoom);
        let flags = rustix::fs::fcntl_getfl(&near).unwrap();
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
        drop(far);
        let error = loop {
            match send() {
                Ok(Progress::NoRoom) => std::thread::sleep(std::time::Duration::from_millis(1)),
                Ok(other) => panic!("{other:?}, with nobody at the other end"),
                Err(error) => break error,
            }
        };
        assert!(
            matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset),
            "{error}"
        );
    }
}
