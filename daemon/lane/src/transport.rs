//! The transport of a lane: its socket, and what encrypts it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use memlane_tls::{MAX_RECORD_BYTES, Records, sealed_bytes};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::LaneError;
use crate::message::Message;

/// A lane seals this much of a frame at once: it stays in the processor's cache until the kernel has copied it.
const SEALED_AT_ONCE: usize = 16 * MAX_RECORD_BYTES;

/// The socket of a lane, and what seals and opens the bytes that flow there.
pub struct Transport {
    /// The connected socket.
    pub socket: Arc<OwnedFd>,
    /// This is `None` if the lane is not encrypted.
    pub records: Option<Box<Records>>,
}

/// The sealed part of a message that is being sent. It takes memory when the first part is sealed.
#[derive(Default)]
pub(crate) struct Sealed {
    buffer: Vec<u8>,
    begin: usize,
    end: usize,
}

impl Transport {
    /// Makes a transport that is not encrypted.
    pub fn plain(socket: Arc<OwnedFd>) -> Self {
        Self { socket, records: None }
    }

    /// Adds what has come to `into`. Returns `false` if nothing has come within the socket's timeout, or has come yet.
    ///
    /// # Errors
    ///
    /// Fails if the connection is closed or broken.
    pub(crate) fn receive(
        &mut self,
        into: &mut Vec<u8>,
        buffer: &mut [u8],
        flags: RecvFlags,
    ) -> Result<bool, LaneError> {
        if self.open(into)? {
            // It came along with what was read before.
            return Ok(true);
        }
        let Self { socket, records } = self;
        let place = match records {
            Some(records) => records.room(),
            None => &mut *buffer,
        };
        let count = match retry_on_intr(|| recv(&**socket, &mut *place, flags)) {
            Ok((0, _)) => return Err(LaneError::HungUp),
            Ok((count, _)) => count,
            Err(Errno::AGAIN) => return Ok(false),
            Err(error) => return Err(LaneError::io("receive")(error.into())),
        };
        let Some(records) = records else {
            into.extend_from_slice(&buffer[..count]);
            return Ok(true);
        };
        records.received(count);
        self.open(into)?;
        Ok(true)
    }

    /// Adds the data of all records that have come whole to `into`. Returns whether there were any.
    fn open(&mut self, into: &mut Vec<u8>) -> Result<bool, LaneError> {
        let before = into.len();
        if let Some(records) = &mut self.records {
            records.read(usize::MAX, into)?;
        }
        Ok(into.len() > before)
    }

    /// Sends these few bytes, unless the socket has no room for all of them.
    ///
    /// # Errors
    ///
    /// Fails if the connection is broken, or if there is no room.
    pub(crate) fn send_now(&mut self, bytes: &[u8]) -> Result<(), LaneError> {
        let sealed = match &mut self.records {
            Some(records) => &records.sealed(bytes)?[..],
            None => bytes,
        };
        let failed = |error: Errno| LaneError::io("send")(error.into());
        match send(&*self.socket, sealed, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map_err(failed)? {
            count if count == sealed.len() => Ok(()),
            _ => Err(failed(Errno::AGAIN)),
        }
    }

    /// Sends all of a message, and waits whenever the socket has no room. Returns how many bytes were sent.
    ///
    /// # Errors
    ///
    /// Fails if the connection is broken.
    pub(crate) fn send_all(&mut self, message: &mut Message, sealed: &mut Sealed) -> Result<u64, LaneError> {
        let mut bytes = message.remaining() as u64;
        let Some(records) = &mut self.records else {
            return message.send_all(&*self.socket).map(|()| bytes).map_err(LaneError::io("send"));
        };
        while message.remaining() > 0 {
            bytes += sealed.fill(records, message)?;
            while !sealed.is_empty() {
                let sent = retry_on_intr(|| send(&*self.socket, sealed.bytes(), SendFlags::NOSIGNAL));
                sealed.advance(sent.map_err(|error| LaneError::io("send")(error.into()))?);
            }
        }
        Ok(bytes)
    }
}

impl Sealed {
    /// Seals the next part of a message, after the part before has been sent. Returns how many bytes longer it is now.
    ///
    /// # Errors
    ///
    /// Fails if the keys have sealed as much as they may, and no new ones can be made.
    pub(crate) fn fill(&mut self, records: &mut Records, message: &mut Message) -> Result<u64, LaneError> {
        self.buffer.resize(sealed_bytes(SEALED_AT_ONCE), 0);
        let count = message.remaining().min(SEALED_AT_ONCE);
        self.begin = 0;
        self.end = records.seal(count, &mut self.buffer, |place| message.copy_to(place))?;
        Ok((self.end - count) as u64)
    }

    /// Returns what is not sent yet.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer[self.begin..self.end]
    }

    /// Returns whether all is sent.
    pub(crate) fn is_empty(&self) -> bool {
        self.begin == self.end
    }

    /// Steps over bytes that are sent.
    pub(crate) fn advance(&mut self, count: usize) {
        self.begin = self.end.min(self.begin + count);
    }

    /// Returns the operation that sends what is not sent yet.
    pub(crate) fn send(&self, socket: BorrowedFd<'_>) -> squeue::Entry {
        let flags = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
        let bytes = self.bytes();
        let fd = types::Fd(socket.as_fd().as_raw_fd());
        opcode::Send::new(fd, bytes.as_ptr(), bytes.len() as u32).flags(flags).build()
    }
}
