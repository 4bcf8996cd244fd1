//! The effects are what is done of what the handover decides: to the VMM, in the journal, and in words to the other
//! host.

mod deadline;
mod doubt;
mod lost;
mod resume;
mod words;

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memlane_guest::{Claim, DriverError, Farewell, Guest, Process};
use memlane_lane::postcopy::PostcopyIncoming;
use memlane_net::announce::announce;
use memlane_net::journal::Entry;
use memlane_net::resumable::ResumableLink;
use memlane_net::task;
use memlane_protocol::handover::{Action, Event, Message, Record};
use memlane_protocol::wire::attach::RunState;
use tokio::sync::oneshot;
use tracing::{debug, error, info, warn};

use crate::context::Context;
use crate::fetch::Fetching;
use crate::handle::{Arrivals, MigrationHandle, Returned, unix_seconds};
use crate::machine::Machine;
use crate::progress::Role;
use crate::silence::Silence;
use crate::vmm::{Vmm, VmmNews};

pub(crate) use deadline::Deadline;
pub(crate) use resume::{Reunion, Suspension, refuse_to_resume};

/// This is the reason for which a migration fails whose VMM has ended.
const VMM_GONE: &str = "the guest's VMM is gone";

/// One side of a migration acts through this: on the guest here, the journal, and the other host.
pub(crate) struct Effects {
    /// This is the context that every migration of this host works with.
    pub context: Rc<Context>,
    /// This is the migration, as the journal names it.
    pub entry: Entry,
    /// This is the guest's VMM.
    pub vmm: Vmm,
    /// The claim keeps the guest from taking part in another migration.
    pub claim: Option<Claim>,
    /// This is the migration's own connection, while it lasts.
    pub link: Option<ResumableLink>,
    /// The migration's own connection is lost, and another one is waited for.
    pub suspension: Option<Suspension>,
    /// Another connection is waited for this long.
    pub patience: Duration,
    /// Through this others on this host see the migration.
    pub handle: Rc<MigrationHandle>,
    /// This brings what others on this host have for the migration.
    pub arrivals: Arrivals,
    /// The answer to the word that is being dealt with goes here, if the word came another way.
    pub reply: Option<oneshot::Sender<(Message, String)>>,
    /// This tells the operator why things went as they did.
    pub reason: Option<String>,
    /// If this is true, an earlier daemon of this host began the migration, which is the reason if there is no better one.
    pub taken_up: bool,
    /// If this is true, the VMM was gone before there was a reason.
    gone: bool,
    /// This is how the VMM has said that it ends.
    farewell: Option<Farewell>,
    /// If this is true, the guest has shut itself down, and runs nowhere.
    pub powered_off: bool,
    /// This is how long the steps took.
    pub times: Times,
    /// This is what of the guest's memory is missing here.
    pub placing: Option<Arc<PostcopyIncoming>>,
    /// This is what was fetched when an earlier daemon ended. The role takes it.
    pub reopened: Option<Fetching>,
    /// The machine is to hear of this event next.
    pub next: Option<Event>,
    /// If this is true, what is missing of the guest could not be found out any more.
    unknown_pages: bool,
    /// By this time the guest's pause must have come to the commit.
    pub commit_by: Option<Deadline>,
    /// The VMM was told this and has not answered, because its connection was lost.
    unanswered: Option<Action>,
    /// The VMM whose connection is lost has not answered since this moment.
    unanswered_since: Instant,
    /// If this is a process, the guest can never be whole here, and its VMM lives.
    lost: Option<Rc<Process>>,
    /// If this is true, the VMM may have heard that it is to let the guest run here.
    told_to_run: bool,
    /// If this is true, the migration has started the guest here.
    resumed: bool,
    /// This is true while a word is on its way over a connection of its own.
    exchanging: Rc<Cell<bool>>,
    /// This knows what came of the words that were sent over such connections.
    silence: Rc<Silence>,
}

/// These are the times that effects took on this host.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    /// Making records durable took this long.
    pub journal: Duration,
    /// Loading the VMM's state took this long.
    pub load: Duration,
    /// Letting the vCPUs run took this long.
    pub resume: Duration,
}

impl Effects {
    /// Makes the effects of a migration of the guest in `vmm`.
    pub(crate) fn new(
        context: Rc<Context>,
        entry: Entry,
        vmm: Vmm,
        claim: Option<Claim>,
        (link, (handle, arrivals)): (Option<ResumableLink>, (Rc<MigrationHandle>, Arrivals)),
    ) -> Self {
        // What an earlier daemon told the VMM is not known.
        let told_to_run = entry.record == Record::Running;
        let patience = context.limits().patience;
        Self {
            context,
            entry,
            vmm,
            claim,
            link,
            suspension: None,
            patience,
            handle,
            arrivals,
            reply: None,
            reason: None,
            taken_up: false,
            gone: false,
            farewell: None,
            powered_off: false,
            times: Times::default(),
            placing: None,
            reopened: None,
            next: None,
            unknown_pages: false,
            commit_by: None,
            unanswered: None,
            unanswered_since: Instant::now(),
            lost: None,
            told_to_run,
            resumed: false,
            exchanging: Rc::default(),
            silence: Rc::default(),
        }
    }

    /// Returns the guest, while its VMM is attached.
    pub(crate) fn guest(&self) -> Option<&Rc<Guest>> {
        match &self.vmm {
            Vmm::Attached(guest) => Some(guest),
            _ => None,
        }
    }

    /// Takes in what happened to the VMM. Returns the event that this is for the machine.
    pub(crate) async fn note_vmm(&mut self, news: VmmNews) -> Option<Event> {
        if std::mem::take(&mut self.gone) {
            self.reason = None;
        }
        if let Vmm::Attached(guest) = &self.vmm {
            self.farewell = guest.driver.farewell();
        }
        match news {
            VmmNews::Lost(process) => {
                // The kernel may take a while to end a process that was killed.
                let identity = process.identity();
                // A VMM may have as many threads as it likes.
                if task::aside(move || Process::exits(identity)).await {
                    info!(guest = %self.entry.guest, "the VMM is about to end");
                    self.blame(self.last_words());
                } else {
                    info!(guest = %self.entry.guest, "lost the connection to the VMM, which lives");
                    self.blame("the connection to the guest's VMM was lost");
                }
                if let Vmm::Attached(guest) = &self.vmm {
                    guest.end_stun();
                }
                self.vmm = Vmm::Away(process);
                self.unanswered_since = Instant::now();
                Some(Event::Failed)
            }
            VmmNews::Ended => {
                self.blame(self.last_words());
                self.vmm = Vmm::Ended;
                let event = self.ended();
                self.powered_off |= event == Event::PoweredOff;
                Some(event)
            }
            VmmNews::Back(Returned { guest, claim }) => {
                self.claim = claim.filter(|_| !self.handle.is_over());
                info!(guest = %self.entry.guest, "the VMM is back");
                self.reopen(&guest).await;
                let told = self.told_by(&guest);
                self.vmm = Vmm::Attached(guest);
                match self.unanswered.take() {
                    Some(action) => self.perform(action).await,
                    None => told,
                }
            }
        }
    }

    /// Returns how the VMM that is gone came to its end.
    fn last_words(&self) -> String {
        match &self.farewell {
            Some(Farewell::PoweredOff(did)) => format!("the guest {did} at {}", self.context.name()),
            Some(Farewell::Other(how)) => format!("{VMM_GONE}: {how}"),
            None => VMM_GONE.to_owned(),
        }
    }

    /// Returns why the guest's memory here can never be whole, if that is so.
    pub(crate) fn hopeless(&self) -> Option<String> {
        let lost = self.guest().and_then(|guest| guest.ram.check().err());
        let broken = || self.placing.as_ref().and_then(|placing| placing.broken().map(str::to_owned));
        lost.map(|lost| lost.to_string()).or_else(broken)
    }

    /// Frees the guest for another migration, since this one is over.
    pub(crate) fn release(&mut self) {
        self.claim = None;
        self.arrivals.returns.close();
        while let Ok(Returned { guest, .. }) = self.arrivals.returns.try_recv() {
            // It came too late to be told anything: it attaches again, and is judged anew.
            guest.driver.hang_up();
        }
    }

    /// Notes that the VMM does not answer because it is gone. Its fate is about to be known better, and is the reason
    /// of everything that fails meanwhile.
    pub(crate) fn note_gone(&mut self) {
        self.gone |= self.reason.is_none();
    }

    /// Returns why things went as they did, as far as that is known.
    pub(crate) fn why(&self) -> Option<String> {
        let anew = || {
            format!("the daemon of {} was started anew while the guest was being moved", self.context.name())
        };
        self.reason.clone().or_else(|| self.taken_up.then(anew))
    }

    /// Keeps the first reason that is given.
    pub(crate) fn blame(&mut self, reason: impl ToString) {
        self.reason.get_or_insert_with(|| reason.to_string());
    }

    /// Does what `machine` said, reports the result to it, and so on until nothing is left to do. Returns what only the
    /// role's own task can do: copy, pause, serve and report.
    pub(crate) async fn apply(&mut self, machine: &mut impl Machine, actions: Vec<Action>) -> Vec<Action> {
        let mut left = Vec::new();
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            debug!(guest = %self.entry.guest, ?action, "handover");
            match action {
                Action::Copy | Action::Pause | Action::Serve | Action::Report(_) => left.push(action),
                _ => {
                    if let Some(event) = self.perform(action).await {
                        actions.extend(machine.on(event));
                    }
                }
            }
        }
        self.reply = None;
        left
    }

    async fn perform(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Send(message) => return self.send(message).await,
            Action::Journal(record) => {
                if record == Record::Running
                    && let Some(guest) = self.guest()
                {
                    guest.driver.prepare_resume();
                }
                let started = Instant::now();
                let written = self.context.journal.write(&self.entry, record).await;
                self.times.journal += started.elapsed();
                if let Err(failure) = written {
                    error!(guest = %self.entry.guest, %record, %failure, "cannot write to the journal");
                    self.blame(failure);
                    return Some(Event::JournalFailed(record));
                }
                self.entry.record = record;
                return Some(Event::Journalled(record));
            }
            Action::Forget if self.lost.is_some() => self.forget_when_ended(),
            Action::Forget => {
                if let Err(failure) = self.context.journal.forget(&self.entry).await {
                    warn!(guest = %self.entry.guest, %failure, "cannot tidy up the journal");
                }
            }
            Action::Relinquish | Action::Resume | Action::Discard => return self.tell_vmm(action).await,
            Action::Copy | Action::Pause | Action::Serve | Action::Report(_) => {
                unreachable!("these are left to the role that has them")
            }
        }
        None
    }

    /// Tells the VMM to relinquish, resume or end.
    async fn tell_vmm(&mut self, action: Action) -> Option<Event> {
        let mut done = match action {
            Action::Relinquish => Event::Relinquished,
            Action::Resume if self.resumed => return Some(self.resumed()),
            Action::Resume if self.cannot_be_whole() => return self.give_back_or_end(),
            Action::Resume if self.is_broken() => return self.give_back_broken(),
            Action::Resume => Event::Resumed,
            _ => Event::Discarded,
        };
        let guest = match &self.vmm {
            Vmm::Attached(guest) => guest.clone(),
            Vmm::Away(_) => return self.leave_unanswered(action),
            Vmm::Ended => return Some(self.ended()),
            Vmm::Released => return Some(done),
        };
        if action == Action::Resume {
            self.announce(&guest).await;
        }
        let started = Instant::now();
        let told = match action {
            Action::Relinquish => self.relinquish(&guest).await.map(|event| done = event),
            Action::Resume => guest.driver.resume().await.map(|since| self.note_running(since)),
            _ => guest.driver.discard().await,
        };
        let told_before = self.told_to_run;
        self.told_to_run |= action == Action::Resume && !matches!(told, Err(DriverError::Unheard));
        match told {
            Ok(()) => {}
            Err(failure @ DriverError::Failed { .. }) if action != Action::Discard => {
                warn!(guest = %self.entry.guest, %failure, "the VMM did not do as it was told");
                self.blame(failure);
                return Some(match (action, self.entry.record) {
                    (Action::Resume, Record::Running) if !self.has_never_run(told_before) => Event::VmmGone,
                    (Action::Resume, _) => Event::ResumeFailed,
                    _ => Event::Failed,
                });
            }
            Err(failure) => {
                // It may or may not have done it. Without its daemon it keeps to its own rules,
                // and says how it stands when it is back.
                warn!(guest = %self.entry.guest, %failure, "the VMM did not answer");
                match failure {
                    DriverError::Gone | DriverError::Unheard => self.note_gone(),
                    _ => self.blame(failure),
                }
                guest.driver.hang_up();
                return self.leave_unanswered(action);
            }
        }
        if action == Action::Resume {
            self.times.resume = started.elapsed();
            self.resumed = true;
            guest.run_state.set(RunState::Running);
            if guest.tracked.take()
                && let Err(failure) = guest.stop_tracking().await
            {
                warn!(guest = %self.entry.guest, %failure, "cannot stop tracking; the guest may run slower");
            }
            return Some(self.resumed());
        }
        Some(done)
    }

    /// Returns the event that the guest runs here, with all of its memory or without. If it is not in the journal yet that
    /// all of it is here, a daemon that is started anew looks for what is missing, and the source must not be done by then.
    fn resumed(&self) -> Event {
        if self.entry.fetching { Event::ResumedIncomplete } else { Event::Resumed }
    }

    /// Notes that all of the guest's memory is here. Returns whether a daemon that is started anew will know it.
    pub(crate) async fn whole(&mut self) -> bool {
        self.entry.fetching = false;
        if self.entry.record != Record::Running {
            return true;
        }
        let written = self.context.journal.write(&self.entry, Record::Running).await;
        if let Err(failure) = &written {
            self.entry.fetching = true;
            warn!(guest = %self.entry.guest, %failure, "cannot note yet that a guest has all of its memory; trying on");
        }
        written.is_ok()
    }

    /// Tells the switches that a guest is here, before it can send frames by itself: at the destination, and at a
    /// source that takes it back from a destination that may have announced it already.
    async fn announce(&self, guest: &Guest) {
        let arrives = self.handle.progress.borrow().role == Role::Destination;
        if arrives || self.entry.record == Record::TakenBack {
            let sent = self.context.observer.announced();
            for (bridge, macs) in self.context.bridges_of(&guest.shape.nics) {
                announce(guest.shape.name.to_string(), bridge, macs, sent).await;
            }
        }
    }

    /// Notes that the guest runs here, and since when, if its VMM reported that.
    fn note_running(&self, since: Option<Duration>) {
        let since = since.map_or_else(unix_seconds, |since| since.as_secs_f64());
        self.handle.update(|progress| progress.pause.resumed_at_seconds = Some(since));
    }

    /// Remembers to tell the VMM again when it is back. Only whether it relinquished the guest is not worth waiting
    /// for, since a VMM that has not done so resumes by itself.
    fn leave_unanswered(&mut self, action: Action) -> Option<Event> {
        if action == Action::Relinquish {
            return Some(Event::Failed);
        }
        self.unanswered = Some(action);
        self.unanswered_since = Instant::now();
        None
    }
}
