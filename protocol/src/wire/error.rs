//! Why bytes were not understood.

use super::text::BadLabel;

/// Says why bytes from a peer or a VMM were not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes end before the message does.
    #[error("the message ends after {found} bytes, {what} needs {needed}")]
    Short {
        /// The thing that was being read.
        what: &'static str,
        /// The bytes that it takes.
        needed: usize,
        /// The bytes that were left.
        found: usize,
    },
    /// The message is followed by more bytes.
    #[error("{0} bytes too many at the end of the message")]
    Trailing(usize),
    /// The other side does not speak this protocol at all.
    #[error("wrong magic {found:02x?} where {expected:02x?} begins the {what}")]
    Magic {
        /// The thing that was being read.
        what: &'static str,
        /// The bytes that begin it.
        expected: [u8; 4],
        /// The bytes that were found.
        found: [u8; 4],
    },
    /// This version does not know this kind of message, request or frame.
    #[error("unknown {what} {found}")]
    Unknown {
        /// The thing that was being read.
        what: &'static str,
        /// The number that was found.
        found: u32,
    },
    /// A length or a count is above its limit.
    #[error("{what} is {found}, at most {limit} is allowed")]
    TooLarge {
        /// The thing that was being read.
        what: &'static str,
        /// The number that was found.
        found: u64,
        /// The largest number that is allowed.
        limit: u64,
    },
    /// A field has a value that it cannot have.
    #[error("{what} cannot be {found}")]
    Value {
        /// The field.
        what: &'static str,
        /// The number that was found.
        found: u64,
    },
    /// A name is not a [`Label`](super::Label).
    #[error(transparent)]
    Label(#[from] BadLabel),
    /// A text is not UTF-8.
    #[error("{0} is not UTF-8")]
    Text(&'static str),
    /// A checksum does not fit the bytes.
    #[error("checksum of the {what} is {found:#010x}, its bytes give {computed:#010x}")]
    Checksum {
        /// The thing that was being read.
        what: &'static str,
        /// The checksum that the message carries.
        found: u32,
        /// The checksum of what arrived.
        computed: u32,
    },
}
