//! One order between two daemons: messages on the control connection, after the
//! [`hello`](super::hello).
//!
//! Each message is a [header](HEADER_BYTES) with its kind and length, and a body. The source
//! offers a guest, the destination accepts or says why not, and so on; who owns the guest is
//! settled by the [`handover`](crate::handover) words that [`Control::Handover`] carries.

mod fetch;
mod offer;
mod qemu;

use std::net::IpAddr;
use std::ops::Range;

use zerocopy::byteorder::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::attach::{MAX_STATE_BYTES, MigrationId};
use super::{Reader, WireError, put, put_text};
use crate::handover::Message;

pub use fetch::{FetchReport, MAX_WORDS, Missing};
pub use offer::{Accept, MAX_PORTS, MAX_REFUSALS, Offer, Port, Refusal, Respect};
pub use qemu::{MAX_DEFINITION_BYTES, MAX_DISKS, MAX_NAME_BYTES, QemuGuest};

/// Bytes of a message's header.
pub const HEADER_BYTES: usize = size_of::<RawHeader>();
/// Bytes of the longest body.
pub const MAX_BODY_BYTES: usize = 1 << 20;
/// Ranges in one [`Control::Holes`].
pub const MAX_RANGES: usize = 32 << 10;
/// Digests in one [`Control::Digests`].
pub const MAX_DIGESTS: usize = 32 << 10;
/// Bytes of state in one [`Control::State`].
pub const MAX_STATE_CHUNK_BYTES: usize = 512 << 10;
/// Bytes of memory under one digest.
pub const DIGEST_CHUNK_BYTES: u64 = 2 << 20;

/// What one daemon says to the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// Whoever connects, before anything else: its lanes will come from these addresses, and from no
    /// others. There are at most [`MAX_PORTS`] of them.
    LanesFrom(Vec<IpAddr>),
    /// Source: here is a guest.
    Offer(Offer),
    /// Destination: it can come; resources are held.
    Accept(Accept),
    /// Destination: it cannot come, for all these reasons.
    Refuse(Vec<Refusal>),
    /// Either: are you there? To be answered at once; also measures the round trip.
    Ping(u64),
    /// The answer, with the same number.
    Pong(u64),
    /// Source: these pages are zero, and hold no memory.
    Holes(Vec<Range<u64>>),
    /// Destination: all holes received so far are zero here as well.
    HolesDone,
    /// Source: this lane is lost here. What it may still hold must not be written any more.
    LaneLost(u16),
    /// Destination: the lane of this number is closed, and nothing of it is written any more.
    LaneClosed(u16),
    /// Source: a round begins, with this many pages to send.
    Round {
        /// Its number, from 1.
        round: u32,
        /// Pages to send.
        pages: u64,
    },
    /// Source: the guest stands still and all pages are acknowledged; digest all RAM.
    Verify,
    /// Destination: digests of pieces of [`DIGEST_CHUNK_BYTES`]. Those that none names are all zero.
    Digests {
        /// Number of each piece, and its XXH3-128; in order over all messages.
        digests: Vec<(u64, u128)>,
        /// Whether all of them have been told with this one.
        last: bool,
    },
    /// Source: the VMM's state, all of it or the next piece.
    State {
        /// Bytes of the whole.
        total: u64,
        /// Where this piece begins.
        offset: u64,
        /// The piece; it travels with its CRC32C.
        bytes: Vec<u8>,
    },
    /// Source, first on a connection of its own: the memory of this migration's guest can be
    /// fetched from here. Answered by an [`Accept`] for the lanes, and by the pages that are missing
    /// as soon as these are known for good.
    Fetch(MigrationId),
    /// Pages that are missing at the destination. From the source: they are to be dropped there.
    /// From the destination, over a connection that was opened for fetching: send them.
    Missing(Missing),
    /// Destination: all pages that were named up to the last [`Missing`] are dropped.
    MissingDone,
    /// Destination: how far fetching is.
    Fetched(FetchReport),
    /// Either: a word of the handover.
    Handover {
        /// Which migration; the connection may be a new one.
        migration: MigrationId,
        /// The word.
        message: Message,
        /// Time that the word's work took, in nanoseconds (loading, resuming), or 0.
        nanoseconds: u64,
        /// Why, where the word is bad news.
        reason: String,
    },
}

/// Reads a header, [`HEADER_BYTES`] long: kind, and length of the body.
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
    /// Header and body.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER_BYTES];
        let kind = self.encode_body(&mut out);
        let bytes = U32::new((out.len() - HEADER_BYTES) as u32);
        let header = RawHeader { kind: kind.into(), reserved: 0.into(), bytes };
        out[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        out
    }

    fn encode_body(&self, out: &mut Vec<u8>) -> u16 {
        match self {
            Self::LanesFrom(addresses) => {
                put(out, &U16::new(addresses.len() as u16));
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
                put(out, &U32::new(ranges.len() as u32));
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
            Self::Round { round, pages } => {
                put(out, &RawRound { round: (*round).into(), pages: (*pages).into() });
                kind::ROUND
            }
            Self::Verify => kind::VERIFY,
            Self::Digests { digests, last } => {
                put(out, &[U32::new(digests.len() as u32), U32::from(u32::from(*last))]);
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
                        bytes: (bytes.len() as u32).into(),
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
            kind::ROUND => {
                let raw: &RawRound = reader.take("round")?;
                Self::Round { round: raw.round.get(), pages: raw.pages.get() }
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

    /// The message's name, for logs and errors.
    pub fn name(&self) -> &'static str {
        match self {
            Self::LanesFrom(_) => "lanes from",
            Self::Offer(_) => "offer",
            Self::Accept(_) => "accept",
            Self::Refuse(_) => "refuse",
            Self::Ping(_) => "ping",
            Self::Pong(_) => "pong",
            Self::Holes(_) => "holes",
            Self::HolesDone => "holes done",
            Self::LaneLost(_) => "lane lost",
            Self::LaneClosed(_) => "lane closed",
            Self::Round { .. } => "round",
            Self::Verify => "verify",
            Self::Digests { .. } => "digests",
            Self::State { .. } => "state",
            Self::Fetch(_) => "fetch",
            Self::Missing(_) => "missing",
            Self::MissingDone => "missing done",
            Self::Fetched(_) => "fetched",
            Self::Handover { .. } => "handover",
        }
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
    pub const OFFER: u16 = 1;
    pub const ACCEPT: u16 = 2;
    pub const REFUSE: u16 = 3;
    pub const PING: u16 = 4;
    pub const PONG: u16 = 5;
    pub const HOLES: u16 = 6;
    pub const HOLES_DONE: u16 = 7;
    pub const ROUND: u16 = 8;
    pub const VERIFY: u16 = 9;
    pub const DIGESTS: u16 = 10;
    pub const STATE: u16 = 11;
    pub const HANDOVER: u16 = 12;
    pub const LANE_LOST: u16 = 13;
    pub const LANE_CLOSED: u16 = 14;
    pub const FETCH: u16 = 15;
    pub const MISSING: u16 = 16;
    pub const MISSING_DONE: u16 = 17;
    pub const FETCHED: u16 = 18;
    pub const LANES_FROM: u16 = 19;
    pub const ALL: std::ops::RangeInclusive<u16> = OFFER..=LANES_FROM;
}

/// Words of the handover by their number on the wire. Offer, Accept and Refuse are not among
/// them: they carry more than a word and are messages of their own.
const WORDS: [(u8, Message); 11] = [
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
struct RawRound {
    round: U32,
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
