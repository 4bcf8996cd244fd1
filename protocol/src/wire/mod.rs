//! Every byte that crosses a socket.
//!
//! - [`hello`] opens each connection between daemons and settles the version.
//! - [`control`] carries an order between two daemons.
//! - [`frame`] carries pages on a lane.
//! - [`attach`] is spoken between the daemon and a VMM on the same host.
//! - [`machine`] describes a guest, and what a host can run.
//!
//! Integers are little-endian. Decoders take any bytes and answer with a value or a
//! [`WireError`]; nothing that a peer wrote is used before it is checked.

pub mod attach;
pub mod control;
pub mod frame;
pub mod hello;
pub mod machine;
mod plain;
mod text;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use plain::{is_obeyed, plain, plain_lines};
pub use text::{BadLabel, Label};

/// Why bytes from a peer or a VMM were not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes end before the message does.
    #[error("the message ends after {found} bytes, {what} needs {needed}")]
    Short {
        /// What was being read.
        what: &'static str,
        /// Bytes that it takes.
        needed: usize,
        /// Bytes that were left.
        found: usize,
    },
    /// More bytes than the message has.
    #[error("{0} bytes too many at the end of the message")]
    Trailing(usize),
    /// The other side does not speak this protocol at all.
    #[error("wrong magic {found:02x?} where {expected:02x?} begins the {what}")]
    Magic {
        /// What was being read.
        what: &'static str,
        /// The bytes that begin it.
        expected: [u8; 4],
        /// The bytes found.
        found: [u8; 4],
    },
    /// A kind of message, request or frame that this version does not have.
    #[error("unknown {what} {found}")]
    Unknown {
        /// What was being read.
        what: &'static str,
        /// The number found.
        found: u32,
    },
    /// A length or a count beyond the limit.
    #[error("{what} is {found}, at most {limit} is allowed")]
    TooLarge {
        /// What was being read.
        what: &'static str,
        /// The number found.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// A field whose value cannot be.
    #[error("{what} cannot be {found}")]
    Value {
        /// The field.
        what: &'static str,
        /// The number found.
        found: u64,
    },
    /// A name that is no label.
    #[error(transparent)]
    Label(#[from] BadLabel),
    /// Text that is not UTF-8.
    #[error("{0} is not UTF-8")]
    Text(&'static str),
    /// A checksum that does not fit the bytes.
    #[error("checksum of the {what} is {found:#010x}, its bytes give {computed:#010x}")]
    Checksum {
        /// What was being read.
        what: &'static str,
        /// The checksum carried.
        found: u32,
        /// The checksum of what arrived.
        computed: u32,
    },
}

/// Bytes of text that a message may carry; more is cut when writing and refused when reading.
pub const MAX_TEXT_BYTES: usize = 1024;

/// Reads a message front to back.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn take<T>(&mut self, what: &'static str) -> Result<&'a T, WireError>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        let short = WireError::Short { what, needed: size_of::<T>(), found: self.rest.len() };
        let (value, rest) = T::ref_from_prefix(self.rest).map_err(|_| short)?;
        self.rest = rest;
        Ok(value)
    }

    /// A list of `count` values; `limit` bounds the count before anything is read.
    pub(crate) fn list<T>(
        &mut self,
        what: &'static str,
        count: u64,
        limit: usize,
    ) -> Result<&'a [T], WireError>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        if count > limit as u64 {
            return Err(WireError::TooLarge { what, found: count, limit: limit as u64 });
        }
        let needed = count as usize * size_of::<T>();
        let short = WireError::Short { what, needed, found: self.rest.len() };
        let (values, rest) =
            <[T]>::ref_from_prefix_with_elems(self.rest, count as usize).map_err(|_| short)?;
        self.rest = rest;
        Ok(values)
    }

    pub(crate) fn bytes(
        &mut self,
        what: &'static str,
        count: u64,
        limit: usize,
    ) -> Result<&'a [u8], WireError> {
        self.list::<u8>(what, count, limit)
    }

    /// Text to the end of the message, made [`plain`].
    pub(crate) fn text(&mut self, what: &'static str) -> Result<String, WireError> {
        let bytes = self.bytes(what, self.rest.len() as u64, MAX_TEXT_BYTES)?;
        let text = std::str::from_utf8(bytes).map_err(|_| WireError::Text(what))?;
        Ok(plain(text).into_owned())
    }

    /// The message must end here.
    pub(crate) fn end(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            more => Err(WireError::Trailing(more)),
        }
    }
}

pub(crate) fn put<T: IntoBytes + Immutable + ?Sized>(out: &mut Vec<u8>, value: &T) {
    out.extend_from_slice(value.as_bytes());
}

/// Appends `text`, cut at a character boundary to what a reader accepts.
pub(crate) fn put_text(out: &mut Vec<u8>, text: &str) {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    out.extend_from_slice(&text.as_bytes()[..end]);
}

#[cfg(test)]
mod tests;
