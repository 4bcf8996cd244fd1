//! What comes to a daemon from outside: connections and what comes over them, VMMs that attach, and orders. This is a
//! model of `supervisor.rs`, `preflight.rs` and `recover.rs` of `daemon/migrate`.

use std::time::Duration;

use memlane_protocol::handover::{Destination, Event as Told, Message, Record, Source};
use memlane_protocol::wire::control::Control;

use crate::channel::Channel;
use crate::destination::DestinationWork;
use crate::event::{Answer, HostId, MigrationId, Wake};
use crate::host::Preflight;
use crate::network::{Payload, Purpose};
use crate::session::{Busy, Input, Machine, Reach, Role, Session};
use crate::source::SourceWork;
use crate::vmm::State;
use crate::world::World;

/// Within this time after the daemon's start all VMMs have attached again.
const RETURNING: Duration = Duration::from_secs(5);
/// It is looked whether a migration has made way for another in these intervals.
const LOOK: Duration = Duration::from_millis(10);
/// The preflight may take this long.
const PREFLIGHT: Duration = Duration::from_secs(30);

impl World {
    /// Orders a migration. Returns whether the daemon took the order.
    pub(crate) fn order(&mut self, at: HostId, vmm: usize) -> bool {
        let migration = self.next_migration;
        let Some(daemon) = &mut self.hosts[at].daemon else { return false };
        let moves = daemon.preflights.values().any(|preflight| preflight.vmm == vmm)
            || daemon.sessions.values().any(|session| session.vmm == vmm);
        if moves || self.vmms[vmm].attached.is_none() {
            return false;
        }
        self.next_migration += 1;
        let preflight = Preflight { vmm, link: None, accepted: false, dialled: 0, lanes: Vec::new() };
        daemon.preflights.insert(migration, preflight);
        self.tally.orders += 1;
        self.trace.note(self.clock.now(), || format!("migration {migration} from host {at} is ordered"));
        self.dial(at, Purpose::Control(migration));
        self.wake_after(at, PREFLIGHT, Wake::PreflightEnds { migration });
        true
    }

    /// A daemon has something to do.
    pub(crate) fn daemon_wakes(&mut self, at: HostId, wake: Wake) {
        match wake {
            Wake::Heard { connection, payload } => self.heard(at, connection, payload),
            Wake::Lost { connection } => self.lost(at, connection),
            Wake::Dialled { purpose, connection } => self.dialled(at, purpose, connection),
            Wake::Accepted { connection } => self.accepted(at, connection),
            Wake::Journalled { migration, ticket, written } => {
                self.written(at, migration, written);
                self.with_session(at, migration, |world, session| {
                    world.journalled(at, session, ticket, written);
                });
            }
            Wake::Answered { migration, ticket, answer } => {
                self.with_session(at, migration, |world, session| {
                    world.answered(at, session, ticket, answer)
                });
            }
            Wake::Worked { migration, ticket } => {
                let done = Answer::Done;
                self.with_session(at, migration, |world, session| world.answered(at, session, ticket, done));
            }
            // It may have attached again, or ended, before this was noticed.
            Wake::VmmLost { vmm, attachment } if attachment < self.vmms[vmm].attachment => {}
            Wake::VmmLost { vmm, .. } if self.vmms[vmm].state == State::Ended => {}
            Wake::VmmLost { vmm, .. } => self.tell_of_vmm(at, vmm, || Input::VmmLost),
            Wake::VmmEnded { vmm } => self.tell_of_vmm(at, vmm, || Input::VmmEnded),
            Wake::VmmAttached { vmm } => self.vmm_attached(at, vmm),
            Wake::HandOver { connection } => self.hand_over(at, connection),
            Wake::CheckLane { connection } => self.check_lane(at, connection),
            Wake::Ping { connection } => self.ping(at, connection),
            Wake::Look { migration } => {
                self.with_session(at, migration, |world, session| world.look_at_source(at, session));
            }
            Wake::LookAtServing { migration, ticket } => {
                self.with_session(at, migration, |world, session| world.look_at_serving(at, session, ticket));
            }
            Wake::Moment { migration } => {
                self.with_session(at, migration, |world, session| world.moment(session))
            }
            Wake::Deadline { migration } => {
                self.with_session(at, migration, |world, session| world.deadline(session));
            }
            Wake::ServeAgain { migration, ticket } => {
                self.with_session(at, migration, |world, session| world.serve_again(at, session, ticket));
            }
            Wake::WordEnds { connection } => {
                self.close(connection, at);
                self.lost(at, connection);
            }
            Wake::Reconnect { migration, ticket } => {
                self.with_session(at, migration, |world, session| world.reconnect(at, session, ticket));
            }
            Wake::ResumeEnds { migration, connection } => {
                self.with_session(at, migration, |world, session| {
                    if !session.is_over_connection(connection) {
                        world.resume_failed(at, session, connection);
                    }
                });
            }
            Wake::PatienceEnds { migration, ticket } => {
                self.with_session(at, migration, |world, session| {
                    world.patience_with_peer_ends(session, ticket);
                });
            }
            Wake::Offered { migration, connection, until } => {
                self.take_offer(at, migration, connection, until);
            }
            Wake::PreflightEnds { migration } => self.end_preflight(at, migration),
        }
    }

    pub(crate) fn answered(&mut self, at: HostId, session: &mut Session, ticket: u64, answer: Answer) {
        match session.busy.take() {
            Some((due, Busy::Vmm(action, before))) if due == ticket => {
                self.vmm_answered(session, action, before, answer);
            }
            Some((due, Busy::Destination(work))) if due == ticket => {
                self.destination_did(at, session, work, answer);
            }
            Some((due, Busy::Reopen { returns })) if due == ticket => {
                self.reopened(session, answer);
                let told = if returns { self.vmm_is_back(session) } else { self.told_by(session) };
                told.into_iter().for_each(|told| session.event(told));
            }
            other => {
                session.busy = other;
                self.stage_answered(session, ticket, answer);
            }
        }
    }

    pub(crate) fn tell_of_vmm(&mut self, at: HostId, vmm: usize, input: impl Fn() -> Input) {
        for migration in self.migrations_of(at, vmm) {
            self.with_session(at, migration, |_, session| {
                // One that is done with it waits for nothing.
                if session.reach != Reach::Released {
                    session.input(input());
                }
            });
        }
    }

    pub(crate) fn migrations_of(&self, at: HostId, vmm: usize) -> Vec<MigrationId> {
        let Some(daemon) = &self.hosts[at].daemon else { return Vec::new() };
        let of_vmm = daemon.sessions.iter().filter(|(_, session)| session.vmm == vmm);
        of_vmm.map(|(migration, _)| *migration).collect()
    }

    /// A VMM has attached: it is told to its migration, or asked about if no migration is known.
    pub(crate) fn vmm_attached(&mut self, at: HostId, vmm: usize) {
        if !self.migrations_of(at, vmm).is_empty() {
            for migration in self.migrations_of(at, vmm) {
                self.with_session(at, migration, |_, session| {
                    // That the connection before was lost is noticed first.
                    if session.reach == Reach::Attached {
                        session.input(Input::VmmLost);
                    }
                    if session.reach != Reach::Released {
                        session.input(Input::VmmBack);
                    }
                });
            }
            return;
        }
        let (state, bond) = (self.vmms[vmm].state, self.vmms[vmm].bond);
        match (state, bond) {
            (State::Paused | State::Relinquished | State::Loaded, Some(bond)) => {
                self.take_up(at, bond.migration, vmm, None, bond.fetching);
            }
            // Nothing was promised about it: it is ended, or goes on.
            (State::Loaded, None) => self.end_vmm(vmm),
            (State::Paused | State::Relinquished, None) => {
                let migration = self.next_migration;
                self.next_migration += 1;
                self.take_up(at, migration, vmm, Some(Record::Leaving), false);
            }
            _ => {}
        }
    }

    /// Answers a word of the other host about a migration, which may not be known.
    pub(crate) fn take_word(
        &mut self,
        at: HostId,
        migration: MigrationId,
        message: Message,
        connection: usize,
    ) {
        let now = self.clock.now();
        let Some(daemon) = &self.hosts[at].daemon else { return };
        if daemon.sessions.contains_key(&migration) {
            let reply = Some(connection);
            return self
                .with_session(at, migration, |_, session| session.input(Input::Word { message, reply }));
        }
        let (ended, starting) = (daemon.ended.contains(&migration), now - daemon.started < RETURNING);
        let for_source = message.awaits_source();
        let answer = match for_source {
            _ if self.hosts[at].journal.contains_key(&migration) => None,
            true if !ended && starting => None,
            true => Source::answer_unknown(message),
            false => Destination::answer_unknown(message),
        };
        if let Some(answer) = answer {
            let word = self.word(migration, answer, Duration::ZERO);
            self.send_control(connection, at, &word);
        }
        self.close(connection, at);
    }

    /// Takes the guest if there is a VMM that waits for it. A migration whose source was lost, and has begun anew, makes
    /// way first.
    pub(crate) fn take_offer(&mut self, at: HostId, migration: MigrationId, link: usize, until: Duration) {
        if !self.network.is_open(link, at) {
            return;
        }
        if !self.make_way(at) && self.clock.now() < until {
            let wake = Wake::Offered { migration, connection: link, until };
            return self.wake_after(at, LOOK, wake);
        }
        let Some(daemon) = &self.hosts[at].daemon else { return };
        let free = |vmm: &usize| {
            let it = &self.vmms[*vmm];
            let claimed = daemon.sessions.values().any(|session| session.vmm == *vmm);
            it.host == at && it.state == State::Incoming && it.attached.is_some() && !claimed
        };
        let vmm = (0..self.vmms.len()).rev().find(free);
        self.send(link, at, Payload::Answer { accepted: vmm.is_some() });
        let Some(vmm) = vmm else { return self.close(link, at) };
        let role = Role::Destination(Box::<DestinationWork>::default());
        let mut session = Session::new(migration, Machine::Destination(Destination::new()), vmm, role);
        (session.link, session.attachment) = (Some(Channel::over(link)), self.vmms[vmm].attachment);
        session.event(Told::Accepted);
        if let Some(daemon) = &mut self.hosts[at].daemon {
            daemon.sessions.insert(migration, session);
        }
        self.pump(at, migration);
    }

    pub(crate) fn offer_answered(&mut self, at: HostId, migration: MigrationId, accepted: bool) {
        let (paths, lanes) = (self.network.paths.len(), self.plan.lanes_per_path);
        let Some(daemon) = &mut self.hosts[at].daemon else { return };
        let Some(preflight) = daemon.preflights.get_mut(&migration) else { return };
        if !accepted {
            return self.end_preflight(at, migration);
        }
        preflight.accepted = true;
        let mut number = 0;
        for path in 1..paths {
            for _ in 0..lanes {
                number += 1;
                self.dial(at, Purpose::Lane { migration, number, path });
            }
        }
    }

    pub(crate) fn begin_if_ready(&mut self, at: HostId, migration: MigrationId) {
        let all = (self.network.paths.len() - 1) * self.plan.lanes_per_path;
        let Some(daemon) = &mut self.hosts[at].daemon else { return };
        if daemon.preflights.get(&migration).is_none_or(|preflight| preflight.dialled < all) {
            return;
        }
        let Some(preflight) = daemon.preflights.get(&migration) else { return };
        let vmm = &self.vmms[preflight.vmm];
        let runs = vmm.state == State::Running && vmm.attached.is_some();
        let link = preflight.link.filter(|link| self.network.is_open(*link, at));
        let (Some(link), true, true) = (link, runs, !preflight.lanes.is_empty()) else {
            return self.end_preflight(at, migration);
        };
        let Some(preflight) = daemon.preflights.remove(&migration) else { return };
        let (source, _offer) = Source::new();
        let policy = self.order_policy();
        let work = SourceWork::new(policy, self.plan.pages, 1..self.network.paths.len());
        let mut session =
            Session::new(migration, Machine::Source(source), preflight.vmm, Role::Source(Box::new(work)));
        (session.link, session.attachment) = (Some(Channel::over(link)), self.vmms[preflight.vmm].attachment);
        session.patience = self.plan.patience;
        let milliseconds = session.patience.as_millis() as u32;
        self.tell_peer(at, &mut session, &Control::Patience { milliseconds });
        let mut bench = self.bench(at, preflight.vmm);
        if let Some(sender) = session.sender_mut() {
            sender.next_number = all as u16;
            for (connection, number, path) in preflight.lanes {
                sender.begin(connection, number, path, &mut bench);
            }
        }
        session.event(Told::Message(Message::Accept));
        if let Some(daemon) = &mut self.hosts[at].daemon {
            daemon.sessions.insert(migration, session);
        }
        self.pump(at, migration);
    }

    pub(crate) fn end_preflight(&mut self, at: HostId, migration: MigrationId) {
        let Some(daemon) = &mut self.hosts[at].daemon else { return };
        let Some(preflight) = daemon.preflights.remove(&migration) else { return };
        let lanes = preflight.lanes.into_iter().map(|(connection, ..)| connection);
        lanes.chain(preflight.link).collect::<Vec<_>>().into_iter().for_each(|it| self.close(it, at));
    }
}
