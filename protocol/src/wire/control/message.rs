//! The messages on a control connection.

use std::net::IpAddr;
use std::ops::Range;

use super::fetch::{FetchReport, Missing};
use super::offer::{Accept, Offer, Refusal};
use crate::handover::Message;
use crate::wire::attach::MigrationId;

/// The length of the longest body in bytes.
pub const MAX_BODY_BYTES: usize = 1 << 20;
/// The largest number of ranges in one [`Control::Holes`].
pub const MAX_RANGES: usize = 32 << 10;
/// The largest number of digests in one [`Control::Digests`].
pub const MAX_DIGESTS: usize = 32 << 10;
/// The largest number of bytes of state in one [`Control::State`].
pub const MAX_STATE_CHUNK_BYTES: usize = 512 << 10;
/// The number of bytes of memory under one digest.
pub const DIGEST_CHUNK_BYTES: u64 = 2 << 20;

/// The number of an iteration of which the guest writes nothing any more: it is paused, and what there is of its VMM's state
/// may be loaded. It is said only where that has a [lane of its own](crate::wire::hello::Purpose::State), since version 5.
pub const LAST_ITERATION: u32 = 0;

/// A message from one daemon to the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// The daemon that connects says before anything else that its lanes will come from these addresses, and from no
    /// others. There are at most [`MAX_PORTS`](super::MAX_PORTS) of them.
    LanesFrom(Vec<IpAddr>),
    /// The source offers a guest.
    Offer(Offer),
    /// The destination accepts the guest, and has reserved what it needs.
    Accept(Accept),
    /// The destination refuses the guest, for all these reasons.
    Refuse(Vec<Refusal>),
    /// Either daemon asks whether the other is there, and measures the round trip. The other answers at once.
    Ping(u64),
    /// The answer to a ping, with the same number.
    Pong(u64),
    /// The source says that these pages are zero, and take no memory.
    Holes(Vec<Range<u64>>),
    /// The destination says that all holes received so far are zero there as well.
    HolesDone,
    /// The source has lost this lane. What the lane may still carry must not be written to memory any more.
    LaneLost(u16),
    /// The destination has closed this lane, and writes nothing of it to memory any more.
    LaneClosed(u16),
    /// The source begins an iteration of pre-copy.
    Iteration {
        /// The number of the iteration, from 1, or [`LAST_ITERATION`].
        number: u32,
        /// The number of pages to send in it.
        pages: u64,
    },
    /// The source says that the guest is paused and all pages are acknowledged, and asks for digests of all RAM.
    Verify,
    /// The destination sends digests of pieces of [`DIGEST_CHUNK_BYTES`]. A piece that no digest names is all zero.
    Digests {
        /// The number of each piece and its XXH3-128, in order over all messages.
        digests: Vec<(u64, u128)>,
        /// Whether this message is the last one with digests.
        last: bool,
    },
    /// The source sends the next piece of the VMM's state, as soon as the VMM has written it. An empty piece says that all of
    /// the guest's memory has arrived, as far as it is known before the VMM has saved its state.
    State {
        /// The length of the whole state in bytes. In all messages but the last one it may be more, as long as the source does
        /// not know it.
        total: u64,
        /// The offset of this piece in bytes.
        offset: u64,
        /// The bytes of the piece, which travel with their CRC32C.
        bytes: Vec<u8>,
    },
    /// The source says, first on a connection of its own, that the memory of this migration's guest can be fetched from
    /// it. The destination answers with an [`Accept`] for the lanes, and names the missing pages as soon as they are known
    /// for good.
    Fetch(MigrationId),
    /// Pages that are missing at the destination. The source sends this to have them dropped there. The destination sends
    /// it over a connection that was opened for fetching, to have them sent.
    Missing(Missing),
    /// The destination has dropped all pages that were named up to the last [`Missing`].
    MissingDone,
    /// The destination reports the progress of fetching.
    Fetched(FetchReport),
    /// The source says, after the acceptance, how long the two daemons try to reach each other again when their connection
    /// is lost before the handover begins. Since version 4.
    Patience {
        /// The time in milliseconds.
        milliseconds: u32,
    },
    /// Either daemon says how many messages it has received after the acceptance, so that the other need not keep them.
    /// Pings and messages of this kind do not count. Since version 4.
    Received(u64),
    /// The source resumes, first on a new connection, a migration whose connection is lost. Since version 4.
    Resume {
        /// The migration.
        migration: MigrationId,
        /// The number of messages that it has received after the acceptance.
        received: u64,
    },
    /// The destination goes on with the migration over the new connection, and has received so many messages after the
    /// acceptance. It sends what the source has not received. Since version 4.
    Resumed(u64),
    /// Either daemon sends a message of the handover.
    Handover {
        /// The migration. The connection may be a new one.
        migration: MigrationId,
        /// The message.
        message: Message,
        /// The time in nanoseconds that the work took which the message reports (loading or resuming), or 0.
        nanoseconds: u64,
        /// The reason, if the message is bad news.
        reason: String,
    },
}

impl Control {
    /// Returns the name of the message, for logs and errors.
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
            Self::Iteration { .. } => "round",
            Self::Verify => "verify",
            Self::Digests { .. } => "digests",
            Self::State { .. } => "state",
            Self::Fetch(_) => "fetch",
            Self::Missing(_) => "missing",
            Self::MissingDone => "missing done",
            Self::Fetched(_) => "fetched",
            Self::Patience { .. } => "patience",
            Self::Received(_) => "received",
            Self::Resume { .. } => "resume",
            Self::Resumed(_) => "resumed",
            Self::Handover { .. } => "handover",
        }
    }
}
