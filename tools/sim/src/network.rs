//! The network: paths with a rate and a latency, and connections that keep their order as TCP does.
//!
//! What is under way on a path that is cut arrives when the path is whole again. A connection that is reset is lost at
//! its two ends at different times: what was under way to the end that does not know it yet may still arrive there.

use std::collections::VecDeque;
use std::time::Duration;

use memlane_protocol::wire::control::{Control, HEADER_BYTES, decode_header};
use memlane_protocol::wire::frame::PAGE_REQUEST_BYTES;

use crate::clock::Clock;
use crate::dice::Dice;
use crate::event::{Event, HostId, MigrationId};

/// A way between the hosts: a pair of ports, or the addresses of the daemons.
#[derive(Debug, Clone)]
pub(crate) struct Path {
    /// Bytes per second in each direction.
    pub rate: u64,
    /// The time that a byte takes at least.
    pub latency: Duration,
    /// The latency is up to so much longer, in percent.
    pub jitter: u64,
    /// Nothing passes to each host before this time.
    pub cut_until: [Duration; 2],
    /// What was sent to each host will have left by this time.
    free_at: [Duration; 2],
}

/// What a connection is for. The dialling host has the source's part, except for words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The control link of a migration.
    Control(MigrationId),
    /// A lane of pre-copy.
    Lane { migration: MigrationId, number: u16, path: usize },
    /// The control link of a session in which missing pages are served.
    Fetch(MigrationId),
    /// A lane of such a session, which is the first one with this ticket.
    FetchLane { migration: MigrationId, number: u16, path: usize, session: u64 },
    /// The lane of such a session for pages that are waited for.
    Faults { migration: MigrationId, path: usize, session: u64 },
    /// One word of the handover, and its answer.
    Word(MigrationId),
}

/// Something that crosses the network.
#[derive(Debug, Clone)]
pub(crate) enum Payload {
    /// A control message, in the bytes of the real format.
    Control(Vec<u8>),
    /// The source asks for a guest to be taken. (The real message has the shape of the guest, which is no matter here.)
    Offer,
    /// An offer, or an offer to serve, is accepted, or not.
    Answer { accepted: bool },
    /// A frame: header and table in the bytes of the real format, and the versions of its pages in place of their bytes.
    Frame { head: Vec<u8>, versions: Vec<u32> },
    /// All frames up to this one are in memory.
    Ack(u64),
    /// The destination asks for this page.
    Request(u64),
    /// The other end has closed the connection.
    Closed,
}

/// A connection of the two hosts.
#[derive(Debug)]
pub(crate) struct Connection {
    pub purpose: Purpose,
    pub path: usize,
    pub dialler: HostId,
    /// Each host's end is open.
    pub open: [bool; 2],
    /// What is under way to each host.
    ways: [Way; 2],
}

#[derive(Debug, Default)]
struct Way {
    under_way: VecDeque<(Duration, Payload)>,
    /// Nothing arrives before what was sent before.
    last: Duration,
    /// The sender's kernel last heard that something arrived.
    acknowledged: Duration,
}

/// All paths and connections.
#[derive(Debug, Default)]
pub(crate) struct Network {
    pub paths: Vec<Path>,
    pub connections: Vec<Connection>,
}

impl Path {
    pub(crate) fn new(rate: u64, latency: Duration, jitter: u64) -> Self {
        let (cut_until, free_at) = Default::default();
        Self { rate, latency, jitter, cut_until, free_at }
    }

    pub(crate) fn is_cut(&self, now: Duration) -> bool {
        self.cut_until.iter().any(|until| *until > now)
    }

    /// Returns when `bytes` to this host leave, and when they have left, if they are handed over now.
    fn reserve(&mut self, to: HostId, bytes: u64, now: Duration) -> (Duration, Duration) {
        let start = self.free_at[to].max(now);
        let end = start + Duration::from_nanos(bytes * 1_000_000_000 / self.rate);
        self.free_at[to] = end;
        (start, end)
    }
}

impl Payload {
    pub(crate) fn control(message: &Control) -> Self {
        Self::Control(message.encode())
    }

    /// Returns the control message, which was encoded here.
    pub(crate) fn decode(bytes: &[u8]) -> Control {
        let (kind, length) =
            decode_header(&bytes[..HEADER_BYTES]).expect("the header was encoded by the protocol");
        let body = &bytes[HEADER_BYTES..];
        assert_eq!(body.len(), length, "the length is that of the body");
        Control::decode(kind, body).expect("the body was encoded by the protocol")
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Control(bytes) => bytes.len() as u64,
            Self::Offer | Self::Answer { .. } => 200,
            Self::Frame { head, .. } => head.len() as u64,
            Self::Ack(_) => 16,
            Self::Request(_) => PAGE_REQUEST_BYTES as u64,
            Self::Closed => 0,
        }
    }
}

impl Network {
    /// Makes a connection whose two ends are open.
    pub(crate) fn connect(&mut self, purpose: Purpose, path: usize, dialler: HostId, now: Duration) -> usize {
        let way = || Way { last: now, acknowledged: now, ..Way::default() };
        self.connections.push(Connection { purpose, path, dialler, open: [true; 2], ways: [way(), way()] });
        self.connections.len() - 1
    }

    pub(crate) fn is_open(&self, connection: usize, at: HostId) -> bool {
        self.connections[connection].open[at]
    }

    /// Takes room on the path for a frame, and returns when it has left. [`send_reserved`](Self::send_reserved) follows.
    pub(crate) fn reserve(
        &mut self,
        connection: usize,
        from: HostId,
        bytes: u64,
        now: Duration,
    ) -> (Duration, Duration) {
        let path = self.connections[connection].path;
        self.paths[path].reserve(1 - from, bytes, now)
    }

    /// Sends what has a time at which it leaves.
    pub(crate) fn send_reserved(
        &mut self,
        connection: usize,
        from: HostId,
        payload: Payload,
        leaves: Duration,
        (clock, dice): (&mut Clock, &mut Dice),
    ) {
        let to = 1 - from;
        let Connection { path, open, ways, .. } = &mut self.connections[connection];
        let path = &self.paths[*path];
        if !open[from] || !open[to] {
            return; // nobody is there any more to take it
        }
        let jitter = path.latency * dice.below(path.jitter + 1) as u32 / 100;
        let way = &mut ways[to];
        way.last = way.last.max(leaves.max(clock.now()) + path.latency + jitter);
        way.under_way.push_back((way.last, payload));
        if way.under_way.len() == 1 {
            clock.at(way.last, Event::Arrive { connection, to });
        }
    }

    /// Sends a message.
    pub(crate) fn send(
        &mut self,
        connection: usize,
        from: HostId,
        payload: Payload,
        (clock, dice): (&mut Clock, &mut Dice),
    ) {
        let (_, leaves) = self.reserve(connection, from, payload.bytes(), clock.now());
        self.send_reserved(connection, from, payload, leaves, (clock, dice));
    }

    /// Takes what is due at `to`. Where the path is cut, it is due again when that is over.
    pub(crate) fn arrive(
        &mut self,
        connection: usize,
        to: HostId,
        (clock, dice): (&mut Clock, &mut Dice),
    ) -> Option<Payload> {
        /// TCP sends again what was lost after this time at most, in a network that is whole again.
        const AGAIN: Duration = Duration::from_millis(300);
        let Connection { path, ways, open, .. } = &mut self.connections[connection];
        let (path, way) = (&self.paths[*path], &mut ways[to]);
        let due = way.under_way.front()?.0;
        let cut_until = path.cut_until[to];
        if due > clock.now() || cut_until > clock.now() {
            let again = if due > clock.now() { due } else { cut_until + dice.time(Duration::ZERO, AGAIN) };
            clock.at(again, Event::Arrive { connection, to });
            return None;
        }
        let (_, payload) = way.under_way.pop_front()?;
        way.acknowledged = clock.now() + path.latency;
        if let Some((next, _)) = way.under_way.front() {
            clock.at(*next, Event::Arrive { connection, to });
        }
        open[to].then_some(payload)
    }

    /// Closes one end. The other learns of it after what is under way to it.
    pub(crate) fn close(&mut self, connection: usize, at: HostId, random: (&mut Clock, &mut Dice)) {
        if self.connections[connection].open[at] {
            self.send_reserved(connection, at, Payload::Closed, Duration::ZERO, random);
            self.lose(connection, at);
        }
    }

    /// Notes that one end is lost. What is under way to it will not arrive.
    pub(crate) fn lose(&mut self, connection: usize, at: HostId) {
        self.connections[connection].open[at] = false;
    }

    /// Returns, for what was sent from this end: since when the kernel has heard nothing, and whether something is
    /// unanswered.
    pub(crate) fn unanswered(&self, connection: usize, from: HostId, now: Duration) -> (Duration, bool) {
        let way = &self.connections[connection].ways[1 - from];
        (now.saturating_sub(way.acknowledged), !way.under_way.is_empty() || way.acknowledged > now)
    }

    /// Returns how many things are under way to a host, at most on any connection.
    pub(crate) fn longest_queue(&self) -> usize {
        let ways = self.connections.iter().flat_map(|connection| &connection.ways);
        ways.map(|way| way.under_way.len()).max().unwrap_or_default()
    }
}

impl Purpose {
    pub(crate) fn migration(self) -> MigrationId {
        match self {
            Self::Control(migration) | Self::Fetch(migration) | Self::Word(migration) => migration,
            Self::Lane { migration, .. }
            | Self::FetchLane { migration, .. }
            | Self::Faults { migration, .. } => migration,
        }
    }
}
