//! The first bytes of every connection between daemons, on control connections and lanes alike. They say which host
//! calls, for which purpose, and which versions of the protocol it speaks.

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::attach::MigrationId;
use super::error::WireError;
use super::reader::{MAX_TEXT_BYTES, Reader, count, put, put_text};
use super::text::{Label, RawLabel};

/// The oldest and the newest version of the protocol between daemons that this build speaks.
///
/// Since version 2, digests name their pieces, pieces of zeros have none, and [`frame`](super::frame)s may be
/// compressed. Since version 3, the calling daemon names the addresses that its lanes come from, and a source that does
/// not know whether it committed asks the destination to withdraw. Since version 4, a connection that is lost before the
/// handover begins is [resumed](crate::resumption), and a destination whose VMM does not answer says that it is
/// [`Recovering`](crate::handover::Message::Recovering), and an offer says what a guest's QEMU is made of. Since version 5,
/// the state of the VMM may have a [lane of its own](Purpose::State).
pub const VERSIONS: (u16, u16) = (3, 5);
/// Since this version, control connections are [resumed](crate::resumption).
pub const RESUMES: u16 = 4;
/// Since this version, a source understands [`Recovering`](crate::handover::Message::Recovering).
pub const RECOVERS: u16 = 4;
/// Since this version, an offer says what a guest's QEMU is made of ([`QemuGuest::parts`](super::control::QemuGuest::parts)).
pub const NAMES_PARTS: u16 = 4;
/// Since this version, the state of the VMM may have a [lane of its own](Purpose::State).
pub const STATE_LANE: u16 = 5;
/// The length of a [`Hello`] in bytes.
pub const HELLO_BYTES: usize = size_of::<RawHello>();
/// The length of an [`Answer`] before its text, in bytes.
pub const ANSWER_BYTES: usize = size_of::<RawAnswer>();

const MAGIC: [u8; 4] = *b"MLN\0";

/// The first message of the calling daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The oldest version that the caller speaks.
    pub oldest: u16,
    /// The newest version that the caller speaks.
    pub newest: u16,
    /// The calling host.
    pub host: Label,
    /// The purpose of the connection.
    pub purpose: Purpose,
}

/// The purpose of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The connection carries orders, as [`control`](super::control) messages.
    Control,
    /// The connection carries pages of one migration, as [`frame`](super::frame)s.
    Lane {
        /// The token that the destination gave for this migration, so that bytes of others are not taken for pages.
        token: Token,
        /// The number of the lane.
        lane: u16,
    },
    /// The connection carries pages that a guest in post-copy waits for:
    /// [`PageRequest`](super::frame::PageRequest)s to the source and frames back. Nothing else travels there.
    Faults {
        /// The token that the destination gave for fetching.
        token: Token,
    },
    /// The connection carries the state of the VMM of one migration, as it is, without its end: the last piece comes as
    /// [`Control::State`](super::control::Control::State), and says how long the state is. Nothing travels back.
    State {
        /// The token that the destination gave for this migration.
        token: Token,
        /// The number of the lane: a later one takes the place of those before.
        lane: u16,
    },
    /// The connection shows that the port can be reached; it is answered and closed.
    Probe,
}

/// A token proves that a lane belongs to a migration.
pub type Token = MigrationId;

/// The called daemon's answer to a [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The connection goes on with this version.
    Welcome {
        /// The newest version that both speak.
        version: u16,
    },
    /// The connection ends.
    Refused {
        /// The reason, for the operator of the calling host.
        reason: String,
    },
}

/// Returns whether a connection whose first bytes are these begins with a [`Hello`]. One byte is enough to tell it from
/// the first message of TLS.
pub fn is_hello(first: &[u8]) -> bool {
    let count = first.len().min(MAGIC.len());
    count > 0 && first[..count] == MAGIC[..count]
}

/// Returns the newest version that both sides speak, if there is one. Each side is its oldest and newest version.
pub fn common_version(ours: (u16, u16), theirs: (u16, u16)) -> Option<u16> {
    let newest = ours.1.min(theirs.1);
    (newest >= ours.0.max(theirs.0)).then_some(newest)
}

impl Hello {
    /// Returns the [`HELLO_BYTES`] bytes of the hello.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HELLO_BYTES);
        let (purpose, token, lane) = match self.purpose {
            Purpose::Control => (CONTROL, [0; 16], 0),
            Purpose::Lane { token, lane } => (LANE, token, lane),
            Purpose::Faults { token } => (FAULTS, token, 0),
            Purpose::State { token, lane } => (STATE, token, lane),
            Purpose::Probe => (PROBE, [0; 16], 0),
        };
        put(
            &mut out,
            &RawHello {
                magic: MAGIC,
                oldest: self.oldest.into(),
                newest: self.newest.into(),
                purpose: purpose.into(),
                lane: lane.into(),
                token,
                host: self.host.raw(),
            },
        );
        out
    }

    /// Reads a hello. The layout of this message is the same in all versions.
    ///
    /// # Errors
    ///
    /// Returns an error if the bytes are not exactly one valid hello.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let raw: &RawHello = reader.take("hello")?;
        reader.end()?;
        check_magic(raw.magic)?;
        let purpose = match raw.purpose.get() {
            CONTROL => Purpose::Control,
            LANE => Purpose::Lane { token: raw.token, lane: raw.lane.get() },
            FAULTS => Purpose::Faults { token: raw.token },
            STATE => Purpose::State { token: raw.token, lane: raw.lane.get() },
            PROBE => Purpose::Probe,
            other => return Err(WireError::Unknown { what: "purpose of a connection", found: other.into() }),
        };
        let (oldest, newest) = (raw.oldest.get(), raw.newest.get());
        if oldest > newest {
            return Err(WireError::Value { what: "the oldest version in a hello", found: oldest.into() });
        }
        Ok(Self { oldest, newest, host: raw.host.label()?, purpose })
    }
}

impl Answer {
    /// Returns the bytes of the answer: [`ANSWER_BYTES`] and the text of a refusal.
    pub fn encode(&self) -> Vec<u8> {
        let mut text = Vec::new();
        let version = match self {
            Self::Welcome { version } => *version,
            Self::Refused { reason } => {
                put_text(&mut text, reason);
                0
            }
        };
        let mut out = Vec::with_capacity(ANSWER_BYTES + text.len());
        let text_bytes = U32::new(count(text.len(), u32::MAX));
        put(&mut out, &RawAnswer { magic: MAGIC, version: version.into(), reserved: 0.into(), text_bytes });
        out.extend_from_slice(&text);
        out
    }

    /// Returns how many bytes of text follow the first [`ANSWER_BYTES`], which are `head`.
    ///
    /// # Errors
    ///
    /// Returns an error if `head` is not the head of an answer, or announces more than [`MAX_TEXT_BYTES`].
    pub fn text_bytes(head: &[u8]) -> Result<usize, WireError> {
        let raw: &RawAnswer = Reader::new(head).take("answer to a hello")?;
        check_magic(raw.magic)?;
        let found = raw.text_bytes.get().into();
        if found > MAX_TEXT_BYTES as u64 {
            let what = "length of a refusal";
            return Err(WireError::TooLarge { what, found, limit: MAX_TEXT_BYTES as u64 });
        }
        Ok(found as usize)
    }

    /// Reads an answer with its text.
    ///
    /// # Errors
    ///
    /// Returns an error if the bytes are not exactly one valid answer.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let text_bytes = Self::text_bytes(bytes)?;
        let mut reader = Reader::new(bytes);
        let raw: &RawAnswer = reader.take("answer to a hello")?;
        let reason =
            Reader::new(reader.bytes("refusal", text_bytes as u64, MAX_TEXT_BYTES)?).text("refusal")?;
        reader.end()?;
        match raw.version.get() {
            0 => Ok(Self::Refused { reason }),
            version => Ok(Self::Welcome { version }),
        }
    }
}

const CONTROL: u16 = 1;
const LANE: u16 = 2;
const PROBE: u16 = 3;
const FAULTS: u16 = 4;
const STATE: u16 = 5;

fn check_magic(found: [u8; 4]) -> Result<(), WireError> {
    match found {
        MAGIC => Ok(()),
        _ => Err(WireError::Magic { what: "hello", expected: MAGIC, found }),
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHello {
    magic: [u8; 4],
    oldest: U16,
    newest: U16,
    purpose: U16,
    lane: U16,
    token: Token,
    host: RawLabel,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAnswer {
    magic: [u8; 4],
    version: U16,
    reserved: U16,
    text_bytes: U32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_taken() {
        assert_eq!(common_version((1, 3), (2, 5)), Some(3));
        assert_eq!(common_version((2, 5), (1, 3)), Some(3));
        assert_eq!(common_version((1, 1), (1, 1)), Some(1));
        assert_eq!(common_version((1, 2), (3, 4)), None);
    }
}
