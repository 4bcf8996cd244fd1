//! This module has the one loop of every migration: it takes an event, asks the handover what to do about it, and does
//! that.

use std::collections::VecDeque;
use std::future::pending;
use std::time::{Duration, Instant};

use memlane_api::ids;
use memlane_net::journal::Entry;
use memlane_net::link::LinkError;
use memlane_net::resumable::ResumableLink;
use memlane_protocol::handover::{Action, Event, Phase};
use memlane_protocol::wire::control::Control;
use tracing::{Instrument, info_span};

use crate::effects::{Effects, Reunion, Suspension, refuse_to_resume};
use crate::machine::Machine;
use crate::vmm;

/// This long after the last event a message that has not been answered is sent again.
const TICK: Duration = Duration::from_secs(1);

/// A role is what one side of a migration does besides the effects that both have.
pub(crate) trait Role {
    /// The machine decides for this side.
    type Machine: Machine;

    /// Waits for what happens next. Returns `None` if that does not concern the handover.
    async fn next_event(&mut self, session: &mut Session<Self::Machine>) -> Option<Event>;
    /// Takes note of an event that the machine is about to hear of.
    async fn before(&mut self, _session: &mut Session<Self::Machine>, _event: Event) {}
    /// Takes note that the machine has decided, before any of that is done.
    fn decided(&mut self, _session: &mut Session<Self::Machine>) {}
    /// Does what only this side can: copy, pause, serve or report.
    async fn begin(&mut self, session: &mut Session<Self::Machine>, action: Action);
    /// Brings up to date what everyone else sees.
    fn show(&mut self, session: &mut Session<Self::Machine>);
    /// Tells whether nothing is left to do.
    fn is_done(&self, session: &Session<Self::Machine>) -> bool {
        session.machine.is_over()
    }
    /// Lets go of what the migration had.
    async fn end(&mut self, _session: &mut Session<Self::Machine>) {}
}

/// The state that every side of a migration has.
pub(crate) struct Session<M> {
    /// The machine decides.
    pub machine: M,
    /// The effects do what was decided.
    pub effects: Effects,
    /// What is done once in a while is due at this time.
    next_moment: Instant,
}

/// An event of any kind that one side of a migration waits for.
#[expect(clippy::large_enum_variant, reason = "there is one at a time, for a moment")]
pub(crate) enum News<T> {
    /// A message came over the migration's own connection, or that ended.
    Message(Result<Control, LinkError>),
    /// The side's own work has brought this.
    Own(T),
    /// The machine is to hear of this event, if it is one.
    Event(Option<Event>),
    /// The operator wants the migration cancelled.
    Cancelled,
    /// The operator gives up the guest's missing pages.
    Abandoned,
    /// A moment has passed, and the machine has heard of nothing meanwhile.
    Moment,
}

/// Works on a migration until nothing is left to do. It begins with `actions`, and goes on with `events`.
///
/// Everything that is logged meanwhile carries the migration's identity, by which the logs of both hosts can be joined.
pub(crate) async fn drive<R: Role>(
    role: R,
    session: Session<R::Machine>,
    actions: Vec<Action>,
    events: impl IntoIterator<Item = Event>,
) -> Session<R::Machine> {
    let Entry { migration, guest, peer, .. } = &session.effects.entry;
    let side = session.effects.handle.progress.borrow().role;
    let span = info_span!("migration", id = %ids::encode(migration), %guest, %peer, role = ?side);
    run(role, session, actions, VecDeque::from_iter(events)).instrument(span).await
}

async fn run<R: Role>(
    mut role: R,
    mut session: Session<R::Machine>,
    mut actions: Vec<Action>,
    mut events: VecDeque<Event>,
) -> Session<R::Machine> {
    loop {
        let left = session.effects.apply(&mut session.machine, actions).await;
        for action in left {
            role.begin(&mut session, action).await;
        }
        // From now on: actions may have taken longer, and what came meanwhile is heard first.
        session.next_moment = Instant::now() + TICK;
        role.show(&mut session);
        session.effects.show_doubt(&session.machine);
        let event = loop {
            if role.is_done(&session) {
                role.end(&mut session).await;
                session.effects.release();
                return session;
            }
            match events.pop_front() {
                Some(event) => break event,
                None => match role.next_event(&mut session).await {
                    Some(event) => break event,
                    None => {
                        role.show(&mut session);
                        session.effects.show_doubt(&session.machine);
                    }
                },
            }
        };
        role.before(&mut session, event).await;
        actions = session.machine.on(event);
        role.decided(&mut session);
        if event == Event::PeerLost {
            events.push_back(Event::Tick); // what is in doubt is asked about at once
        }
    }
}

impl<M: Machine> Session<M> {
    /// Begins the session of a migration.
    pub(crate) fn new(machine: M, effects: Effects) -> Self {
        Self { machine, effects, next_moment: Instant::now() + TICK }
    }

    /// Waits for what happens next. `own` is what the side itself waits for. The caller awaits this again and again.
    pub(crate) async fn news<T>(&mut self, own: impl Future<Output = T>) -> News<T> {
        let mut cancelled = self.effects.handle.cancelled.subscribe();
        let mut abandoned = self.effects.handle.abandoned.subscribe();
        if let Some(event) = self.effects.next.take() {
            return News::Event(Some(event));
        }
        let patience_ends = self.effects.patience_ends();
        let handle = self.effects.handle.clone();
        let (is_suspended, patience) = (self.effects.suspension.is_some(), self.effects.patience);
        let Effects { link, suspension, vmm, arrivals, .. } = &mut self.effects;
        tokio::select! {
            biased;
            // First, and by the clock: a source that knocks twice a second would put it off for ever.
            () = until(Some(self.next_moment)) => {
                self.next_moment = Instant::now() + TICK;
                News::Moment
            }
            message = receive(link) => News::Message(message),
            Some(word) = arrivals.words.recv() => {
                self.effects.reply = Some(word.reply);
                self.effects.heard(word.message, &word.reason);
                News::Event(Some(Event::Message(word.message)))
            }
            Some((link, received)) = arrivals.resumptions.recv() => {
                News::Event(self.reunite(Reunion::Connected(link, received)).await)
            }
            reunion = ends(suspension, patience) => News::Event(self.reunite(reunion).await),
            () = handle.make_way.notified(), if is_suspended => {
                let reason = "the source was lost, and offers the guest anew".to_owned();
                News::Event(self.reunite(Reunion::Parted(reason)).await)
            }
            own = own => News::Own(own),
            Ok(_) = cancelled.wait_for(|cancelled| *cancelled), if self.machine.can_cancel() => News::Cancelled,
            Ok(_) = abandoned.wait_for(|abandoned| *abandoned), if self.machine.can_abandon() => News::Abandoned,
            Some(resolution) = arrivals.resolutions.recv() => {
                News::Event(Some(self.effects.note_resolution(resolution)))
            }
            news = vmm::news(vmm, &mut arrivals.returns) => News::Event(self.effects.note_vmm(news).await),
            () = until(patience_ends) => News::Event(self.effects.lose_patience()),
        }
    }

    /// Returns what the machine is to hear when a moment has passed: that the guest is lost, if it has begun to run
    /// without all of its memory and the rest is not there any more.
    pub(crate) fn tick(&mut self) -> Event {
        match self.effects.hopeless().filter(|_| self.machine.can_abandon()) {
            Some(reason) => {
                self.effects.blame(reason);
                Event::Abandoned
            }
            None => Event::Tick,
        }
    }

    /// Notes that the migration's own connection is lost. While the guest is copied, the other host may come back: nothing
    /// was begun that cannot wait.
    pub(crate) fn link_lost(&mut self, error: LinkError) -> Option<Event> {
        if self.machine.phase() == Phase::Copying && self.effects.suspend(&error) {
            return None;
        }
        Some(self.peer_lost(error))
    }

    /// Deals with what came of the wait for the other host.
    async fn reunite(&mut self, reunion: Reunion) -> Option<Event> {
        match reunion {
            Reunion::Connected(link, _) if self.machine.phase() != Phase::Copying => {
                refuse_to_resume(link);
                let waited = self.effects.suspension.is_some();
                waited.then(|| self.peer_lost("the other host was reached again when it was too late"))
            }
            Reunion::Connected(link, received) => match self.effects.resume(link, received).await {
                Ok(()) => None,
                Err(reason) => Some(self.peer_lost(reason)),
            },
            Reunion::Parted(reason) => Some(self.peer_lost(reason)),
        }
    }

    /// Notes that the migration's own connection is lost for good, or is of no use any more.
    pub(crate) fn peer_lost(&mut self, reason: impl ToString) -> Event {
        self.effects.blame(reason);
        (self.effects.link, self.effects.suspension) = (None, None);
        self.effects.handle.suspended.set(false);
        Event::PeerLost
    }
}

/// Returns at this time. If there is none, it never returns.
pub(crate) async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => pending().await,
    }
}

/// Returns the next message of a link, while there is one.
async fn receive(link: &mut Option<ResumableLink>) -> Result<Control, LinkError> {
    match link {
        Some(link) => link.receive().await,
        None => pending().await,
    }
}

/// Returns what comes of the wait for the other host, while there is one.
async fn ends(suspension: &mut Option<Suspension>, patience: Duration) -> Reunion {
    match suspension {
        Some(suspension) => suspension.ends(patience).await,
        None => pending().await,
    }
}
