//! Between the daemon and a VMM on the same host: packets on a `SOCK_SEQPACKET` Unix socket.
//!
//! The VMM connects and says [`Hello`], with one descriptor for each region of RAM attached
//! (`SCM_RIGHTS`). The daemon answers [`ToVmm::Welcome`] or [`ToVmm::Refused`], and from then
//! on sends one [`Request`] at a time; the VMM answers each with one [`Reply`]. A VMM whose
//! daemon went away connects again and says in which [`Standing`] it is.
//!
//! A VMM that knows nothing of this has a shim in its process, which says [`FromVmm::Shim`] in
//! place of the hello, and knows [`Request::OpenUserfault`] alone. Whose shim it is, the
//! daemon asks the kernel (`SO_PEERCRED`).

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::machine::GuestShape;
use super::text::RawLabel;
use super::{Label, Reader, WireError, put, put_text};

/// Versions of this protocol that this build speaks, oldest and newest.
///
/// Since 2 the set of harvested pages has a top (see [`PageSet::words_needed`](crate::PageSet::words_needed));
/// since 3 a VMM that waits for word names the other host as well ([`Bond`]), and a pause has a limit.
pub const VERSIONS: (u16, u16) = (3, 3);
/// Bytes of the largest packet.
pub const MAX_PACKET_BYTES: usize = 32 << 10;
/// Bytes of VMM state that may be saved or loaded (RAM is not part of it).
pub const MAX_STATE_BYTES: u64 = 256 << 20;

const MAGIC: [u8; 4] = *b"MLAT";

/// What names one migration, on both hosts and in their journals.
pub type MigrationId = [u8; 16];

/// What binds a guest that waits for word to a migration. A VMM remembers it for a daemon whose journal
/// may have lost it; what a VMM says of itself is a claim, to be compared with what is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bond {
    /// Which migration; never all zeros.
    pub migration: MigrationId,
    /// The other host.
    pub peer: Label,
    /// Part of the memory of a guest that was loaded has not come: it is to be fetched.
    pub fetching: bool,
}

/// From a VMM to its daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromVmm {
    /// First packet. Carries one descriptor for each region.
    Hello(Hello),
    /// First packet of a shim. Carries no descriptors.
    Shim {
        /// Oldest version that it speaks.
        oldest: u16,
        /// Newest version that it speaks.
        newest: u16,
    },
    /// Answer to the request with the same number.
    Reply(Reply),
}

/// A VMM introduces itself and its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version that it speaks.
    pub oldest: u16,
    /// Newest version that it speaks.
    pub newest: u16,
    /// What the guest is doing.
    pub standing: Standing,
    /// What the standing belongs to, if it is relinquished or loaded.
    pub bond: Option<Bond>,
    /// The guest; for one that is awaited, what this VMM could run.
    pub shape: GuestShape,
}

/// What a guest is doing when its VMM attaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Standing {
    /// It runs here.
    Running = 1,
    /// Its memory is empty; it waits for a guest to arrive.
    Incoming = 2,
    /// It was paused and given up for a migration: only the daemon may say whether it runs again.
    Relinquished = 3,
    /// A guest has arrived and its state is loaded: only the daemon may say whether it runs.
    Loaded = 4,
}

/// Answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The request's number.
    pub id: u32,
    /// Values as the request defines them, or what went wrong.
    pub outcome: Result<[u64; 2], String>,
}

/// From the daemon to a VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToVmm {
    /// The VMM is attached; this version is spoken.
    Welcome {
        /// The newest version that both know.
        version: u16,
    },
    /// The VMM cannot attach.
    Refused {
        /// Why, for the operator.
        reason: String,
    },
    /// Do this.
    Request {
        /// Number that the reply repeats.
        id: u32,
        /// What to do.
        request: Request,
    },
}

/// What a daemon asks of a VMM. Times in replies are nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Begin to track writes, without stopping the vCPUs. Nothing is armed yet.
    /// The reply carries a memfd: the words of a [`PageSet`](crate::PageSet) over all pages,
    /// into which harvested pages are added.
    StartTracking,
    /// Arm this run of pages for the first time: later writes to them are noticed.
    /// Values: time taken, 0.
    Arm {
        /// First page.
        first: u64,
        /// Number of pages.
        pages: u64,
    },
    /// Add all pages written since they were last harvested to the shared set, and arm them
    /// again. Values: time taken, pages added.
    Harvest,
    /// Hold the guest's writes to so many pages of 4 KiB per second, by keeping the vCPUs that write out of
    /// the guest and no others, until tracking ends; fails where that cannot be.
    /// Values: pages written since that began, pages that there were to write.
    Pace {
        /// Pages per second; 0 counts as 1.
        pages_per_second: u64,
    },
    /// Track no more; release what tracking took.
    StopTracking,
    /// Stop all vCPUs. Values: `CLOCK_MONOTONIC` when the last one stood still, 0.
    Pause {
        /// When the guest runs on by itself, from when its pause began, unless it has been given up by
        /// then: the daemon may hang. 0 for never.
        limit_nanoseconds: u64,
    },
    /// Run (again). Values: `CLOCK_MONOTONIC` when the vCPUs were let go, 0.
    Resume,
    /// Save everything but RAM. The reply carries a memfd. Values: bytes in it, time taken.
    Save,
    /// Load what a [`Request::Save`] at another host gave; the request carries a memfd.
    /// Values: time taken, 0.
    Load {
        /// Bytes in the memfd.
        bytes: u64,
    },
    /// From here on the paused guest must not run by itself, not even if the daemon goes away.
    Relinquish(Bond),
    /// The loaded guest belongs to this migration; remember it for [`Hello::bond`].
    Prepare(Bond),
    /// The guest runs elsewhere, or will never run here: end.
    Discard,
    /// Open a userfaultfd of the VMM's process. The request carries an open `/dev/userfaultfd` to
    /// make it with, since only opening that needs rights, or no descriptor where the daemon may
    /// not open it; then the process's own rights count. The reply carries the userfaultfd, on
    /// which nothing was done yet, `/proc/self/pagemap` and `/proc/self/maps`. Values: 0, 0.
    OpenUserfault {
        /// Keep a copy of the userfaultfd open, until this request comes again or the process ends:
        /// when the daemon ends, waiting threads then wait on. Otherwise the kernel lets them go, and
        /// what was missing is zeros.
        keep: bool,
    },
}

impl FromVmm {
    /// The packet's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Hello(hello) => {
                put_header(&mut out, kind::HELLO, 0);
                put(
                    &mut out,
                    &RawHello {
                        oldest: hello.oldest.into(),
                        newest: hello.newest.into(),
                        standing: hello.standing as u8,
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
    pub fn decode(packet: &[u8]) -> Result<Self, WireError> {
        let (header, mut reader) = header(packet)?;
        let id = header.id.get();
        let message = match header.kind.get() {
            kind::HELLO => {
                let raw: &RawHello = reader.take("hello of a VMM")?;
                Self::Hello(Hello {
                    oldest: raw.oldest.get(),
                    newest: raw.newest.get(),
                    standing: Standing::from_number(raw.standing)?,
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
    /// The packet's bytes.
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
                    Request::Arm { first, pages } => put(&mut out, &[U64::new(*first), U64::new(*pages)]),
                    Request::Pace { pages_per_second } => put(&mut out, &U64::new(*pages_per_second)),
                    Request::Pause { limit_nanoseconds } => put(&mut out, &U64::new(*limit_nanoseconds)),
                    Request::Load { bytes } => put(&mut out, &U64::new(*bytes)),
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
            kind::ARM => {
                let [first, pages] = reader.take::<[U64; 2]>("run of pages to arm")?.map(U64::get);
                Request::Arm { first, pages }
            }
            kind::HARVEST => Request::Harvest,
            kind::PACE => Request::Pace { pages_per_second: reader.take::<U64>("rate of writes")?.get() },
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
            other => return Err(WireError::Unknown { what: "request to a VMM", found: other.into() }),
        };
        reader.end()?;
        Ok(Self::Request { id: header.id.get(), request })
    }
}

impl Request {
    /// The request's name, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::StartTracking => "start tracking",
            Self::Arm { .. } => "arm",
            Self::Harvest => "harvest",
            Self::Pace { .. } => "pace",
            Self::StopTracking => "stop tracking",
            Self::Pause { .. } => "pause",
            Self::Resume => "resume",
            Self::Save => "save",
            Self::Load { .. } => "load",
            Self::Relinquish(_) => "relinquish",
            Self::Prepare(_) => "prepare",
            Self::Discard => "discard",
            Self::OpenUserfault { .. } => "open userfaultfd",
        }
    }

    fn kind(&self) -> u16 {
        match self {
            Self::StartTracking => kind::START_TRACKING,
            Self::Arm { .. } => kind::ARM,
            Self::Harvest => kind::HARVEST,
            Self::Pace { .. } => kind::PACE,
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
        }
    }
}

impl Standing {
    fn from_number(number: u8) -> Result<Self, WireError> {
        [Self::Running, Self::Incoming, Self::Relinquished, Self::Loaded]
            .into_iter()
            .find(|standing| *standing as u8 == number)
            .ok_or(WireError::Unknown { what: "standing of a guest", found: number.into() })
    }
}

mod kind {
    pub const HELLO: u16 = 1;
    pub const DONE: u16 = 2;
    pub const FAILED: u16 = 3;
    pub const SHIM: u16 = 4;
    pub const WELCOME: u16 = 16;
    pub const REFUSED: u16 = 17;
    pub const START_TRACKING: u16 = 32;
    pub const ARM: u16 = 33;
    pub const HARVEST: u16 = 34;
    pub const STOP_TRACKING: u16 = 35;
    pub const PAUSE: u16 = 36;
    pub const RESUME: u16 = 37;
    pub const SAVE: u16 = 38;
    pub const LOAD: u16 = 39;
    pub const RELINQUISH: u16 = 40;
    pub const PREPARE: u16 = 41;
    pub const DISCARD: u16 = 42;
    pub const OPEN_USERFAULT: u16 = 43;
    pub const KEEP_USERFAULT: u16 = 44;
    pub const PACE: u16 = 45;
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
struct RawHello {
    oldest: U16,
    newest: U16,
    standing: u8,
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
