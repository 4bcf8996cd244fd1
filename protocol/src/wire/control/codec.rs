//! Control messages, byte by byte.

use zerocopy::byteorder::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::fetch::{FetchReport, Missing};
use super::message::{Control, MAX_BODY_BYTES, MAX_DIGESTS, MAX_RANGES, MAX_STATE_CHUNK_BYTES};
use super::offer::{self, Accept, MAX_PORTS, Offer};
use crate::handover::Message;
use crate::wire::attach::{MAX_STATE_BYTES, MigrationId};
use crate::wire::error::WireError;
use crate::wire::reader::{Reader, count, put, put_text};

/// The length of a message's header in bytes.
pub const HEADER_BYTES: usize = size_of::<RawHeader>();

/// Reads a header of [`HEADER_BYTES`]. Returns the kind of the message, and the length of its body in bytes.
///
/// # Errors
///
/// Returns an error if the kind is not known or the body is longer than [`MAX_BODY_BYTES`].
pub fn decode_header(bytes: &[u8]) -> Result<(u16, usize), WireError> {
    let mut reader = Reader::new(bytes);
    let raw: &RawHeader = reader.take("header of a control message")?;
    reader.end()?;
    let (kind, found) = (raw.kind.get(), u64::from(raw.bytes.get()));
    if !kind::ALL.contains(&kind) {
        return Err(WireError::Unknown { what: "control message", found: kind.into() });
    }
    if found > MAX_BODY_BYTES as u64 {
        let what = "length of a control message";
        return Err(WireError::TooLarge { what, found, limit: MAX_BODY_BYTES as u64 });
    }
    Ok((kind, found as usize))
}

impl Control {
    /// Returns the bytes of header and body.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER_BYTES];
        let kind = self.encode_body(&mut out);
        let bytes = U32::new(count(out.len() - HEADER_BYTES, u32::MAX));
        let header = RawHeader { kind: kind.into(), reserved: 0.into(), bytes };
        out[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        out
    }

    fn encode_body(&self, out: &mut Vec<u8>) -> u16 {
        match self {
            Self::LanesFrom(addresses) => {
                put(out, &U16::new(count(addresses.len(), u16::MAX)));
                addresses.iter().for_each(|address| put(out, &offer::octets(*address)));
                kind::LANES_FROM
            }
            Self::Offer(offer) => {
                offer.encode(out);
                kind::OFFER
            }
            Self::Accept(accept) => {
                accept.encode(out);
                kind::ACCEPT
            }
            Self::Refuse(refusals) => {
                offer::encode_refusals(refusals, out);
                kind::REFUSE
            }
            Self::Ping(number) => {
                put(out, &U64::new(*number));
                kind::PING
            }
            Self::Pong(number) => {
                put(out, &U64::new(*number));
                kind::PONG
            }
            Self::Holes(ranges) => {
                put(out, &U32::new(count(ranges.len(), u32::MAX)));
                for range in ranges {
                    put(out, &[U64::new(range.start), U64::new(range.end)]);
                }
                kind::HOLES
            }
            Self::HolesDone => kind::HOLES_DONE,
            Self::LaneLost(lane) => {
                put(out, &U16::new(*lane));
                kind::LANE_LOST
            }
            Self::LaneClosed(lane) => {
                put(out, &U16::new(*lane));
                kind::LANE_CLOSED
            }
            Self::Iteration { number, pages } => {
                put(out, &RawIteration { number: (*number).into(), pages: (*pages).into() });
                kind::ITERATION
            }
            Self::Verify => kind::VERIFY,
            Self::Digests { digests, last } => {
                put(out, &[U32::new(count(digests.len(), u32::MAX)), U32::from(u32::from(*last))]);
                for (piece, digest) in digests {
                    put(out, &RawDigest { piece: (*piece).into(), digest: (*digest).into() });
                }
                kind::DIGESTS
            }
            Self::State { total, offset, bytes } => {
                put(
                    out,
                    &RawState {
                        total: (*total).into(),
                        offset: (*offset).into(),
                        checksum: crc32c::crc32c(bytes).into(),
                        bytes: count(bytes.len(), u32::MAX).into(),
                    },
                );
                out.extend_from_slice(bytes);
                kind::STATE
            }
            Self::Fetch(migration) => {
                put(out, migration);
                kind::FETCH
            }
            Self::Missing(missing) => {
                missing.encode(out);
                kind::MISSING
            }
            Self::MissingDone => kind::MISSING_DONE,
            Self::Fetched(report) => {
                report.encode(out);
                kind::FETCHED
            }
            Self::Patience { milliseconds } => {
                put(out, &U32::new(*milliseconds));
                kind::PATIENCE
            }
            Self::Received(count) => {
                put(out, &U64::new(*count));
                kind::RECEIVED
            }
            Self::Resume { migration, received } => {
                put(out, migration);
                put(out, &U64::new(*received));
                kind::RESUME
            }
            Self::Resumed(count) => {
                put(out, &U64::new(*count));
                kind::RESUMED
            }
            Self::Handover { migration, message, nanoseconds, reason } => {
                put(
                    out,
                    &RawHandover {
                        migration: *migration,
                        nanoseconds: (*nanoseconds).into(),
                        message: number_of(*message),
                        reserved: [0; 7],
                    },
                );
                put_text(out, reason);
                kind::HANDOVER
            }
        }
    }

    /// Reads a body whose header said `kind`.
    ///
    /// # Errors
    ///
    /// Returns an error if the bytes are not exactly one valid body of this kind.
    pub fn decode(kind: u16, body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let message = match kind {
            kind::LANES_FROM => {
                let count = reader.take::<U16>("count of addresses")?.get();
                let addresses = reader.list::<[u8; 16]>("count of addresses", count.into(), MAX_PORTS)?;
                Self::LanesFrom(addresses.iter().copied().map(offer::address_of).collect())
            }
            kind::OFFER => Self::Offer(Offer::decode(&mut reader)?),
            kind::ACCEPT => Self::Accept(Accept::decode(&mut reader)?),
            kind::REFUSE => Self::Refuse(offer::decode_refusals(&mut reader)?),
            kind::PING => Self::Ping(reader.take::<U64>("ping")?.get()),
            kind::PONG => Self::Pong(reader.take::<U64>("pong")?.get()),
            kind::HOLES => {
                let count = reader.take::<U32>("count of holes")?.get();
                let ranges = reader.list::<[U64; 2]>("count of holes", count.into(), MAX_RANGES)?;
                Self::Holes(ranges.iter().map(|[start, end]| start.get()..end.get()).collect())
            }
            kind::HOLES_DONE => Self::HolesDone,
            kind::LANE_LOST => Self::LaneLost(reader.take::<U16>("number of a lane")?.get()),
            kind::LANE_CLOSED => Self::LaneClosed(reader.take::<U16>("number of a lane")?.get()),
            kind::ITERATION => {
                let raw: &RawIteration = reader.take("iteration")?;
                Self::Iteration { number: raw.number.get(), pages: raw.pages.get() }
            }
            kind::VERIFY => Self::Verify,
            kind::DIGESTS => {
                let [count, last] = reader.take::<[U32; 2]>("digests")?.map(U32::get);
                let digests = reader.list::<RawDigest>("count of digests", count.into(), MAX_DIGESTS)?;
                let digests = digests.iter().map(|raw| (raw.piece.get(), raw.digest.get()));
                let last = match last {
                    0 | 1 => last == 1,
                    _ => {
                        return Err(WireError::Value {
                            what: "whether these digests are the last",
                            found: last.into(),
                        });
                    }
                };
                Self::Digests { digests: digests.collect(), last }
            }
            kind::STATE => decode_state(&mut reader)?,
            kind::FETCH => Self::Fetch(*reader.take("migration to fetch")?),
            kind::MISSING => Self::Missing(Missing::decode(&mut reader)?),
            kind::MISSING_DONE => Self::MissingDone,
            kind::FETCHED => Self::Fetched(FetchReport::decode(&mut reader)?),
            kind::PATIENCE => Self::Patience { milliseconds: reader.take::<U32>("patience")?.get() },
            kind::RECEIVED => Self::Received(reader.take::<U64>("count of messages")?.get()),
            kind::RESUME => Self::Resume {
                migration: *reader.take("migration to resume")?,
                received: reader.take::<U64>("count of messages")?.get(),
            },
            kind::RESUMED => Self::Resumed(reader.take::<U64>("count of messages")?.get()),
            kind::HANDOVER => {
                let raw: &RawHandover = reader.take("word of the handover")?;
                let unknown = WireError::Unknown { what: "word of the handover", found: raw.message.into() };
                Self::Handover {
                    migration: raw.migration,
                    message: message_of(raw.message).ok_or(unknown)?,
                    nanoseconds: raw.nanoseconds.get(),
                    reason: reader.text("reason")?,
                }
            }
            other => return Err(WireError::Unknown { what: "control message", found: other.into() }),
        };
        reader.end()?;
        Ok(message)
    }
}

fn decode_state(reader: &mut Reader<'_>) -> Result<Control, WireError> {
    let raw: &RawState = reader.take("state")?;
    let (total, offset, count) = (raw.total.get(), raw.offset.get(), u64::from(raw.bytes.get()));
    if total > MAX_STATE_BYTES {
        return Err(WireError::TooLarge { what: "length of a state", found: total, limit: MAX_STATE_BYTES });
    }
    let bytes = reader.bytes("piece of a state", count, MAX_STATE_CHUNK_BYTES)?;
    if offset > total || count > total - offset {
        let found = offset.saturating_add(count);
        return Err(WireError::TooLarge { what: "end of a piece of state", found, limit: total });
    }
    let (found, computed) = (raw.checksum.get(), crc32c::crc32c(bytes));
    if found != computed {
        return Err(WireError::Checksum { what: "state", found, computed });
    }
    Ok(Control::State { total, offset, bytes: bytes.to_vec() })
}

mod kind {
    pub(super) const OFFER: u16 = 1;
    pub(super) const ACCEPT: u16 = 2;
    pub(super) const REFUSE: u16 = 3;
    pub(super) const PING: u16 = 4;
    pub(super) const PONG: u16 = 5;
    pub(super) const HOLES: u16 = 6;
    pub(super) const HOLES_DONE: u16 = 7;
    pub(super) const ITERATION: u16 = 8;
    pub(super) const VERIFY: u16 = 9;
    pub(super) const DIGESTS: u16 = 10;
    pub(super) const STATE: u16 = 11;
    pub(super) const HANDOVER: u16 = 12;
    pub(super) const LANE_LOST: u16 = 13;
    pub(super) const LANE_CLOSED: u16 = 14;
    pub(super) const FETCH: u16 = 15;
    pub(super) const MISSING: u16 = 16;
    pub(super) const MISSING_DONE: u16 = 17;
    pub(super) const FETCHED: u16 = 18;
    pub(super) const LANES_FROM: u16 = 19;
    pub(super) const PATIENCE: u16 = 20;
    pub(super) const RECEIVED: u16 = 21;
    pub(super) const RESUME: u16 = 22;
    pub(super) const RESUMED: u16 = 23;
    pub(super) const ALL: std::ops::RangeInclusive<u16> = OFFER..=RESUMED;
}

/// The messages of the handover and their numbers on the wire. Offer, Accept and Refuse are not among them, because
/// they carry more and are control messages of their own.
const WORDS: [(u8, Message); 12] = [
    (1, Message::Ready),
    (2, Message::Commit),
    (3, Message::Running),
    (4, Message::Declined),
    (5, Message::Done),
    (6, Message::Abort),
    (7, Message::Fetching),
    (8, Message::Lost),
    (9, Message::Gone),
    (10, Message::Withdraw),
    (11, Message::Unknown),
    (12, Message::Recovering),
];

fn number_of(message: Message) -> u8 {
    WORDS.iter().find(|(_, word)| *word == message).map_or(0, |(number, _)| *number)
}

fn message_of(number: u8) -> Option<Message> {
    WORDS.iter().find(|(found, _)| *found == number).map(|(_, word)| *word)
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    kind: U16,
    reserved: U16,
    bytes: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawIteration {
    number: U32,
    pages: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawDigest {
    piece: U64,
    digest: U128,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawState {
    total: U64,
    offset: U64,
    checksum: U32,
    bytes: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHandover {
    migration: MigrationId,
    nanoseconds: U64,
    message: u8,
    reserved: [u8; 7],
}
