//! What has been received: records that are opened where they lie, and the data in them that waits to be taken.

use std::ops::Range;

use rustls::AlertDescription;

use super::key::Key;
use super::{ALERT, APPLICATION_DATA, HANDSHAKE, HEADER_BYTES, MAX_RECORD_BYTES};
use crate::TlsError;

/// No record has more than this behind its header.
const MAX_SEALED_BYTES: usize = MAX_RECORD_BYTES + 256;
const ONE_RECORD: usize = HEADER_BYTES + MAX_SEALED_BYTES;

/// A buffer: data of the record that was opened last, then records that are not yet opened, then room.
pub(super) struct Incoming {
    buffer: Box<[u8]>,
    data: Range<usize>,
    sealed: Range<usize>,
}

/// A record that was opened.
pub(super) enum Opened {
    /// It contained data, perhaps none.
    Data,
    /// It contained part of a message of the handshake protocol.
    Handshake(Vec<u8>),
    /// It ended the connection.
    Alert(TlsError),
}

impl Incoming {
    /// Makes a buffer that holds data and records which have come already.
    pub(super) fn new(data: &[u8], sealed: &[u8]) -> Self {
        let both = data.len() + sealed.len();
        let mut buffer = vec![0; both.max(ONE_RECORD)];
        buffer[..data.len()].copy_from_slice(data);
        buffer[data.len()..both].copy_from_slice(sealed);
        Self { buffer: buffer.into(), data: 0..data.len(), sealed: data.len()..both }
    }

    /// Makes the buffer at least so long.
    pub(super) fn grow(&mut self, bytes: usize) {
        if bytes > self.buffer.len() {
            let mut buffer = vec![0; bytes];
            buffer[..self.buffer.len()].copy_from_slice(&self.buffer);
            self.buffer = buffer.into();
        }
    }

    /// Returns the room behind the records, at least for the rest of the first one. It is empty while there is data.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if !self.data.is_empty() {
            return &mut [];
        }
        if self.sealed.is_empty() {
            self.sealed = 0..0;
        } else if self.buffer.len() - self.sealed.start < ONE_RECORD {
            self.buffer.copy_within(self.sealed.clone(), 0);
            self.sealed = 0..self.sealed.len();
        }
        &mut self.buffer[self.sealed.end..]
    }

    /// Adds bytes behind the records.
    pub(super) fn append(&mut self, bytes: &[u8]) {
        let begin = if self.data.is_empty() { self.sealed.start } else { self.data.start };
        if self.buffer.len() - self.sealed.end < bytes.len() {
            self.buffer.copy_within(begin..self.sealed.end, 0);
            self.data = self.data.start.saturating_sub(begin)..self.data.end.saturating_sub(begin);
            self.sealed = self.sealed.start - begin..self.sealed.end - begin;
            self.grow(self.sealed.end + bytes.len());
        }
        self.buffer[self.sealed.end..][..bytes.len()].copy_from_slice(bytes);
        self.sealed.end += bytes.len();
    }

    /// Notes that so many bytes of the room are filled.
    pub(super) fn received(&mut self, count: usize) {
        self.sealed.end = self.buffer.len().min(self.sealed.end + count);
    }

    /// Returns how many bytes are not opened yet.
    pub(super) fn unopened_bytes(&self) -> usize {
        self.sealed.len()
    }

    /// Returns the data that waits to be taken.
    pub(super) fn data(&self) -> &[u8] {
        &self.buffer[self.data.clone()]
    }

    /// Steps over data that has been taken.
    pub(super) fn consume(&mut self, count: usize) {
        self.data.start = self.data.end.min(self.data.start + count);
    }

    /// Opens the next record, if it has come whole. The data before must have been taken.
    pub(super) fn open(&mut self, key: &mut Key) -> Result<Option<Opened>, TlsError> {
        let sealed = &mut self.buffer[self.sealed.clone()];
        let Some((header, rest)) = sealed.split_first_chunk_mut::<HEADER_BYTES>() else { return Ok(None) };
        let [kind, 3, 3, high, low] = *header else {
            return Err(TlsError::Protocol("something that is no record came"));
        };
        let length = usize::from(u16::from_be_bytes([high, low]));
        if kind != APPLICATION_DATA || length > MAX_SEALED_BYTES {
            return Err(TlsError::Protocol("a record came that is not sealed, or is too long"));
        }
        let Some(body) = rest.get_mut(..length) else { return Ok(None) };
        let (content, count) = key.open(*header, body)?;
        let opened = match (content, &body[..count]) {
            (APPLICATION_DATA, _) => Opened::Data,
            (HANDSHAKE, [_, ..]) => Opened::Handshake(body[..count].to_vec()),
            (ALERT, [_, 0]) => Opened::Alert(TlsError::Closed),
            (ALERT, [_, alert]) => Opened::Alert(TlsError::Alert(AlertDescription::from(*alert))),
            _ => return Err(TlsError::Protocol("the contents of a record are not valid")),
        };
        let begin = self.sealed.start + HEADER_BYTES;
        self.sealed.start = begin + length;
        if matches!(opened, Opened::Data) {
            self.data = begin..begin + count;
        }
        Ok(Some(opened))
    }
}
