//! A gathered or scattered message: a head of our own, then pieces of guest memory.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use memlane_kvm::ram::GuestRam;
use memlane_protocol::wire::frame::{Content, Run};

/// A `msghdr` and what it points to. Lives in a box, since the kernel keeps its address.
pub struct Message {
    header: libc::msghdr,
    pieces: Vec<libc::iovec>,
    /// Pieces before this one are done with.
    next: usize,
    remaining: usize,
}

// SAFETY: the pointers lead to guest memory and to a buffer owned beside the message, both of
// which outlive it and are used by one lane thread at a time.
unsafe impl Send for Message {}

impl Message {
    pub fn new() -> Box<Self> {
        // SAFETY: a msghdr of zeros is an empty message.
        let header = unsafe { std::mem::zeroed() };
        Box::new(Self { header, pieces: Vec::new(), next: 0, remaining: 0 })
    }

    /// Points the message at `head` and then at `body`.
    pub fn fill_plain(&mut self, head: &mut [u8], body: &mut [u8]) {
        self.pieces.clear();
        self.pieces.extend([head, body].into_iter().filter(|bytes| !bytes.is_empty()).map(piece));
        self.begin();
    }

    /// Points the message at `head` and then at the memory of all runs with data.
    pub fn fill(&mut self, head: &mut [u8], ram: &GuestRam, runs: &[Run]) {
        self.pieces.clear();
        if !head.is_empty() {
            self.pieces.push(piece(head));
        }
        for run in runs.iter().filter(|run| run.content == Content::Data) {
            for slice in ram.slices(run.pages.clone()) {
                let piece = libc::iovec { iov_base: slice.ptr.cast(), iov_len: slice.len };
                match self.pieces.last_mut() {
                    Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == piece.iov_base => {
                        last.iov_len += piece.iov_len;
                    }
                    _ => self.pieces.push(piece),
                }
            }
        }
        self.begin();
    }

    /// Steps over `count` bytes that the kernel has taken or filled.
    pub fn advance(&mut self, count: usize) {
        self.remaining -= count.min(self.remaining);
        let mut left = count;
        while let Some(piece) = self.pieces.get_mut(self.next) {
            if left < piece.iov_len {
                piece.iov_base = piece.iov_base.wrapping_byte_add(left);
                piece.iov_len -= left;
                break;
            }
            left -= piece.iov_len;
            self.next += 1;
        }
        self.point();
    }

    /// Sends all of it, waiting for room.
    pub fn send_all(&mut self, socket: impl AsFd) -> io::Result<()> {
        while self.remaining > 0 {
            let fd = socket.as_fd().as_raw_fd();
            // SAFETY: the header leads to the head and to guest memory, which whoever filled it
            // keeps as they are meanwhile.
            let sent = unsafe { libc::sendmsg(fd, self.as_ptr(), libc::MSG_NOSIGNAL) };
            match usize::try_from(sent) {
                Ok(count) => self.advance(count),
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// Bytes still to go.
    pub fn remaining(&self) -> usize {
        self.remaining
    }

    /// For the kernel.
    pub fn as_ptr(&self) -> *const libc::msghdr {
        &raw const self.header
    }

    /// For the kernel, which writes to it.
    pub fn as_mut_ptr(&mut self) -> *mut libc::msghdr {
        &raw mut self.header
    }

    fn begin(&mut self) {
        self.next = 0;
        self.remaining = self.pieces.iter().map(|piece| piece.iov_len).sum();
        self.point();
    }

    fn point(&mut self) {
        let rest = &mut self.pieces[self.next..];
        self.header.msg_iov = if rest.is_empty() { ptr::null_mut() } else { rest.as_mut_ptr() };
        self.header.msg_iovlen = rest.len();
    }
}

fn piece(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}
