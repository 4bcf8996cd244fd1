//! One host: a daemon with its role in the handover, a journal and a VMM.

use memlane_protocol::handover::{Action, Destination, Event, Message, Phase, Record, Source};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Vmm {
    /// At the destination: waits for pages and state.
    Incoming,
    /// At the destination: has the state, waits for the word.
    Loaded,
    Running,
    /// At the source: resumes by itself if its daemon goes away.
    Paused,
    /// At the source: waits for the word.
    Relinquished,
    Discarded,
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Role {
    Source(Source),
    Destination(Destination),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Host {
    pub up: bool,
    /// The daemon's role, or `None` if the daemon is down or does not know the migration.
    pub role: Option<Role>,
    pub journal: Option<Record>,
    /// What the journal has held before, one bit a record: a damaged one may hold it again.
    pub past: u16,
    /// The host will never be back.
    pub burned: bool,
    pub vmm: Vmm,
    /// The VMM has lost its daemon and not acted on it yet.
    pub orphaned: bool,
    /// What has been asked of the journal and of the VMM, and what the daemon is to hear.
    pub writes: Vec<Action>,
    pub commands: Vec<Action>,
    pub inbox: Vec<Event>,
    /// Messages on their way to this host, one bit each.
    pub arriving: u16,
}

impl Role {
    pub(super) fn on(&mut self, event: Event) -> Vec<Action> {
        match self {
            Self::Source(source) => source.on(event),
            Self::Destination(destination) => destination.on(event),
        }
    }

    pub(super) fn phase(&self) -> Phase {
        match self {
            Self::Source(source) => source.phase(),
            Self::Destination(destination) => destination.phase(),
        }
    }

    pub(super) fn can_resolve(&self) -> bool {
        match self {
            Self::Source(source) => source.can_resolve(),
            Self::Destination(destination) => destination.can_resolve(),
        }
    }

    pub(super) fn can_abandon(&self) -> bool {
        match self {
            Self::Source(source) => source.can_abandon(),
            Self::Destination(destination) => destination.can_abandon(),
        }
    }

    pub(super) fn is_over(&self) -> bool {
        match self {
            Self::Source(source) => source.is_over(),
            Self::Destination(destination) => destination.is_over(),
        }
    }
}

impl Host {
    pub(super) fn new(vmm: Vmm) -> Self {
        Self {
            up: true,
            role: None,
            journal: None,
            past: 0,
            burned: false,
            vmm,
            orphaned: false,
            writes: Vec::new(),
            commands: Vec::new(),
            inbox: Vec::new(),
            arriving: 0,
        }
    }

    pub(super) fn phase(&self) -> Option<Phase> {
        self.role.map(|role| role.phase())
    }

    pub(super) fn at_rest(&self) -> bool {
        self.is_quiet() && self.role.is_none_or(|role| role.is_over()) && self.journal.is_none()
    }

    /// Whether nothing happens here unless another host does something.
    pub(super) fn is_quiet(&self) -> bool {
        self.up && self.writes.is_empty() && self.commands.is_empty() && self.inbox.is_empty()
    }

    /// Whether this host's VMM neither runs the guest nor ever will, whatever becomes of the daemon.
    pub(super) fn has_nothing(&self) -> bool {
        match self.vmm {
            Vmm::Ended | Vmm::Discarded => true,
            Vmm::Incoming => self.role.is_none_or(|role| role.is_over()),
            _ => false,
        }
    }

    /// Other contents that a damaged journal may have.
    pub(super) fn damages(&self) -> impl Iterator<Item = Option<Record>> {
        let before = RECORDS.into_iter().filter(|record| self.past & record_bit(*record) != 0).map(Some);
        before.chain([None]).filter(|found| *found != self.journal)
    }

    pub(super) fn hear(&mut self, event: Event) {
        if self.up {
            self.inbox.push(event);
        }
    }
}
/// In the order of their bits in [`Host::arriving`].
pub(super) const MESSAGES: [Message; 15] = [
    Message::Offer,
    Message::Accept,
    Message::Refuse,
    Message::Ready,
    Message::Commit,
    Message::Running,
    Message::Recovering,
    Message::Fetching,
    Message::Lost,
    Message::Declined,
    Message::Done,
    Message::Gone,
    Message::Abort,
    Message::Withdraw,
    Message::Unknown,
];

const RECORDS: [Record; 9] = [
    Record::Leaving,
    Record::Committed,
    Record::Finished,
    Record::Lost,
    Record::GivenUp,
    Record::TakenBack,
    Record::Prepared,
    Record::Running,
    Record::Declined,
];

pub(super) fn record_bit(record: Record) -> u16 {
    let index = RECORDS.iter().position(|&known| known == record);
    1 << index.expect("every record is listed")
}

pub(super) fn bit(message: Message) -> u16 {
    let index = MESSAGES.iter().position(|&known| known == message);
    1 << index.expect("every message is listed")
}
