//! Two hosts and a network, as far as a handover can tell.

use memlane_protocol::handover::{Action, Destination, Event, Message, Phase, Record, Source};

/// How much may go wrong on one path. Loss, doubling and reordering of messages and lost
/// connections are not counted: they may always happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Budget {
    /// A daemon crashes.
    pub crashes: u8,
    /// A VMM ends, loses its connection, or cannot load or resume.
    pub vmm: u8,
    /// A journal refuses a record.
    pub journal: u8,
    /// The operator cancels.
    pub cancel: bool,
}

/// What a cheating daemon or VMM does wrong, all the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    None,
    /// Says that this record is durable when it is not.
    NotDurable(Record),
    /// The VMM says that it is relinquished, and would still resume by itself.
    NotRelinquished,
    /// The source forgets a finished migration while its VMM is still there.
    ForgetBeforeDiscard,
    /// The source resumes the guest when the connection is lost after the commit.
    ResumeOnPeerLost,
    /// The source sends the state of a guest that still runs.
    SentBeforePause,
    /// The destination discards a prepared guest when the connection is lost.
    GiveUpInDoubt,
    /// Nothing is ever sent again.
    NeverRepeat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    Source,
    Destination,
}

/// One thing that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// A message arrives, and may arrive again.
    Deliver {
        to: Side,
        message: Message,
    },
    /// Whatever is on its way is lost.
    LoseAll,
    /// The journal gets to the next write.
    Write {
        at: Side,
        fails: bool,
    },
    /// The VMM gets to the next command.
    Obey {
        at: Side,
        fails: bool,
    },
    /// The daemon hears from its journal or VMM.
    Hear {
        at: Side,
        event: Event,
    },
    /// The daemon notices something, or decides, by itself.
    Local {
        at: Side,
        event: Event,
    },
    /// The source has sent the last pages and the state.
    Capture,
    /// The destination's VMM loads them.
    Load {
        fails: bool,
    },
    Crash(Side),
    Restart(Side),
    VmmEnds(Side),
    /// The source's VMM loses its connection to a daemon that lives.
    VmmDisconnects,
    /// A paused VMM whose daemon went away resumes.
    VmmResumesByItself,
}

impl Step {
    /// Whether it needs no further trouble to happen.
    pub fn is_fair(self) -> bool {
        match self {
            Self::LoseAll | Self::Crash(_) | Self::VmmEnds(_) | Self::VmmDisconnects => false,
            Self::Write { fails, .. } | Self::Obey { fails, .. } | Self::Load { fails } => !fails,
            Self::Local { event, .. } => event != Event::Cancel,
            _ => true,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Vmm {
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
enum Half {
    Source(Source),
    Destination(Destination),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Host {
    up: bool,
    /// None: the daemon is down, or knows nothing of the migration.
    half: Option<Half>,
    journal: Option<Record>,
    vmm: Vmm,
    /// The VMM has lost its daemon and not acted on it yet.
    orphaned: bool,
    /// What has been asked of the journal and of the VMM, and what the daemon is to hear.
    writes: Vec<Action>,
    commands: Vec<Action>,
    inbox: Vec<Event>,
    /// Messages on their way to this host, one bit each.
    arriving: u16,
}

/// A state of everything.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    source: Host,
    destination: Host,
    budget: Budget,
    fault: Fault,
    offered: bool,
    captured: bool,
    /// The guest ran on at the source after its state was captured.
    stale: bool,
    destination_ran: bool,
    /// `Running` was durable at the destination once.
    running_recorded: bool,
}

const MESSAGES: [Message; 9] = [
    Message::Offer,
    Message::Accept,
    Message::Refuse,
    Message::Ready,
    Message::Commit,
    Message::Running,
    Message::Declined,
    Message::Done,
    Message::Abort,
];

impl Half {
    fn on(&mut self, event: Event) -> Vec<Action> {
        match self {
            Self::Source(source) => source.on(event),
            Self::Destination(destination) => destination.on(event),
        }
    }

    fn phase(&self) -> Phase {
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
}

impl Host {
    fn new(vmm: Vmm) -> Self {
        Self {
            up: true,
            half: None,
            journal: None,
            vmm,
            orphaned: false,
            writes: Vec::new(),
            commands: Vec::new(),
            inbox: Vec::new(),
            arriving: 0,
        }
    }

    fn phase(&self) -> Option<Phase> {
        self.half.map(|half| half.phase())
    }

    fn at_rest(&self) -> bool {
        self.up
            && self.half.is_none_or(|half| half.is_over())
            && self.journal.is_none()
            && self.writes.is_empty()
            && self.commands.is_empty()
            && self.inbox.is_empty()
    }

    fn hear(&mut self, event: Event) {
        if self.up {
            self.inbox.push(event);
        }
    }
}

impl World {
    /// A guest at the source, an incoming VMM at the destination, and an order to move.
    pub fn new(budget: Budget, fault: Fault) -> Self {
        let mut world = Self {
            source: Host::new(Vmm::Running),
            destination: Host::new(Vmm::Incoming),
            budget,
            fault,
            offered: false,
            captured: false,
            stale: false,
            destination_ran: false,
            running_recorded: false,
        };
        let (source, actions) = Source::new();
        world.source.half = Some(Half::Source(source));
        world.carry_out(Side::Source, actions);
        world
    }

    /// What must never be.
    pub fn violation(&self) -> Option<String> {
        let (source, destination) = (self.source.vmm, self.destination.vmm);
        let wrong = match (source, destination) {
            (Vmm::Running, Vmm::Running) => "both hosts run the guest",
            (Vmm::Paused, Vmm::Running) => "the source may resume by itself what the destination runs",
            (Vmm::Running, _) if self.destination_ran => "the source runs what the destination has run",
            (_, Vmm::Running) if self.stale => "the destination runs what the source ran on with",
            _ => return None,
        };
        Some(wrong.to_owned())
    }

    /// If everything has come to rest well: where the guest runs, or nowhere because its VMM
    /// ended while it had the guest.
    pub fn good_end(&self) -> Option<Option<Side>> {
        if !self.source.at_rest() || !self.destination.at_rest() {
            return None;
        }
        match (self.source.vmm, self.destination.vmm) {
            (Vmm::Running, Vmm::Incoming | Vmm::Discarded | Vmm::Ended) => Some(Some(Side::Source)),
            (Vmm::Discarded | Vmm::Ended, Vmm::Running) => Some(Some(Side::Destination)),
            (Vmm::Ended, Vmm::Incoming | Vmm::Discarded | Vmm::Ended) => Some(None),
            (Vmm::Discarded, Vmm::Ended) if self.running_recorded => Some(None),
            _ => None,
        }
    }

    /// Everything that can happen next, and what comes of it.
    pub fn steps(&self) -> Vec<(Step, Self)> {
        let mut steps = Vec::new();
        for side in [Side::Source, Side::Destination] {
            self.host_steps(side, &mut steps);
        }
        self.guest_steps(&mut steps);
        let mut after = Vec::with_capacity(steps.len());
        for step in steps {
            let mut world = self.clone();
            world.take(step);
            after.push((step, world));
        }
        after
    }

    fn host_steps(&self, at: Side, steps: &mut Vec<Step>) {
        let host = self.host(at);
        for (bit, message) in MESSAGES.into_iter().enumerate() {
            if host.up && host.arriving >> bit & 1 == 1 {
                steps.push(Step::Deliver { to: at, message });
            }
        }
        if let Some(write) = host.writes.first() {
            steps.push(Step::Write { at, fails: false });
            if self.budget.journal > 0 && *write != Action::Forget {
                steps.push(Step::Write { at, fails: true });
            }
        }
        if let Some(command) = host.commands.first() {
            steps.push(Step::Obey { at, fails: false });
            let stands = matches!(host.vmm, Vmm::Loaded | Vmm::Paused | Vmm::Relinquished);
            if self.budget.vmm > 0 && *command == Action::Resume && stands {
                steps.push(Step::Obey { at, fails: true });
            }
        }
        steps.extend(host.inbox.iter().map(|&event| Step::Hear { at, event }));
        if host.half.is_some_and(|half| !half.is_over()) {
            if self.fault != Fault::NeverRepeat {
                steps.push(Step::Local { at, event: Event::Tick });
            }
            steps.push(Step::Local { at, event: Event::PeerLost });
        }
        if !host.up {
            steps.push(Step::Restart(at));
        } else if self.budget.crashes > 0 {
            steps.push(Step::Crash(at));
        }
        if !matches!(host.vmm, Vmm::Discarded | Vmm::Ended) && self.budget.vmm > 0 {
            steps.push(Step::VmmEnds(at));
        }
    }

    fn guest_steps(&self, steps: &mut Vec<Step>) {
        let (source, destination) = (&self.source, &self.destination);
        if source.arriving | destination.arriving != 0 {
            steps.push(Step::LoseAll);
        }
        if self.budget.cancel && source.half.is_some() {
            steps.push(Step::Local { at: Side::Source, event: Event::Cancel });
        }
        match source.phase() {
            Some(Phase::Copying) => {
                steps.push(Step::Local { at: Side::Source, event: Event::SwitchOver });
            }
            Some(Phase::SwitchingOver) => {
                let ready = source.vmm == Vmm::Paused
                    || self.fault == Fault::SentBeforePause && source.vmm == Vmm::Running;
                if ready && !self.captured {
                    steps.push(Step::Capture);
                }
            }
            _ => {}
        }
        match destination.phase() {
            Some(Phase::Offering) => {
                steps.push(Step::Local { at: Side::Destination, event: Event::Accepted });
                steps.push(Step::Local { at: Side::Destination, event: Event::Refused });
            }
            Some(Phase::Copying) if self.captured && destination.vmm == Vmm::Incoming => {
                steps.push(Step::Load { fails: false });
                if self.budget.vmm > 0 {
                    steps.push(Step::Load { fails: true });
                }
            }
            _ => {}
        }
        if source.vmm == Vmm::Paused {
            if source.orphaned {
                steps.push(Step::VmmResumesByItself);
            } else if source.up && self.budget.vmm > 0 {
                steps.push(Step::VmmDisconnects);
            }
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Deliver { to, message } => self.deliver(to, message),
            Step::LoseAll => {
                self.source.arriving = 0;
                self.destination.arriving = 0;
            }
            Step::Write { at, fails } => self.write(at, fails),
            Step::Obey { at: Side::Source, fails } => self.source_vmm_obeys(fails),
            Step::Obey { at: Side::Destination, fails } => self.destination_vmm_obeys(fails),
            Step::Hear { at, event } => {
                let inbox = &mut self.host_mut(at).inbox;
                let index = inbox.iter().position(|&heard| heard == event).expect("it was offered");
                inbox.remove(index);
                self.tell(at, event);
            }
            Step::Local { at, event } => {
                if event == Event::Cancel {
                    self.budget.cancel = false;
                }
                if event == Event::PeerLost {
                    self.cheat_on_peer_lost(at);
                }
                self.tell(at, event);
            }
            Step::Capture => {
                self.captured = true;
                self.stale = self.source.vmm == Vmm::Running;
                self.source.hear(Event::Sent);
            }
            Step::Load { fails: true } => {
                self.budget.vmm -= 1;
                self.destination.hear(Event::Failed);
            }
            Step::Load { fails: false } => {
                self.destination.vmm = Vmm::Loaded;
                self.destination.hear(Event::Loaded);
            }
            Step::Crash(at) => {
                self.budget.crashes -= 1;
                let host = self.host_mut(at);
                host.up = false;
                host.half = None;
                host.orphaned = host.vmm == Vmm::Paused;
                host.writes.clear();
                host.commands.clear();
                host.inbox.clear();
            }
            Step::Restart(at) => self.restart(at),
            Step::VmmEnds(at) => {
                self.budget.vmm -= 1;
                let host = self.host_mut(at);
                host.vmm = Vmm::Ended;
                host.orphaned = false;
                host.hear(Event::VmmGone);
            }
            Step::VmmDisconnects => {
                self.budget.vmm -= 1;
                self.source_runs();
                self.source.hear(Event::Failed);
            }
            Step::VmmResumesByItself => self.source_runs(),
        }
    }

    fn deliver(&mut self, to: Side, message: Message) {
        if self.host(to).half.is_some() {
            return self.tell(to, Event::Message(message));
        }
        let answer = match to {
            Side::Source => Source::answer_unknown(message),
            Side::Destination if message == Message::Offer && !self.offered => {
                self.offered = true;
                self.destination.half = Some(Half::Destination(Destination::new()));
                return;
            }
            Side::Destination => Destination::answer_unknown(message),
        };
        self.carry_out(to, answer.map(Action::Send).into_iter().collect());
    }

    fn tell(&mut self, at: Side, event: Event) {
        if let Some(half) = &mut self.host_mut(at).half {
            let actions = half.on(event);
            self.carry_out(at, actions);
        }
    }

    fn carry_out(&mut self, at: Side, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send(message) => self.host_mut(other(at)).arriving |= bit(message),
                Action::Journal(_) | Action::Forget => self.host_mut(at).writes.push(action),
                Action::Pause | Action::Relinquish | Action::Resume | Action::Discard => {
                    if self.fault == Fault::ForgetBeforeDiscard && action == Action::Discard {
                        self.host_mut(at).journal = None;
                    }
                    self.host_mut(at).commands.push(action);
                }
                Action::Copy | Action::Report(_) => {}
            }
        }
    }

    fn write(&mut self, at: Side, fails: bool) {
        let fault = self.fault;
        let host = self.host_mut(at);
        match host.writes.remove(0) {
            Action::Journal(record) if fails => {
                host.hear(Event::JournalFailed(record));
                self.budget.journal -= 1;
            }
            Action::Journal(record) => {
                if fault != Fault::NotDurable(record) {
                    host.journal = Some(record);
                }
                host.hear(Event::Journalled(record));
                self.running_recorded |= record == Record::Running;
            }
            _ => host.journal = None,
        }
    }

    fn source_vmm_obeys(&mut self, fails: bool) {
        let command = self.source.commands.remove(0);
        if self.source.vmm == Vmm::Ended {
            return self.source.hear(Event::VmmGone);
        }
        if fails {
            self.budget.vmm -= 1;
            return self.source.hear(Event::ResumeFailed);
        }
        match command {
            Action::Pause => self.source.vmm = Vmm::Paused,
            Action::Relinquish if self.source.vmm == Vmm::Paused => {
                if self.fault != Fault::NotRelinquished {
                    self.source.vmm = Vmm::Relinquished;
                }
                self.source.hear(Event::Relinquished);
            }
            Action::Relinquish => self.source.hear(Event::Failed),
            Action::Resume => {
                self.source_runs();
                self.source.hear(Event::Resumed);
            }
            _ => {
                self.source.vmm = Vmm::Discarded;
                self.source.hear(Event::Discarded);
            }
        }
    }

    fn source_runs(&mut self) {
        self.source.vmm = Vmm::Running;
        self.source.orphaned = false;
        self.stale |= self.captured;
    }

    fn destination_vmm_obeys(&mut self, fails: bool) {
        let host = &mut self.destination;
        let command = host.commands.remove(0);
        match (command, host.vmm) {
            (_, Vmm::Ended | Vmm::Discarded) => host.hear(Event::VmmGone),
            (Action::Resume, Vmm::Running) => host.hear(Event::Resumed),
            (Action::Resume, Vmm::Loaded) if !fails => {
                host.vmm = Vmm::Running;
                host.hear(Event::Resumed);
                self.destination_ran = true;
            }
            (Action::Resume, Vmm::Loaded) => {
                host.hear(Event::ResumeFailed);
                self.budget.vmm -= 1;
            }
            (Action::Resume, vmm) => panic!("a VMM that is {vmm:?} was told to run"),
            _ => {
                host.vmm = Vmm::Discarded;
                host.hear(Event::Discarded);
            }
        }
    }

    fn restart(&mut self, at: Side) {
        let host = self.host_mut(at);
        host.up = true;
        let record = host.journal;
        // With no record, only a VMM that waits for word gives cause to take anything up.
        let waits = matches!(host.vmm, Vmm::Incoming | Vmm::Loaded | Vmm::Paused | Vmm::Relinquished);
        if record.is_none() && !waits {
            return;
        }
        let (half, actions) = match at {
            Side::Source => {
                let (half, actions) = Source::recover(record).expect("the source wrote it");
                (Half::Source(half), actions)
            }
            Side::Destination => {
                let (half, actions) = Destination::recover(record).expect("the destination wrote it");
                (Half::Destination(half), actions)
            }
        };
        host.half = Some(half);
        if host.vmm == Vmm::Ended {
            host.hear(Event::VmmGone);
        }
        self.carry_out(at, actions);
    }

    fn cheat_on_peer_lost(&mut self, at: Side) {
        match (self.fault, at) {
            (Fault::ResumeOnPeerLost, Side::Source) if self.source.journal == Some(Record::Committed) => {
                self.source_runs();
            }
            (Fault::GiveUpInDoubt, Side::Destination)
                if self.destination.journal == Some(Record::Prepared) =>
            {
                self.destination.journal = None;
                let (half, actions) = Destination::recover(None).expect("nothing is a fine record");
                self.destination.half = Some(Half::Destination(half));
                self.carry_out(at, actions);
            }
            _ => {}
        }
    }

    fn host(&self, side: Side) -> &Host {
        match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        }
    }

    fn host_mut(&mut self, side: Side) -> &mut Host {
        match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        }
    }
}

fn other(side: Side) -> Side {
    match side {
        Side::Source => Side::Destination,
        Side::Destination => Side::Source,
    }
}

fn bit(message: Message) -> u16 {
    let index = MESSAGES.iter().position(|&known| known == message);
    1 << index.expect("every message is listed")
}
