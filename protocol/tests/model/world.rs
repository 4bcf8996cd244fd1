//! Two hosts and a network, as far as a handover can tell.

use memlane_protocol::handover::{Action, Destination, Event, Message, Phase, Record, Resolution, Source};

mod host;
mod memory;
mod steps;

use host::{Half, Host, Vmm, bit, record_bit};
use memory::{Fetch, Memory};
pub use steps::Step;

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
    /// The guest is resumed before all of its memory is there.
    pub postcopy: bool,
    /// An operator no longer waits for the other host while that guest fetches.
    pub abandon: bool,
    /// A journal is found damaged at a restart: its end, or all of it, is lost.
    pub damage: u8,
    /// A host burns.
    pub burn: u8,
    /// Operators resolve what is in doubt, as often as they like: they run the guest here where that is
    /// right, or discard what is here where the guest is seen to run there;
    pub resolve: bool,
    /// and they discard it anywhere.
    pub discard: bool,
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
    /// The destination says that the last page is there when it is not.
    CompleteTooEarly,
    /// A restarted destination takes a guest that lacks pages for one that has all,
    ForgetsMissing,
    /// or one that has all for one that lacks pages,
    ForgetsComplete,
    /// or starts a guest of which it does not know which pages it lacks,
    RunsWithHoles,
    /// or takes a guest that it cannot start, and never has, for one that is lost.
    LosesWhatNeverRan,
    /// The destination gives a guest up, and would fetch again after a crash.
    GivesUpWithoutTrace,
    /// The source takes `Fetching` for `Running`.
    FetchingIsRunning,
    /// The source frees the memory when the connection is lost.
    FreesOnPeerLost,
    /// A restarted source does not serve again,
    ServesNotAfterCrash,
    /// or does not say that it has nothing to serve any more.
    ServesWhatIsDropped,
    /// A daemon takes the word of another VMM for that of the one it told.
    BelievesStrangers,
    /// A restarted source resumes a relinquished VMM of which the journal does not say that it was
    /// committed,
    ResumesOnAGuess,
    /// or takes the guest back because the other host knows nothing of it.
    UnknownIsDeclined,
    /// The operator says that the other host is off when it is not.
    PromisesWhatIsNotTrue,
    /// A restarted destination says of a VMM that runs the guest that it waits for word.
    TakesRunningForLoaded,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    Source,
    Destination,
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
    /// A journal has lost something,
    damaged: bool,
    /// and the destination's that the guest ran there.
    forgot_running: bool,
    /// An operator has had it run: what became of it elsewhere was accepted.
    run_by_order: bool,
    /// An operator has given up what was at one host.
    given_up: bool,
    fetch: Fetch,
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
            damaged: false,
            forgot_running: false,
            run_by_order: false,
            given_up: false,
            fetch: Fetch::new(),
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
            _ if self.run_by_order => self.memory_violation()?,
            (Vmm::Running, Vmm::Ended | Vmm::Discarded) if self.forgot_running => self.memory_violation()?,
            (Vmm::Running, _) if self.destination_ran => "the source runs what the destination has run",
            (_, Vmm::Running) if self.stale => "the destination runs what the source ran on with",
            _ => self.memory_violation()?,
        };
        Some(wrong.to_owned())
    }

    /// If everything has come to rest well: where the guest runs, or nowhere because its VMM
    /// ended while it had the guest, or runs what is no guest any more.
    pub fn good_end(&self) -> Option<Option<Side>> {
        if self.source.burned || self.destination.burned {
            return self.end_of_survivor();
        }
        if self.damaged && self.source.is_quiet() && self.source.phase() == Some(Phase::Fetching) {
            // One of them does not know any more who fetches: an operator sees it, and abandons that.
            let over = self.destination.half.is_none_or(|half| half.is_over());
            return (over && self.destination.is_quiet()).then_some(None);
        }
        if !self.source.at_rest() || !self.destination.at_rest() {
            return None;
        }
        match (self.source.vmm, self.destination.vmm) {
            (Vmm::Running, Vmm::Incoming | Vmm::Discarded | Vmm::Ended) => Some(Some(Side::Source)),
            (Vmm::Discarded | Vmm::Ended, Vmm::Running) => match self.fetch.memory {
                Memory::Whole => Some(Some(Side::Destination)),
                Memory::Hopeless => Some(None),
                Memory::Missing => {
                    let given_up = self.given_up || self.run_by_order || self.fetch.given_up_at_source;
                    (given_up && self.destination.half.is_none()).then_some(None)
                }
            },
            (Vmm::Ended, Vmm::Incoming | Vmm::Discarded | Vmm::Ended) => Some(None),
            (Vmm::Discarded, Vmm::Ended) if self.running_recorded => Some(None),
            (Vmm::Discarded, Vmm::Incoming | Vmm::Discarded | Vmm::Ended) if self.given_up => Some(None),
            _ => None,
        }
    }

    /// The other host has burned: this one goes on saying what nobody hears.
    fn end_of_survivor(&self) -> Option<Option<Side>> {
        let side = if self.source.burned { Side::Destination } else { Side::Source };
        let host = self.host(side);
        if host.burned {
            return Some(None);
        }
        if !host.is_quiet() || host.half.is_some_and(|half| half.can_resolve()) {
            return None;
        }
        let whole = side == Side::Source || self.fetch.memory == Memory::Whole;
        let waits = host.phase() == Some(Phase::Fetching);
        match host.vmm {
            Vmm::Running if whole => Some(Some(side)),
            Vmm::Running | Vmm::Incoming | Vmm::Discarded | Vmm::Ended => Some(None),
            // An operator abandons what nobody fetches any more.
            Vmm::Relinquished if waits => Some(None),
            Vmm::Relinquished | Vmm::Loaded | Vmm::Paused => None,
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
            Step::Local { at, event: Event::Abandoned } => self.give_up(at),
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
                if self.budget.postcopy {
                    self.fetch.memory = Memory::Missing;
                }
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
            Step::Fetch => self.fetch_the_rest(),
            Step::Crash(at) => {
                self.budget.crashes -= 1;
                let host = self.host_mut(at);
                host.up = false;
                host.half = None;
                host.orphaned = host.vmm == Vmm::Paused;
                host.writes.clear();
                host.commands.clear();
                host.inbox.clear();
                self.lose_memory();
            }
            Step::Restart { at, forgetful, damaged } => {
                if forgetful {
                    self.give_up_missing();
                }
                if let Some(found) = damaged {
                    self.budget.damage -= 1;
                    self.damaged = true;
                    let host = self.host_mut(at);
                    host.journal = found;
                    self.forgot_running |= host.past & record_bit(Record::Running) != 0;
                }
                self.restart(at);
            }
            Step::Attach(at) => self.take_up(at, None),
            Step::Burn(at) => {
                self.budget.burn -= 1;
                *self.host_mut(at) = Host { up: false, burned: true, ..Host::new(Vmm::Ended) };
                self.lose_memory();
            }
            Step::Resolve { at, resolution, .. } => {
                match resolution {
                    Resolution::RunHere => self.run_by_order = true,
                    Resolution::Discard => {
                        self.given_up = true;
                        self.fetch.given_up_at_source |= at == Side::Source;
                    }
                }
                self.tell(at, Event::Resolved(resolution));
            }
            Step::Stranger(at) => {
                let answer = match self.host_mut(at).commands.remove(0) {
                    Action::Relinquish => Event::Relinquished,
                    Action::Resume => Event::Resumed,
                    _ => Event::Discarded,
                };
                self.host_mut(at).hear(answer);
            }
            Step::VmmEnds(at) => {
                self.budget.vmm -= 1;
                let host = self.host_mut(at);
                host.vmm = Vmm::Ended;
                host.orphaned = false;
                host.hear(Event::VmmGone);
                self.lose_memory();
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
            let heard = match (self.fault, message) {
                (Fault::FetchingIsRunning, Message::Fetching) => Message::Running,
                (Fault::UnknownIsDeclined, Message::Unknown) => Message::Declined,
                _ => message,
            };
            return self.tell(to, Event::Message(heard));
        }
        let answer = match to {
            // A daemon that has just started waits for VMMs to attach before it says so.
            Side::Source if self.source.vmm == Vmm::Relinquished => None,
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
                Action::Serve => self.serve(),
                Action::Report(outcome) => self.report(at, outcome),
                Action::Copy => {}
            }
            let host = self.host(at);
            assert!(host.writes.len() + host.commands.len() < 12, "the same is asked for without end");
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
                    host.past |= record_bit(record);
                }
                host.hear(Event::Journalled(record));
                self.running_recorded |= record == Record::Running;
            }
            _ => host.journal = None,
        }
    }

    fn source_vmm_obeys(&mut self, fails: bool) {
        let command = self.source.commands.remove(0);
        self.fetch.served &= command != Action::Discard;
        if matches!(self.source.vmm, Vmm::Ended | Vmm::Discarded) {
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
        let (again, for_the_first_time) = (self.resumed(true), self.resumed(false));
        let fault = self.fault;
        let host = &mut self.destination;
        let command = host.commands.remove(0);
        match (command, host.vmm) {
            (_, Vmm::Ended | Vmm::Discarded) => host.hear(Event::VmmGone),
            (Action::Resume, Vmm::Running) => host.hear(again),
            (Action::Resume, Vmm::Loaded) if fails => {
                host.hear(Event::ResumeFailed);
                self.budget.vmm -= 1;
            }
            (Action::Resume, Vmm::Loaded) if for_the_first_time == Event::Abandoned => {
                host.hear(match fault {
                    Fault::LosesWhatNeverRan => Event::Abandoned,
                    _ => Event::ResumeFailed,
                });
            }
            (Action::Resume, Vmm::Loaded) => {
                host.vmm = Vmm::Running;
                host.hear(for_the_first_time);
                self.destination_ran = true;
            }
            (Action::Resume, vmm) => panic!("a VMM that is {vmm:?} was told to run"),
            _ => {
                host.vmm = Vmm::Discarded;
                host.hear(Event::Discarded);
            }
        }
    }

    fn restart(&mut self, at: Side) {
        self.host_mut(at).up = true;
        if let record @ Some(_) = self.host(at).journal {
            self.take_up(at, record);
        }
    }

    /// Takes up what the journal holds; without a record, what a VMM says.
    fn take_up(&mut self, at: Side, record: Option<Record>) {
        let vmm = self.host(at).vmm;
        let guesses = self.fault == Fault::ResumesOnAGuess && record != Some(Record::Committed);
        let (half, actions, news) = match at {
            Side::Source => {
                let found = if guesses && record.is_none() { Some(Record::Leaving) } else { record };
                let (half, actions) = Source::recover(found).expect("the source wrote it");
                let news = match vmm {
                    Vmm::Relinquished if guesses => Some(Event::Owned),
                    Vmm::Relinquished => Some(Event::Waits),
                    // Of a VMM that was committed, only that it runs shows that it was taken back.
                    Vmm::Paused if record == Some(Record::Committed) => None,
                    _ => Some(Event::Owned),
                };
                (Half::Source(half), actions, news)
            }
            Side::Destination => {
                let (half, actions) = Destination::recover(record).expect("the destination wrote it");
                let runs = vmm == Vmm::Running && self.fault != Fault::TakesRunningForLoaded;
                let news = if runs { Event::Owned } else { Event::Waits };
                (Half::Destination(half), actions, Some(news))
            }
        };
        let host = self.host_mut(at);
        host.half = Some(half);
        if matches!(vmm, Vmm::Ended | Vmm::Discarded) {
            host.hear(Event::VmmGone);
        } else if let Some(news) = news {
            host.hear(news);
        }
        self.carry_out(at, actions);
        let prepared = at == Side::Destination && record == Some(Record::Prepared);
        if prepared && self.is_hopeless() && self.fault != Fault::LosesWhatNeverRan {
            self.tell(at, Event::ResumeFailed);
        }
    }

    fn cheat_on_peer_lost(&mut self, at: Side) {
        match (self.fault, at) {
            (Fault::ResumeOnPeerLost, Side::Source) if self.source.journal == Some(Record::Committed) => {
                self.source_runs();
            }
            (Fault::FreesOnPeerLost, Side::Source) if self.source.phase() == Some(Phase::Fetching) => {
                self.source.vmm = Vmm::Discarded;
            }
            (Fault::GiveUpInDoubt, Side::Destination)
                if self.destination.journal == Some(Record::Prepared) =>
            {
                (self.destination.journal, self.destination.half) = (None, None);
                self.destination.vmm = Vmm::Discarded;
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
