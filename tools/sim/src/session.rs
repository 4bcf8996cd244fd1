//! One side of a migration: the real state machine decides, and this does it. It is a model of `drive.rs` and
//! `effects.rs` of `daemon/migrate`: one thing at a time, and while it lasts, what else happens waits.

use std::collections::VecDeque;
use std::time::Duration;

use memlane_protocol::handover::{Action, Destination, Event as Told, Message, Phase, Record, Source};

use crate::channel::{Channel, Reunion, Suspension};
use crate::destination::DestinationWork;
use crate::event::{HostId, MigrationId};
use crate::fetch::Postcopy;
use crate::lane::Sender;
use crate::serve::Serving;
use crate::source::SourceWork;
use crate::vmm::{Asker, Bond};

/// What a daemon's configuration says of the wait for another connection, where the source has not said it.
const DEFAULT_PATIENCE: Duration = Duration::from_secs(30);

/// One side of a migration.
#[derive(Debug)]
pub(crate) struct Session {
    pub migration: MigrationId,
    pub machine: Machine,
    /// What the journal has.
    pub record: Option<Record>,
    pub fetching: bool,
    /// The migration's own connection, while it lasts.
    pub link: Option<Channel>,
    /// Another connection is waited for.
    pub suspension: Option<Suspension>,
    /// Another connection is waited for this long.
    pub patience: Duration,
    pub vmm: usize,
    /// The VMM's connection that this session uses.
    pub attachment: u64,
    pub reach: Reach,
    /// The answer to the word that is dealt with goes over this connection.
    pub reply: Option<usize>,
    pub unanswered: Option<Action>,
    pub unanswered_since: Duration,
    pub told_to_run: bool,
    pub resumed: bool,
    /// Some of the guest's pages are, or were, to be placed by this daemon.
    pub placing: bool,
    /// What is missing of the guest could not be found out.
    pub unknown_pages: bool,
    /// A word is on its way over this connection, or one that is being dialled.
    pub exchanging: Option<Option<usize>>,
    /// By this time the pause must have come to the commit.
    pub commit_by: Option<Duration>,
    pub todo: VecDeque<Action>,
    pub left: Vec<Action>,
    pub applying: bool,
    pub busy: Option<(u64, Busy)>,
    pub events: VecDeque<Told>,
    pub inputs: VecDeque<Input>,
    /// The pause, as far as the journal took part in it.
    pub journal_time: Duration,
    pub resume_time: Duration,
    pub load_time: Duration,
    pub busy_since: Duration,
    pub moment_due: Duration,
    pub moment_planned: bool,
    pub role: Role,
    pub serving: Option<Serving>,
    pub postcopy: Postcopy,
    pub over: bool,
}

#[derive(Debug)]
pub(crate) enum Machine {
    Source(Source),
    Destination(Destination),
}

/// What a side does besides.
#[derive(Debug)]
pub(crate) enum Role {
    Source(Box<SourceWork>),
    Destination(Box<DestinationWork>),
    /// The daemon was restarted: it only settles who owns the guest, and serves.
    Recovery {
        serve: bool,
    },
}

/// Whether the VMM can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    Attached,
    Away,
    Ended,
    Released,
}

/// What is waited for before anything else is done.
#[derive(Debug)]
pub(crate) enum Busy {
    Journal(Record),
    Forget,
    /// The VMM was told this; whether it may have been told to run before.
    Vmm(Action, bool),
    /// The destination does what the source said, or what the handover of pages needs.
    Destination(crate::destination::Work),
    /// The journal notes that nothing is missing any more.
    Whole,
    /// A planted fault.
    ForEver,
    /// The VMM, which was there all the time or `returns`, is asked for the userfaultfd that it keeps.
    Reopen {
        returns: bool,
    },
}

/// Something that a session deals with when it has time.
#[derive(Debug)]
pub(crate) enum Input {
    Heard { connection: usize, bytes: Vec<u8> },
    LinkLost(usize),
    Reunion(Reunion),
    Word { message: Message, reply: Option<usize> },
    VmmLost,
    VmmEnded,
    VmmBack,
    Cancel,
    Abandon,
    Moment,
    FetchLink(usize),
}

impl Machine {
    pub(crate) fn on(&mut self, event: Told) -> Vec<Action> {
        match self {
            Self::Source(source) => source.on(event),
            Self::Destination(destination) => destination.on(event),
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        match self {
            Self::Source(source) => source.phase(),
            Self::Destination(destination) => destination.phase(),
        }
    }

    fn is_over(&self) -> bool {
        match self {
            Self::Source(source) => source.is_over(),
            Self::Destination(destination) => destination.is_over(),
        }
    }

    pub(crate) fn can_abandon(&self) -> bool {
        match self {
            Self::Source(source) => source.can_abandon(),
            Self::Destination(destination) => destination.can_abandon(),
        }
    }

    pub(crate) fn can_cancel(&self) -> bool {
        matches!(self, Self::Source(source) if source.can_cancel())
    }

    pub(crate) fn is_source(&self) -> bool {
        matches!(self, Self::Source(_))
    }
}

impl Session {
    pub(crate) fn new(migration: MigrationId, machine: Machine, vmm: usize, role: Role) -> Self {
        Self {
            migration,
            machine,
            record: None,
            fetching: false,
            link: None,
            suspension: None,
            patience: DEFAULT_PATIENCE,
            vmm,
            attachment: 0,
            reach: Reach::Attached,
            reply: None,
            unanswered: None,
            unanswered_since: Duration::ZERO,
            told_to_run: false,
            resumed: false,
            placing: false,
            unknown_pages: false,
            exchanging: None,
            commit_by: None,
            todo: VecDeque::new(),
            left: Vec::new(),
            applying: false,
            busy: None,
            events: VecDeque::new(),
            inputs: VecDeque::new(),
            journal_time: Duration::ZERO,
            resume_time: Duration::ZERO,
            load_time: Duration::ZERO,
            busy_since: Duration::ZERO,
            moment_due: Duration::ZERO,
            moment_planned: false,
            role,
            serving: None,
            postcopy: Postcopy::default(),
            over: false,
        }
    }

    /// Makes a session of a daemon that was restarted, which begins with `actions`.
    pub(crate) fn recovered(self, record: Option<Record>, fetching: bool, actions: Vec<Action>) -> Self {
        let told_to_run = record == Some(Record::Running);
        Self { record, fetching, told_to_run, todo: actions.into(), applying: true, ..self }
    }

    /// Has the session deal with something when it has time.
    pub(crate) fn input(&mut self, input: Input) {
        self.inputs.push_back(input);
    }

    /// Has the machine hear of an event next.
    pub(crate) fn event(&mut self, event: Told) {
        self.events.push_back(event);
    }

    /// Returns what sends pages in this session, while it is before the handover.
    pub(crate) fn sender_mut(&mut self) -> Option<&mut Sender> {
        match &mut self.role {
            Role::Source(work) => Some(&mut work.sender),
            _ => None,
        }
    }

    pub(crate) fn asker(&self, host: HostId, ticket: u64) -> Asker {
        Asker { host, migration: self.migration, attachment: self.attachment, ticket }
    }

    pub(crate) fn bond(&self) -> Bond {
        Bond { migration: self.migration, fetching: self.fetching }
    }

    /// Tells whether the migration's own connection is this one.
    pub(crate) fn is_over_connection(&self, connection: usize) -> bool {
        self.link.as_ref().is_some_and(|channel| channel.connection == Some(connection))
    }

    /// Tells whether the guest lacks pages, and only a daemon that is no more knew which.
    pub(crate) fn cannot_be_whole(&self) -> bool {
        self.fetching && !self.placing && self.unknown_pages
    }

    pub(crate) fn is_done(&self) -> bool {
        let owes = matches!(self.role, Role::Recovery { .. })
            && self.unanswered == Some(Action::Discard)
            && self.reach == Reach::Away
            && self.fetching;
        self.machine.is_over() && !owes
    }

    /// Says what is waited for, for whoever wonders why.
    pub(crate) fn waits_for(&self) -> String {
        let Self { busy, unanswered, exchanging, suspension, serving, postcopy, .. } = self;
        format!(
            "busy {busy:?}, unanswered {unanswered:?}, exchanging {exchanging:?}, suspended {}, serving {}, fetching {}",
            suspension.is_some(),
            serving.is_some(),
            postcopy.fetching.is_some()
        )
    }

    /// Returns how many pages are missing, and to be placed by this daemon.
    pub(crate) fn remaining(&self) -> u64 {
        self.postcopy.fetching.as_ref().map_or(0, |fetching| fetching.missing.count())
    }

    /// Returns the event that the guest runs here. That all of its memory is here is said when it is noted.
    pub(crate) fn resumed(&self) -> Told {
        if self.postcopy.fetching.is_some() { Told::ResumedIncomplete } else { Told::Resumed }
    }

    /// Returns what it means that the VMM has ended.
    pub(crate) fn ended(&self) -> Told {
        match self.record {
            Some(Record::Running) if !self.told_to_run => Told::ResumeFailed,
            _ => Told::VmmGone,
        }
    }
}

/// Returns a migration's number as the identity that messages carry.
pub(crate) fn identity(migration: MigrationId) -> [u8; 16] {
    let mut identity = [0; 16];
    identity[..4].copy_from_slice(&migration.to_le_bytes());
    identity
}
