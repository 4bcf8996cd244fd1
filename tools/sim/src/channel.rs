//! A migration's control connection, which goes on over another one when it breaks while the guest is copied. The real
//! [`Resumption`] decides what is sent again. The rest is a model of `daemon/net/src/resumable.rs` and of
//! `daemon/migrate/src/effects/resume.rs`.

use std::collections::VecDeque;
use std::time::Duration;

use memlane_protocol::handover::{Event as Told, Phase};
use memlane_protocol::resumption::Resumption;
use memlane_protocol::wire::control::{Control, Refusal, RefusalKind};

use crate::event::{HostId, MigrationId, Wake};
use crate::network::{Payload, Purpose};
use crate::plant::Plant;
use crate::session::{Busy, Input, Role, Session, identity};
use crate::world::World;

/// The other host is tried again in these intervals.
const AGAIN: Duration = Duration::from_millis(500);
/// The other host may take this long to answer.
const ANSWER: Duration = Duration::from_secs(3);

/// One end of a control connection.
#[derive(Debug, Default)]
pub(crate) struct Channel {
    /// The connection under it, unless another one is waited for.
    pub connection: Option<usize>,
    resumption: Resumption,
    /// These wait for another connection.
    waiting: VecDeque<Control>,
}

/// The time in which a lost connection is made again.
#[derive(Debug)]
pub(crate) struct Suspension {
    ticket: u64,
    /// At the source: the connection that may take the place of the lost one, once it is there.
    connection: Option<usize>,
}

/// What comes of the wait for another connection.
#[derive(Debug)]
pub(crate) enum Reunion {
    /// The other host is there, and has received so many messages.
    Connected {
        connection: usize,
        received: u64,
    },
    Parted,
}

impl Channel {
    pub(crate) fn over(connection: usize) -> Self {
        Self { connection: Some(connection), ..Self::default() }
    }

    /// Tells whether a sender waits for another connection.
    pub(crate) fn is_held_up(&self) -> bool {
        !self.waiting.is_empty()
    }
}

impl World {
    /// Sends a message over the migration's own connection, now or when there is another one.
    pub(crate) fn tell_peer(&mut self, at: HostId, session: &mut Session, message: &Control) {
        let broken = |connection| !self.network.is_open(connection, at);
        if self.plant == Plant::AnswerHoldsUpMigration
            && !session.machine.is_source()
            && session.machine.phase() == Phase::Copying
            && session.link.as_ref().and_then(|channel| channel.connection).is_some_and(broken)
        {
            session.busy = Some((self.ticket(), Busy::ForEver));
        }
        let Some(channel) = &mut session.link else { return };
        let Some(connection) = channel.connection else { return channel.waiting.push_back(message.clone()) };
        let bytes = message.encode();
        channel.resumption.send(bytes.clone());
        self.said(session.migration, at, bytes.clone());
        self.send(connection, at, Payload::Control(bytes));
    }

    /// Takes a message that came over the migration's own connection. Returns it, if it is for the session.
    pub(crate) fn take_message(
        &mut self,
        at: HostId,
        session: &mut Session,
        connection: usize,
        bytes: Vec<u8>,
    ) -> Option<Control> {
        let channel = session.link.as_mut().filter(|channel| channel.connection == Some(connection))?;
        let message = Payload::decode(&bytes);
        if let Control::Received(count) = message {
            if let Err(error) = channel.resumption.confirm(count) {
                self.violated(format!("migration {} at host {at}: {error}", session.migration));
            }
            return None;
        }
        if let Some(count) = channel.resumption.receive(bytes.len()) {
            self.send_control(connection, at, &Control::Received(count));
        }
        // One that was refused is taken for a message, and the connection for one that the source uses.
        if !matches!(message, Control::Refuse(_)) {
            self.check_heard(session.migration, at, &bytes);
        }
        Some(message)
    }

    /// The migration's own connection is lost. While the guest is copied, the other host may come back.
    pub(crate) fn link_lost(&mut self, at: HostId, session: &mut Session) -> Option<Told> {
        let loaded = matches!(&session.role, Role::Destination(work) if work.loaded);
        if session.machine.phase() != Phase::Copying || loaded || session.patience.is_zero() {
            return Some(self.peer_lost(at, session));
        }
        let (migration, ticket) = (session.migration, self.ticket());
        self.trace.note(self.clock.now(), || format!("host {at} migration {migration} waits for its peer"));
        self.tally.suspended += 1;
        if let Some(channel) = &mut session.link {
            channel.connection = None;
        }
        session.suspension = Some(Suspension { ticket, connection: None });
        self.wake_after(at, session.patience, Wake::PatienceEnds { migration, ticket });
        if session.machine.is_source() {
            self.dial(at, Purpose::Control(migration));
        }
        None
    }

    /// The migration's own connection is lost for good.
    pub(crate) fn peer_lost(&mut self, at: HostId, session: &mut Session) -> Told {
        let channel = session.link.take().and_then(|channel| channel.connection);
        channel.into_iter().for_each(|connection| self.close(connection, at));
        session.suspension = None;
        Told::PeerLost
    }

    /// What a source dialled to go on with is there, or not to be had.
    pub(crate) fn resume_dialled(&mut self, at: HostId, session: &mut Session, connection: Option<usize>) {
        let migration = session.migration;
        let Some(suspension) = &mut session.suspension else {
            return connection.into_iter().for_each(|connection| self.close(connection, at));
        };
        let (Some(connection), Some(channel)) = (connection, &mut session.link) else {
            let ticket = suspension.ticket;
            return self.wake_after(at, AGAIN, Wake::Reconnect { migration, ticket });
        };
        suspension.connection = Some(connection);
        let received = channel.resumption.tell();
        let ahead = u64::from(self.plant == Plant::MessageLostBetweenConnections && received > 1);
        let first = Control::Resume { migration: identity(migration), received: received + ahead };
        self.send_control(connection, at, &first);
        self.wake_after(at, ANSWER, Wake::ResumeEnds { migration, connection });
    }

    /// Tries to reach the destination again.
    pub(crate) fn reconnect(&mut self, at: HostId, session: &Session, ticket: u64) {
        if session.suspension.as_ref().is_some_and(|suspension| suspension.ticket == ticket) {
            self.dial(at, Purpose::Control(session.migration));
        }
    }

    /// A connection to go on with is lost, or was not answered.
    pub(crate) fn resume_failed(&mut self, at: HostId, session: &mut Session, connection: usize) {
        self.close(connection, at);
        let migration = session.migration;
        let Some(suspension) = &mut session.suspension else { return };
        if suspension.connection.take_if(|it| *it == connection).is_some() {
            let ticket = suspension.ticket;
            self.wake_after(at, AGAIN, Wake::Reconnect { migration, ticket });
        }
    }

    /// The wait for another connection is over.
    pub(crate) fn patience_with_peer_ends(&mut self, session: &mut Session, ticket: u64) {
        if session.suspension.as_ref().is_some_and(|suspension| suspension.ticket == ticket) {
            session.input(Input::Reunion(Reunion::Parted));
        }
    }

    /// Something came over a connection, with which a migration may be to go on. Returns whether that is what it says.
    pub(crate) fn resume_heard(
        &mut self,
        session: &mut Session,
        connection: usize,
        message: &Control,
    ) -> bool {
        let dialled = session.suspension.as_ref().and_then(|suspension| suspension.connection);
        let reunion = match *message {
            Control::Resume { received, .. } if !session.machine.is_source() => {
                Reunion::Connected { connection, received }
            }
            Control::Resumed(received) if dialled == Some(connection) => {
                Reunion::Connected { connection, received }
            }
            Control::Refuse(_) if dialled == Some(connection) => Reunion::Parted,
            _ => return false,
        };
        if let Some(suspension) = session.suspension.as_mut().filter(|_| session.machine.is_source()) {
            suspension.connection = None;
        }
        session.input(Input::Reunion(reunion));
        true
    }

    /// Tells a source that its migration is not under way here.
    pub(crate) fn refuse_to_resume(&mut self, at: HostId, connection: usize) {
        let refusal = Refusal { what: RefusalKind::Busy, reason: String::new() };
        self.send_control(connection, at, &Control::Refuse(vec![refusal]));
        self.close(connection, at);
    }

    /// Deals with what came of the wait for the other host.
    pub(crate) fn reunite(&mut self, at: HostId, session: &mut Session, reunion: Reunion) -> Option<Told> {
        let copying = session.machine.phase() == Phase::Copying;
        let (connection, received) = match reunion {
            Reunion::Connected { connection, received } if copying && session.link.is_some() => {
                (connection, received)
            }
            Reunion::Connected { connection, .. } => {
                self.refuse_to_resume(at, connection);
                // It has gone on to the pause, in which nothing can be said: there is nothing to wait for.
                self.tally.reunited_late += 1;
                return session.suspension.is_some().then(|| self.peer_lost(at, session));
            }
            Reunion::Parted if session.suspension.is_some() => return Some(self.peer_lost(at, session)),
            Reunion::Parted => return None,
        };
        let channel = session.link.as_mut().expect("it was there");
        let before = channel.connection.replace(connection);
        if !session.machine.is_source() {
            let received = channel.resumption.tell();
            self.send_control(connection, at, &Control::Resumed(received));
        }
        let again = match channel.resumption.resume(received) {
            Ok(again) => again,
            Err(error) => {
                self.violated(format!("migration {} at host {at}: {error}", session.migration));
                Vec::new()
            }
        };
        let waiting = std::mem::take(&mut channel.waiting);
        before.into_iter().for_each(|before| self.close(before, at));
        self.trace.note(self.clock.now(), || {
            let sent = again.len();
            format!("host {at} migration {} goes on, and sends {sent} messages again", session.migration)
        });
        session.suspension = None;
        self.tally.resumed += u64::from(session.machine.is_source());
        let twice = usize::from(self.plant == Plant::MessagesSentTwice) + 1;
        for bytes in again.iter().flat_map(|bytes| std::iter::repeat_n(bytes, twice)) {
            self.send(connection, at, Payload::Control(bytes.clone()));
        }
        waiting.iter().for_each(|message| self.tell_peer(at, session, message));
        None
    }

    /// Ends a migration at a destination whose source was lost, since that begins anew. Returns whether it has ended.
    pub(crate) fn make_way(&mut self, at: HostId) -> bool {
        let Some(daemon) = &self.hosts[at].daemon else { return true };
        let waits = |session: &&Session| session.suspension.is_some() && !session.machine.is_source();
        let before: Vec<MigrationId> =
            daemon.sessions.values().filter(waits).map(|session| session.migration).collect();
        for migration in &before {
            self.with_session(at, *migration, |_, session| session.input(Input::Reunion(Reunion::Parted)));
        }
        let Some(daemon) = &self.hosts[at].daemon else { return true };
        !before.iter().any(|migration| daemon.sessions.contains_key(migration))
    }
}
