//! The one loop of every session: it takes what happened, asks the machine what to do about it, and does that. This is a
//! model of `drive.rs` and `recover.rs` of `daemon/migrate`.

use std::time::Duration;

use memlane_protocol::handover::{Action, Event as Told, Outcome, Phase, Record};

use crate::event::{HostId, MigrationId, Wake};
use crate::invariants::Loss;
use crate::plant::Plant;
use crate::session::{Busy, Input, Reach, Role, Session};
use crate::vmm::Command;
use crate::world::World;

/// A message that has not been answered is sent again after this time.
const TICK: Duration = Duration::from_secs(1);
/// No queue of a session ever has more than this.
const MOST_WAITING: usize = 1000;

impl World {
    /// Has a session go on as far as it can.
    pub(crate) fn pump(&mut self, at: HostId, migration: MigrationId) {
        self.with_session(at, migration, |_, _| {});
    }

    /// Does something to a session, which then goes on as far as it can.
    pub(crate) fn with_session(
        &mut self,
        at: HostId,
        migration: MigrationId,
        act: impl FnOnce(&mut Self, &mut Session),
    ) {
        let Some(daemon) = &mut self.hosts[at].daemon else { return };
        let Some(mut session) = daemon.sessions.remove(&migration) else { return };
        act(self, &mut session);
        self.drive(at, &mut session);
        if session.inputs.len() + session.events.len() + session.todo.len() > MOST_WAITING {
            self.violated(format!(
                "more than {MOST_WAITING} things wait in migration {migration} at host {at}"
            ));
        }
        let Some(daemon) = &mut self.hosts[at].daemon else { return };
        if session.over {
            daemon.ended.insert(migration);
        } else {
            daemon.sessions.insert(migration, session);
        }
    }

    pub(crate) fn drive(&mut self, at: HostId, session: &mut Session) {
        let mut acted = false;
        while session.busy.is_none() && self.violation.is_none() && !session.over {
            let applied = session.applying;
            if let Some(action) = session.todo.pop_front() {
                self.trace.note(self.clock.now(), || {
                    format!("host {at} migration {} does {action:?}", session.migration)
                });
                self.perform(at, session, action);
            } else if std::mem::take(&mut session.applying) {
                if let Some(reply) = session.reply.take() {
                    self.close(reply, at);
                }
                for action in std::mem::take(&mut session.left) {
                    self.begin(at, session, action);
                }
            } else if session.is_done() {
                self.end_session(at, session);
            } else if let Some(event) = session.events.pop_front() {
                self.tell(at, session, event);
            } else if let Some(input) = session.inputs.pop_front() {
                if let Some(event) = self.take_input(at, session, input) {
                    self.tell(at, session, event);
                }
            } else if let Some(event) = self.advance(at, session) {
                self.tell(at, session, event);
            } else {
                break;
            }
            acted |= applied || session.applying;
        }
        if acted || session.moment_due <= self.clock.now() {
            session.moment_due = self.clock.now() + TICK;
        }
        if !session.over && !std::mem::replace(&mut session.moment_planned, true) {
            let wait = session.moment_due - self.clock.now();
            self.wake_after(at, wait, Wake::Moment { migration: session.migration });
        }
    }

    pub(crate) fn tell(&mut self, at: HostId, session: &mut Session, event: Told) {
        self.trace
            .note(self.clock.now(), || format!("host {at} migration {} hears {event:?}", session.migration));
        match &session.role {
            Role::Source(_) => self.before_source(session, event),
            Role::Destination(_) => self.before_destination(at, session, event),
            Role::Recovery { .. } => {}
        }
        session.todo.extend(session.machine.on(event));
        session.applying = true;
        if matches!(session.role, Role::Source(_)) {
            self.decided_source(at, session);
        }
        let returns = session.machine.phase() == Phase::Returning;
        if returns && matches!(session.role, Role::Recovery { .. }) {
            session.role = Role::Recovery { serve: false };
            self.end_serving(at, session);
        }
        if event == Told::PeerLost {
            session.events.push_back(Told::Tick);
            let bound = session.record == Some(Record::Committed);
            if self.plant == Plant::SourceResumesAfterCommit && bound && session.machine.is_source() {
                let asker = session.asker(at, 0);
                self.command(session.vmm, Command::Resume, asker);
            }
        }
    }

    pub(crate) fn take_input(&mut self, at: HostId, session: &mut Session, input: Input) -> Option<Told> {
        match input {
            Input::Heard { connection, bytes } => {
                let message = self.take_message(at, session, connection, bytes)?;
                match session.role {
                    Role::Source(_) => self.source_hears(at, session, message),
                    Role::Destination(_) => self.destination_hears(at, session, message),
                    Role::Recovery { .. } => None,
                }
            }
            Input::LinkLost(connection) if session.is_over_connection(connection) => {
                self.link_lost(at, session)
            }
            Input::LinkLost(_) => None,
            Input::Reunion(reunion) => self.reunite(at, session, reunion),
            Input::Word { message, reply } => {
                session.reply = reply;
                Some(Told::Message(message))
            }
            Input::VmmLost => {
                (session.reach, session.unanswered_since) = (Reach::Away, self.clock.now());
                Some(Told::Failed)
            }
            Input::VmmEnded => {
                session.reach = Reach::Ended;
                Some(session.ended())
            }
            Input::VmmBack => {
                session.attachment = self.vmms[session.vmm].attachment;
                if self.reopen(at, session, true) { None } else { self.vmm_is_back(session) }
            }
            Input::Cancel => session.machine.can_cancel().then_some(Told::Cancel),
            Input::Abandon => self.abandoned(session),
            Input::Moment => {
                if self.patience_ended(session) {
                    self.lose_patience(session);
                }
                if matches!(session.role, Role::Recovery { .. }) {
                    self.reopen_without_monitor(session);
                }
                let hangs = self.awaits_memory(session) && self.plant != Plant::HangingVmmUntold;
                let told = if hangs { Told::MemoryFound } else { Told::Tick };
                (self.plant != Plant::NeverRepeated).then_some(told)
            }
            Input::FetchLink(connection) => {
                self.fetch_over(at, session, connection);
                None
            }
        }
    }

    /// The VMM has attached again, and has been asked for what it keeps.
    pub(crate) fn vmm_is_back(&mut self, session: &mut Session) -> Option<Told> {
        let told = self.told_by(session);
        session.reach = Reach::Attached;
        let Some(action) = session.unanswered.take() else { return told };
        session.todo.push_back(action);
        session.applying = true;
        None
    }

    pub(crate) fn abandoned(&mut self, session: &mut Session) -> Option<Told> {
        if !session.machine.can_abandon() {
            return None;
        }
        if !session.machine.is_source() && session.remaining() == 0 {
            return None; // it is about to be complete
        }
        self.losses.push(Loss::Abandoned);
        Some(Told::Abandoned)
    }

    pub(crate) fn begin(&mut self, at: HostId, session: &mut Session, action: Action) {
        if let Action::Report(outcome) = action {
            self.trace.note(self.clock.now(), || {
                format!("host {at} migration {} ends: {outcome}", session.migration)
            });
            self.tally.ended(session.machine.is_source(), outcome);
            if !session.machine.is_source() && outcome == Outcome::Lost {
                self.poison(session);
            }
        }
        match &mut session.role {
            Role::Source(_) => self.begin_source(at, session, action),
            Role::Destination(_) => {}
            Role::Recovery { serve } => match action {
                Action::Serve => *serve = true,
                Action::Report(_) => {
                    *serve = false;
                    self.end_serving(at, session);
                }
                _ => {}
            },
        }
    }

    pub(crate) fn advance(&mut self, at: HostId, session: &mut Session) -> Option<Told> {
        match session.role {
            Role::Source(_) => self.advance_source(at, session),
            _ if !session.machine.is_source() => self.complete(at, session),
            Role::Destination(_) => None,
            Role::Recovery { serve } if serve && session.serving.is_none() => match session.reach {
                Reach::Ended => {
                    session.role = Role::Recovery { serve: false };
                    Some(Told::Abandoned)
                }
                Reach::Attached => {
                    self.begin_to_serve(at, session, false);
                    None
                }
                _ => None,
            },
            Role::Recovery { .. } => None,
        }
    }

    pub(crate) fn end_session(&mut self, at: HostId, session: &mut Session) {
        self.end_serving(at, session);
        for connection in self.connections_of(session.migration, at) {
            self.close(connection, at);
        }
        session.over = true;
    }

    /// The migration's time-outs.
    pub(crate) fn deadline(&mut self, session: &mut Session) {
        let now = self.clock.now();
        let late = session.commit_by.is_some_and(|commit_by| now >= commit_by);
        if late
            && self.plant != Plant::DeadlineIgnored
            && matches!(session.busy, Some((_, Busy::Vmm(Action::Relinquish, _))))
        {
            session.busy = None;
            session.todo.extend(session.machine.on(Told::Failed));
        }
    }

    /// A moment has passed, unless something has happened meanwhile.
    pub(crate) fn moment(&mut self, session: &mut Session) {
        session.moment_planned = false;
        if self.clock.now() >= session.moment_due {
            session.input(Input::Moment);
        }
    }
}
