//! A message to send or receive in one system call: a head, then pieces of guest memory (sendmsg(2), recvmsg(2)).

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use memlane_kvm::ram::GuestRam;
use memlane_protocol::wire::frame::{Content, Run};

/// A `msghdr` and the pieces that it points to. It lives in a box, because the kernel keeps its address.
pub(crate) struct Message {
    header: libc::msghdr,
    pieces: Vec<libc::iovec>,
    /// The pieces before this one are sent or received.
    next: usize,
    remaining: usize,
}

// SAFETY: the pointers lead to guest memory and to a buffer owned beside the message, both of
// which outlive it and are used by one lane thread at a time.
unsafe impl Send for Message {}

impl Message {
    pub(crate) fn new() -> Box<Self> {
        // SAFETY: a msghdr of zeros is an empty message.
        let header = unsafe { std::mem::zeroed() };
        Box::new(Self { header, pieces: Vec::new(), next: 0, remaining: 0 })
    }

    /// Points the message at `head` and then at `body`.
    pub(crate) fn fill_plain(&mut self, head: &mut [u8], body: &mut [u8]) {
        self.clear();
        self.add(head);
        self.add(body);
    }

    /// Points the message at `head` and then at the memory of all runs with data.
    pub(crate) fn fill(&mut self, head: &mut [u8], ram: &GuestRam, runs: &[Run]) {
        self.clear();
        self.add(head);
        for run in runs.iter().filter(|run| run.content == Content::Data) {
            self.add_pages(ram, run.pages.clone());
        }
    }

    /// Empties the message.
    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
        (self.next, self.remaining) = (0, 0);
        self.point();
    }

    /// Adds a buffer to the end. It must stay where it is while the message is used.
    pub(crate) fn add(&mut self, buffer: &mut [u8]) {
        if !buffer.is_empty() {
            self.add_piece(libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() });
        }
    }

    /// Adds guest memory to the end.
    pub(crate) fn add_pages(&mut self, ram: &GuestRam, pages: Range<u64>) {
        for slice in ram.slices(pages) {
            self.add_piece(libc::iovec { iov_base: slice.ptr.cast(), iov_len: slice.len });
        }
    }

    fn add_piece(&mut self, piece: libc::iovec) {
        self.remaining += piece.iov_len;
        match self.pieces.last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == piece.iov_base => {
                last.iov_len += piece.iov_len;
            }
            _ => self.pieces.push(piece),
        }
        self.point();
    }

    /// Steps over `count` bytes that the kernel has taken or filled.
    pub(crate) fn advance(&mut self, count: usize) {
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

    /// Copies the next bytes of the message to `place`, and steps over them. There must be as many.
    pub(crate) fn copy_to(&mut self, place: &mut [u8]) {
        let mut rest = place;
        while let Some((to, count)) = self.next_piece(rest.len()) {
            let (now, later) = rest.split_at_mut(count);
            // SAFETY: the piece is there to be read, as those who fill a message ensure. A guest or a device may write
            // there meanwhile: the bytes are copied once, as they are, and not looked at.
            unsafe { ptr::copy_nonoverlapping(to, now.as_mut_ptr(), count) };
            rest = later;
            self.advance(count);
        }
    }

    /// Copies as many of `bytes` to the message as it has room for, steps over them, and returns how many they were.
    pub(crate) fn copy_from(&mut self, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        while let Some((to, count)) = self.next_piece(rest.len()) {
            let (now, later) = rest.split_at(count);
            // SAFETY: the piece is there to be written, as those who fill a message to receive ensure.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), to, count) };
            rest = later;
            self.advance(count);
        }
        bytes.len() - rest.len()
    }

    /// Returns where the next piece is, and how many of `most` bytes fit into it.
    fn next_piece(&self, most: usize) -> Option<(*mut u8, usize)> {
        let piece = self.rest().first()?;
        Some((piece.iov_base.cast(), piece.iov_len.min(most))).filter(|(_, count)| *count > 0)
    }

    /// Sends all of the message, and waits whenever the socket has no room.
    ///
    /// # Errors
    ///
    /// Fails as sendmsg(2) does.
    pub(crate) fn send_all(&mut self, socket: impl AsFd) -> io::Result<()> {
        while self.remaining > 0 {
            let fd = socket.as_fd().as_raw_fd();
            // SAFETY: the header leads to the head and to guest memory, which the caller, who
            // filled the message, keeps as they are meanwhile.
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

    /// Returns how many bytes are not yet sent or received.
    pub(crate) fn remaining(&self) -> usize {
        self.remaining
    }

    /// Returns the pieces that are not yet sent or received.
    pub(crate) fn rest(&self) -> &[libc::iovec] {
        &self.pieces[self.next..]
    }

    /// Returns the header for the kernel.
    pub(crate) fn as_ptr(&self) -> *const libc::msghdr {
        &raw const self.header
    }

    /// Returns the header for the kernel, which writes to it.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut libc::msghdr {
        &raw mut self.header
    }

    fn point(&mut self) {
        let rest = &mut self.pieces[self.next..];
        self.header.msg_iov = if rest.is_empty() { ptr::null_mut() } else { rest.as_mut_ptr() };
        self.header.msg_iovlen = rest.len();
    }
}
