//! The few packets that a shim needs, written by hand. The protocol is described in `memlane-protocol`
//! (`wire::attach`), whose tests compare it with these bytes.
//!
//! A packet is a header of 12 bytes (magic, kind, 2 bytes of nothing, number) and a body.

/// The length of the longest packet that a daemon sends to a shim, in bytes: a refusal with its reason.
pub(crate) const MAX_PACKET_BYTES: usize = HEADER_BYTES + MAX_TEXT_BYTES;

const MAGIC: [u8; 4] = *b"MLAT";
const HEADER_BYTES: usize = 12;
const MAX_TEXT_BYTES: usize = 1024;
/// The oldest and the newest version of the protocol that this shim speaks.
const VERSIONS: (u16, u16) = (3, 5);

const DONE: u16 = 2;
const FAILED: u16 = 3;
const SHIM: u16 = 4;
const WELCOME: u16 = 16;
/// The first kind of packet that is a request. All kinds from here on are requests.
const FIRST_REQUEST: u16 = 32;
const OPEN_USERFAULT: u16 = 43;
const KEEP_USERFAULT: u16 = 44;
const KEPT_USERFAULT: u16 = 46;
const MAPPED_FILE: u16 = 47;

/// A message of the daemon.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FromDaemon {
    /// The daemon knows the shim now.
    Welcome,
    /// The daemon asks for a userfaultfd.
    OpenUserfault {
        /// The number of the request, which the reply repeats.
        id: u32,
        /// Whether the shim keeps a copy of the userfaultfd open.
        keep: bool,
    },
    /// The daemon asks for the userfaultfd again of which the shim keeps a copy.
    KeptUserfault {
        /// The number of the request, which the reply repeats.
        id: u32,
    },
    /// The daemon asks for the file that is mapped at an address.
    MappedFile {
        /// The number of the request, which the reply repeats.
        id: u32,
        /// The address.
        address: u64,
    },
    /// The daemon asks for something that this shim does not know.
    Unknown {
        /// The number of the request, which the reply repeats.
        id: u32,
    },
}

impl FromDaemon {
    /// Reads a packet. It returns `None` for refusals and for packets that make no sense: after either the shim can
    /// only close the connection and try again later.
    pub(crate) fn read(packet: &[u8]) -> Option<Self> {
        let (header, body) = packet.split_first_chunk::<HEADER_BYTES>()?;
        let [m0, m1, m2, m3, k0, k1, _, _, id @ ..] = *header;
        if [m0, m1, m2, m3] != MAGIC {
            return None;
        }
        let id = u32::from_le_bytes(id);
        match u16::from_le_bytes([k0, k1]) {
            WELCOME => {
                let version = u16::from_le_bytes(body.try_into().ok()?);
                (VERSIONS.0..=VERSIONS.1).contains(&version).then_some(Self::Welcome)
            }
            OPEN_USERFAULT if body.is_empty() => Some(Self::OpenUserfault { id, keep: false }),
            KEEP_USERFAULT if body.is_empty() => Some(Self::OpenUserfault { id, keep: true }),
            KEPT_USERFAULT if body.is_empty() => Some(Self::KeptUserfault { id }),
            MAPPED_FILE => Some(Self::MappedFile { id, address: u64::from_le_bytes(body.try_into().ok()?) }),
            kind if kind >= FIRST_REQUEST => Some(Self::Unknown { id }),
            _ => None,
        }
    }
}

/// Makes the first packet of a shim, with the oldest and the newest version that it speaks.
pub(crate) fn shim() -> Vec<u8> {
    packet(SHIM, 0, &[VERSIONS.0.to_le_bytes(), VERSIONS.1.to_le_bytes()].concat())
}

/// Makes the reply that request `id` was carried out. Its two values mean nothing.
pub(crate) fn done(id: u32) -> Vec<u8> {
    packet(DONE, id, &[0; 16])
}

/// Makes the reply that request `id` was not carried out. A daemon reads reasons of up to 1024 bytes.
pub(crate) fn failed(id: u32, reason: &str) -> Vec<u8> {
    packet(FAILED, id, reason.as_bytes())
}

fn packet(kind: u16, id: u32, body: &[u8]) -> Vec<u8> {
    [&MAGIC, &kind.to_le_bytes()[..], &[0; 2], &id.to_le_bytes(), body].concat()
}

#[cfg(test)]
mod tests {
    use memlane_protocol::wire::attach::{FromVmm, Reply, Request, ToVmm};

    use super::*;

    #[test]
    fn the_daemon_understands_the_shim() {
        assert_eq!(FromVmm::decode(&shim()), Ok(FromVmm::Shim { oldest: VERSIONS.0, newest: VERSIONS.1 }));
        let reply = |id, outcome| Ok(FromVmm::Reply(Reply { id, outcome }));
        assert_eq!(FromVmm::decode(&done(7)), reply(7, Ok([0; 2])));
        assert_eq!(FromVmm::decode(&failed(u32::MAX, "nö")), reply(u32::MAX, Err("nö".into())));
    }

    #[test]
    fn the_shim_understands_the_daemon() {
        let read = |message: ToVmm| FromDaemon::read(&message.encode());
        for (version, known) in [(VERSIONS.0 - 1, false), (3, true), (5, true), (VERSIONS.1 + 1, false)] {
            let welcome = known.then_some(FromDaemon::Welcome);
            assert_eq!(read(ToVmm::Welcome { version }), welcome, "version {version}");
        }
        let id = 0x0102_0304;
        for keep in [false, true] {
            let open = ToVmm::Request { id, request: Request::OpenUserfault { keep } };
            assert_eq!(read(open), Some(FromDaemon::OpenUserfault { id, keep }));
        }
        let again = ToVmm::Request { id, request: Request::KeptUserfault };
        assert_eq!(read(again), Some(FromDaemon::KeptUserfault { id }));
        let file = ToVmm::Request { id, request: Request::MappedFile { address: u64::MAX - 1 } };
        assert_eq!(read(file), Some(FromDaemon::MappedFile { id, address: u64::MAX - 1 }));
        let other = ToVmm::Request { id, request: Request::Resume };
        assert_eq!(read(other), Some(FromDaemon::Unknown { id }));
        let refused = ToVmm::Refused { reason: "x".repeat(MAX_TEXT_BYTES) }.encode();
        assert_eq!((refused.len(), FromDaemon::read(&refused)), (MAX_PACKET_BYTES, None));
    }

    #[test]
    fn nonsense_is_nothing() {
        let open = ToVmm::Request { id: 1, request: Request::OpenUserfault { keep: true } }.encode();
        for length in 0..open.len() {
            assert_eq!(FromDaemon::read(&open[..length]), None, "{length} bytes");
        }
        for magic in [*b"mlat", *b"MLAN", [0; 4]] {
            let bytes = [&magic, &open[4..]].concat();
            assert_eq!(FromDaemon::read(&bytes), None);
        }
        for kind in [0, 1, DONE, FAILED, SHIM, 15, 18, 31] {
            assert_eq!(FromDaemon::read(&packet(kind, 1, &[])), None, "kind {kind}");
        }
        assert_eq!(FromDaemon::read(&packet(WELCOME, 0, &[])), None);
    }
}
