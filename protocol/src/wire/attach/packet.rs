//! The packets between the daemon and a VMM.

use super::bond::Bond;
use super::request::Request;
use crate::wire::machine::GuestShape;

/// The oldest and the newest version of this protocol that this build speaks.
///
/// Since version 2, the set of harvested pages has a second level of summary (see
/// [`PageSet::words_needed`](crate::PageSet::words_needed)). Since version 3, a VMM that waits to be told whether its guest
/// is to run also names the other host ([`Bond`]), and a pause has a limit. Since version 4, a VMM can be asked for the
/// userfaultfd that it keeps ([`Request::KeptUserfault`]). Since version 5, a shim can be asked for memory that has no name
/// ([`Request::MappedFile`]).
pub const VERSIONS: (u16, u16) = (3, 5);
/// Since this version, a VMM knows [`Request::KeptUserfault`].
pub const HANDS_OVER_AGAIN: u16 = 4;
/// Since this version, a shim knows [`Request::MappedFile`].
pub const HANDS_OVER_MEMORY: u16 = 5;
/// The length of the largest packet in bytes.
pub const MAX_PACKET_BYTES: usize = 32 << 10;
/// The largest VMM state that may be saved or loaded, in bytes. RAM is not part of it.
pub const MAX_STATE_BYTES: u64 = 256 << 20;

/// A packet from a VMM to its daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromVmm {
    /// The first packet of a VMM. It carries one descriptor for each region.
    Hello(VmmHello),
    /// The first packet of a shim. It carries no descriptors.
    Shim {
        /// The oldest version that the shim speaks.
        oldest: u16,
        /// The newest version that the shim speaks.
        newest: u16,
    },
    /// The answer to the request with the same number.
    Reply(Reply),
}

/// The packet with which a VMM introduces itself and its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmmHello {
    /// The oldest version that the VMM speaks.
    pub oldest: u16,
    /// The newest version that the VMM speaks.
    pub newest: u16,
    /// The run state of the guest.
    pub run_state: RunState,
    /// The migration that the guest belongs to, if it is relinquished or loaded.
    pub bond: Option<Bond>,
    /// The guest. If no guest has arrived yet, this is what the VMM could run.
    pub shape: GuestShape,
}

/// The run state of a guest, which also says whether its VMM may run it without being told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RunState {
    /// The VMM owns the guest and runs it, or has it paused by itself.
    Running = 1,
    /// The VMM waits for a guest to arrive, and its memory is empty.
    Incoming = 2,
    /// The guest was paused and given up for a migration. Only the daemon may decide whether it runs again.
    Relinquished = 3,
    /// A guest has arrived and its state is loaded. Only the daemon may decide whether it runs.
    Loaded = 4,
}

/// A VMM's answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The number of the request.
    pub id: u32,
    /// The values that the request defines, or the reason of its failure.
    pub outcome: Result<[u64; 2], String>,
}

/// A packet from the daemon to a VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToVmm {
    /// The VMM is attached, and both sides speak this version from now on.
    Welcome {
        /// The newest version that both speak.
        version: u16,
    },
    /// The VMM cannot attach.
    Refused {
        /// The reason, for the operator.
        reason: String,
    },
    /// The VMM is to do something.
    Request {
        /// The number of the request, which the reply repeats.
        id: u32,
        /// What to do.
        request: Request,
    },
}
