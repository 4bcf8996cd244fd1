//! Packets between the daemon and a VMM, byte by byte.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::bond::{Bond, MigrationId};
use super::packet::{FromVmm, MAX_STATE_BYTES, Reply, RunState, ToVmm, VmmHello};
use super::request::Request;
use crate::wire::error::WireError;
use crate::wire::machine::GuestShape;
use crate::wire::reader::{Reader, put, put_text};
use crate::wire::text::RawLabel;

impl FromVmm {
    /// Returns the bytes of the packet.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Hello(hello) => {
                put_header(&mut out, kind::HELLO, 0);
                put(
                    &mut out,
                    &RawVmmHello {
                        oldest: hello.oldest.into(),
                        newest: hello.newest.into(),
                        run_state: hello.run_state as u8,
                        bonded: hello.bond.is_some().into(),
                        reserved: [0; 2],
                    },
                );
                if let Some(bond) = &hello.bond {
                    put(&mut out, &RawBond::from(bond));
                }
                hello.shape.encode(&mut out);
            }
            Self::Shim { oldest, newest } => {
                put_header(&mut out, kind::SHIM, 0);
                put(&mut out, &[U16::new(*oldest), U16::new(*newest)]);
            }
            Self::Reply(Reply { id, outcome: Ok(values) }) => {
                put_header(&mut out, kind::DONE, *id);
                put(&mut out, &values.map(U64::new));
            }
            Self::Reply(Reply { id, outcome: Err(reason) }) => {
                put_header(&mut out, kind::FAILED, *id);
                put_text(&mut out, reason);
            }
        }
        out
    }

    /// Reads a packet.
    ///
    /// # Errors
    ///
    /// Returns an error if the bytes are not exactly one valid packet.
    pub fn decode(packet: &[u8]) -> Result<Self, WireError> {
        let (header, mut reader) = header(packet)?;
        let id = header.id.get();
        let message = match header.kind.get() {
            kind::HELLO => {
                let raw: &RawVmmHello = reader.take("hello of a VMM")?;
                Self::Hello(VmmHello {
                    oldest: raw.oldest.get(),
                    newest: raw.newest.get(),
                    run_state: RunState::from_number(raw.run_state)?,
                    bond: match raw.bonded {
                        0 => None,
                        1 => Some(bond(&mut reader)?),
                        other => {
                            let what = "whether a VMM belongs to a migration";
                            return Err(WireError::Value { what, found: other.into() });
                        }
                    },
                    shape: GuestShape::decode(&mut reader)?,
                })
            }
            kind::SHIM => {
                let [oldest, newest] = reader.take::<[U16; 2]>("versions of a shim")?.map(U16::get);
                Self::Shim { oldest, newest }
            }
            kind::DONE => {
                let values: &[U64; 2] = reader.take("values of a reply")?;
                Self::Reply(Reply { id, outcome: Ok(values.map(U64::get)) })
            }
            kind::FAILED => Self::Reply(Reply { id, outcome: Err(reader.text("reason of a failure")?) }),
            other => return Err(WireError::Unknown { what: "packet from a VMM", found: other.into() }),
        };
        reader.end()?;
        Ok(message)
    }
}

impl ToVmm {
    /// Returns the bytes of the packet.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Welcome { version } => {
                put_header(&mut out, kind::WELCOME, 0);
                put(&mut out, &U16::new(*version));
            }
            Self::Refused { reason } => {
                put_header(&mut out, kind::REFUSED, 0);
                put_text(&mut out, reason);
            }
            Self::Request { id, request } => {
                put_header(&mut out, request.kind(), *id);
                match request {
                    Request::WriteProtect { first, pages } => {
                        put(&mut out, &[U64::new(*first), U64::new(*pages)])
                    }
                    Request::Throttle { pages_per_second } => put(&mut out, &U64::new(*pages_per_second)),
                    Request::Pause { limit_nanoseconds } => put(&mut out, &U64::new(*limit_nanoseconds)),
                    Request::Load { bytes } => put(&mut out, &U64::new(*bytes)),
                    Request::MappedFile { address } => put(&mut out, &U64::new(*address)),
                    Request::Relinquish(bond) | Request::Prepare(bond) => {
                        put(&mut out, &RawBond::from(bond));
                    }
                    _ => {}
                }
            }
        }
        out
    }

    /// Reads a packet.
    ///
    /// # Errors
    ///
    /// Returns an error if the bytes are not exactly one valid packet.
    pub fn decode(packet: &[u8]) -> Result<Self, WireError> {
        let (header, mut reader) = header(packet)?;
        let request = match header.kind.get() {
            kind::WELCOME => {
                let version = reader.take::<U16>("version of a welcome")?.get();
                reader.end()?;
                return Ok(Self::Welcome { version });
            }
            kind::REFUSED => return Ok(Self::Refused { reason: reader.text("reason of a refusal")? }),
            kind::START_TRACKING => Request::StartTracking,
            kind::WRITE_PROTECT => {
                let [first, pages] = reader.take::<[U64; 2]>("run of pages to write-protect")?.map(U64::get);
                Request::WriteProtect { first, pages }
            }
            kind::HARVEST => Request::Harvest,
            kind::THROTTLE => {
                Request::Throttle { pages_per_second: reader.take::<U64>("rate of writes")?.get() }
            }
            kind::STOP_TRACKING => Request::StopTracking,
            kind::PAUSE => {
                Request::Pause { limit_nanoseconds: reader.take::<U64>("limit of a pause")?.get() }
            }
            kind::RESUME => Request::Resume,
            kind::SAVE => Request::Save,
            kind::LOAD => {
                let bytes = reader.take::<U64>("length of a state")?.get();
                if bytes > MAX_STATE_BYTES {
                    let what = "length of a state";
                    return Err(WireError::TooLarge { what, found: bytes, limit: MAX_STATE_BYTES });
                }
                Request::Load { bytes }
            }
            kind::RELINQUISH => Request::Relinquish(bond(&mut reader)?),
            kind::PREPARE => Request::Prepare(bond(&mut reader)?),
            kind::DISCARD => Request::Discard,
            kind::OPEN_USERFAULT => Request::OpenUserfault { keep: false },
            kind::KEEP_USERFAULT => Request::OpenUserfault { keep: true },
            kind::KEPT_USERFAULT => Request::KeptUserfault,
            kind::MAPPED_FILE => {
                Request::MappedFile { address: reader.take::<U64>("address of a mapping")?.get() }
            }
            other => return Err(WireError::Unknown { what: "request to a VMM", found: other.into() }),
        };
        reader.end()?;
        Ok(Self::Request { id: header.id.get(), request })
    }
}

impl Request {
    fn kind(&self) -> u16 {
        match self {
            Self::StartTracking => kind::START_TRACKING,
            Self::WriteProtect { .. } => kind::WRITE_PROTECT,
            Self::Harvest => kind::HARVEST,
            Self::Throttle { .. } => kind::THROTTLE,
            Self::StopTracking => kind::STOP_TRACKING,
            Self::Pause { .. } => kind::PAUSE,
            Self::Resume => kind::RESUME,
            Self::Save => kind::SAVE,
            Self::Load { .. } => kind::LOAD,
            Self::Relinquish(_) => kind::RELINQUISH,
            Self::Prepare(_) => kind::PREPARE,
            Self::Discard => kind::DISCARD,
            Self::OpenUserfault { keep: false } => kind::OPEN_USERFAULT,
            Self::OpenUserfault { keep: true } => kind::KEEP_USERFAULT,
            Self::KeptUserfault => kind::KEPT_USERFAULT,
            Self::MappedFile { .. } => kind::MAPPED_FILE,
        }
    }
}

impl RunState {
    fn from_number(number: u8) -> Result<Self, WireError> {
        [Self::Running, Self::Incoming, Self::Relinquished, Self::Loaded]
            .into_iter()
            .find(|run_state| *run_state as u8 == number)
            .ok_or(WireError::Unknown { what: "run state of a guest", found: number.into() })
    }
}

const MAGIC: [u8; 4] = *b"MLAT";

mod kind {
    pub(super) const HELLO: u16 = 1;
    pub(super) const DONE: u16 = 2;
    pub(super) const FAILED: u16 = 3;
    pub(super) const SHIM: u16 = 4;
    pub(super) const WELCOME: u16 = 16;
    pub(super) const REFUSED: u16 = 17;
    pub(super) const START_TRACKING: u16 = 32;
    pub(super) const WRITE_PROTECT: u16 = 33;
    pub(super) const HARVEST: u16 = 34;
    pub(super) const STOP_TRACKING: u16 = 35;
    pub(super) const PAUSE: u16 = 36;
    pub(super) const RESUME: u16 = 37;
    pub(super) const SAVE: u16 = 38;
    pub(super) const LOAD: u16 = 39;
    pub(super) const RELINQUISH: u16 = 40;
    pub(super) const PREPARE: u16 = 41;
    pub(super) const DISCARD: u16 = 42;
    pub(super) const OPEN_USERFAULT: u16 = 43;
    pub(super) const KEEP_USERFAULT: u16 = 44;
    pub(super) const THROTTLE: u16 = 45;
    pub(super) const KEPT_USERFAULT: u16 = 46;
    pub(super) const MAPPED_FILE: u16 = 47;
}

fn put_header(out: &mut Vec<u8>, kind: u16, id: u32) {
    put(out, &RawHeader { magic: MAGIC, kind: kind.into(), reserved: 0.into(), id: id.into() });
}

fn header(packet: &[u8]) -> Result<(&RawHeader, Reader<'_>), WireError> {
    let mut reader = Reader::new(packet);
    let header: &RawHeader = reader.take("header of a packet")?;
    if header.magic != MAGIC {
        return Err(WireError::Magic { what: "attach packet", expected: MAGIC, found: header.magic });
    }
    Ok((header, reader))
}

fn bond(reader: &mut Reader<'_>) -> Result<Bond, WireError> {
    let raw: &RawBond = reader.take("migration that a VMM belongs to")?;
    if raw.migration == [0; 16] {
        return Err(WireError::Value { what: "identity of a migration", found: 0 });
    }
    let fetching = match raw.fetching {
        0 => false,
        1 => true,
        other => {
            let what = "whether a guest's memory is to be fetched";
            return Err(WireError::Value { what, found: other.into() });
        }
    };
    Ok(Bond { migration: raw.migration, peer: raw.peer.label()?, fetching })
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    kind: U16,
    reserved: U16,
    id: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawVmmHello {
    oldest: U16,
    newest: U16,
    run_state: u8,
    bonded: u8,
    reserved: [u8; 2],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawBond {
    migration: MigrationId,
    peer: RawLabel,
    fetching: u8,
    reserved: [u8; 7],
}

impl From<&Bond> for RawBond {
    fn from(bond: &Bond) -> Self {
        let Bond { migration, peer, fetching } = bond;
        Self { migration: *migration, peer: peer.raw(), fetching: (*fetching).into(), reserved: [0; 7] }
    }
}
