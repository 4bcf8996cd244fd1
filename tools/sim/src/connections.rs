//! What comes to a daemon over connections, and how they begin and end. This is a model of `daemon/net`, and of the parts of
//! `daemon/migrate` that connections are handed to.

use std::collections::VecDeque;
use std::time::Duration;

use memlane_protocol::wire::control::Control;

use crate::event::{HostId, MigrationId, Wake};
use crate::host::Link;
use crate::lane::Sender;
use crate::network::{Payload, Purpose};
use crate::session::{Input, Role, Session};
use crate::world::World;

/// A connection attempt that nobody answers ends after this time.
const CONNECT: Duration = Duration::from_secs(2);
/// A migration whose source was lost may take this long to make way for another.
const MAKING_WAY: Duration = Duration::from_secs(2);
/// The round trips of this many pings are remembered.
const ROUND_TRIPS: usize = 8;

impl World {
    /// Connects to the other host. The answer comes later.
    pub(crate) fn dial(&mut self, at: HostId, purpose: Purpose) {
        let path = path_of(purpose);
        let (now, trip) = (self.clock.now(), 3 * self.network.paths[path].latency);
        let reached = !self.network.paths[path].is_cut(now) && self.hosts[1 - at].daemon.is_some();
        let connection = reached.then(|| self.network.connect(purpose, path, at, now));
        let wait = if self.network.paths[path].is_cut(now) { CONNECT } else { trip };
        self.wake_after(at, wait, Wake::Dialled { purpose, connection });
        if let Some(connection) = connection {
            self.wake_after(1 - at, trip, Wake::Accepted { connection });
        }
    }

    /// Opens a lane: of pre-copy, or of the session in which pages are served.
    pub(crate) fn open_lane(
        &mut self,
        at: HostId,
        migration: MigrationId,
        path: usize,
        session: Option<u64>,
        sender: &mut Sender,
    ) {
        sender.next_number += 1;
        let number = sender.next_number;
        self.dial(
            at,
            match session {
                Some(session) => Purpose::FetchLane { migration, number, path, session },
                None => Purpose::Lane { migration, number, path },
            },
        );
    }

    /// Something has come over a connection.
    pub(crate) fn heard(&mut self, at: HostId, connection: usize, payload: Payload) {
        if !self.network.is_open(connection, at) {
            return;
        }
        if let Some(link) =
            self.hosts[at].daemon.as_mut().and_then(|daemon| daemon.links.get_mut(&connection))
        {
            link.heard = self.clock.now();
        }
        let (purpose, dialled_here) = {
            let connection = &self.network.connections[connection];
            (connection.purpose, connection.dialler == at)
        };
        match (purpose, payload) {
            (_, Payload::Closed) => {
                self.close(connection, at);
                self.lost(at, connection);
            }
            (
                Purpose::Lane { migration, .. } | Purpose::FetchLane { migration, .. },
                Payload::Ack(sequence),
            ) => {
                self.with_session(at, migration, |world, session| {
                    let mut bench = world.bench(at, session.vmm);
                    if let Some(sender) = sender_of(session, purpose) {
                        sender.acknowledged(connection, sequence, &mut bench);
                    }
                    world.check_window(session, purpose);
                });
            }
            (
                Purpose::Lane { migration, .. }
                | Purpose::FetchLane { migration, .. }
                | Purpose::Faults { migration, .. },
                Payload::Frame { head, versions },
            ) => self.with_session(at, migration, |world, session| {
                world.take_frame(at, session, connection, (&head, &versions));
            }),
            (Purpose::Faults { migration, .. }, Payload::Request(page)) => {
                self.with_session(at, migration, |world, session| {
                    world.page_requested(at, session, connection, page);
                });
            }
            (Purpose::Control(migration), Payload::Offer) => {
                let until = self.clock.now() + MAKING_WAY;
                self.take_offer(at, migration, connection, until);
            }
            (Purpose::Control(migration), Payload::Answer { accepted }) => {
                self.offer_answered(at, migration, accepted);
            }
            (_, Payload::Control(bytes)) => {
                let message = Payload::decode(&bytes);
                self.heard_control(at, connection, purpose, dialled_here, message, &bytes);
            }
            (Purpose::Fetch(migration), payload) => self.with_session(at, migration, |world, session| {
                world.serving_hears(at, session, connection, &payload);
            }),
            _ => {}
        }
    }

    pub(crate) fn heard_control(
        &mut self,
        at: HostId,
        connection: usize,
        purpose: Purpose,
        dialled_here: bool,
        message: Control,
        bytes: &[u8],
    ) {
        match (purpose, message) {
            (_, Control::Ping(number)) => self.send_control(connection, at, &Control::Pong(number)),
            (_, Control::Pong(number)) => self.ponged(at, connection, number),
            (Purpose::Control(migration), message) => {
                let bytes = bytes.to_vec();
                let known = self.knows(at, migration);
                if !known && matches!(message, Control::Resume { .. }) {
                    return self.refuse_to_resume(at, connection);
                }
                self.with_session(at, migration, |world, session| {
                    if !world.resume_heard(session, connection, &message) {
                        session.input(Input::Heard { connection, bytes });
                    }
                });
            }
            (Purpose::Fetch(migration), _) if dialled_here => {
                let payload = Payload::Control(bytes.to_vec());
                self.with_session(at, migration, |world, session| {
                    world.serving_hears(at, session, connection, &payload);
                });
            }
            (Purpose::Fetch(migration), Control::Fetch(_)) => {
                if !self.knows(at, migration) {
                    return self.close(connection, at);
                }
                self.with_session(at, migration, |_, session| session.input(Input::FetchLink(connection)));
            }
            (Purpose::Fetch(migration), message) => self.with_session(at, migration, |world, session| {
                world.fetch_hears(at, session, connection, &message);
            }),
            (Purpose::Word(migration), Control::Handover { message, .. }) if dialled_here => {
                self.with_session(at, migration, |world, session| {
                    world.word_answered(session, connection, Some(message));
                });
                self.close(connection, at);
            }
            (Purpose::Word(migration), Control::Handover { message, .. }) => {
                self.take_word(at, migration, message, connection);
            }
            _ => {}
        }
    }

    /// A connection has ended.
    pub(crate) fn lost(&mut self, at: HostId, connection: usize) {
        self.network.lose(connection, at);
        if let Some(daemon) = &mut self.hosts[at].daemon {
            daemon.links.remove(&connection);
        }
        let dialled_here = self.network.connections[connection].dialler == at;
        match self.network.connections[connection].purpose {
            Purpose::Control(migration) => {
                let Some(daemon) = &self.hosts[at].daemon else { return };
                if daemon.preflights.contains_key(&migration) {
                    return self.end_preflight(at, migration);
                }
                self.with_session(at, migration, |world, session| {
                    world.resume_failed(at, session, connection);
                    session.input(Input::LinkLost(connection));
                });
            }
            Purpose::Lane { migration, .. } => self.with_session(at, migration, |world, session| {
                if let Some(sender) = session.sender_mut() {
                    world.tally.lanes_lost += u64::from(sender.ended(connection).is_some());
                } else {
                    world.lane_lost(session, connection);
                }
            }),
            Purpose::Fetch(migration)
            | Purpose::FetchLane { migration, .. }
            | Purpose::Faults { migration, .. } => {
                self.with_session(at, migration, |world, session| {
                    if dialled_here {
                        world.serving_lost(at, session, connection);
                    } else {
                        world.fetch_lost(at, session, connection);
                    }
                });
            }
            Purpose::Word(migration) if dialled_here => self.with_session(at, migration, |world, session| {
                world.word_answered(session, connection, None);
            }),
            Purpose::Word(_) => {}
        }
    }

    /// What was dialled is there, or is not to be had.
    pub(crate) fn dialled(&mut self, at: HostId, purpose: Purpose, connection: Option<usize>) {
        // It may have been lost already.
        let connection = connection.filter(|connection| self.network.is_open(*connection, at));
        if let Some(connection) = connection {
            self.watch(at, connection);
        }
        match purpose {
            Purpose::Control(migration) => match connection {
                _ if self.knows(at, migration) => self.with_session(at, migration, |world, session| {
                    world.resume_dialled(at, session, connection);
                }),
                Some(link) => {
                    let daemon = self.hosts[at].daemon.as_mut();
                    match daemon.and_then(|daemon| daemon.preflights.get_mut(&migration)) {
                        Some(preflight) => {
                            preflight.link = Some(link);
                            self.send(link, at, Payload::Offer);
                        }
                        None => self.close(link, at),
                    }
                }
                None => self.end_preflight(at, migration),
            },
            Purpose::Lane { migration, number, path } => {
                self.lane_dialled(at, migration, (number, path), connection)
            }
            Purpose::Word(migration) => {
                self.with_session(at, migration, |world, session| {
                    world.word_dialled(at, session, connection)
                });
            }
            Purpose::Fetch(migration)
            | Purpose::FetchLane { migration, .. }
            | Purpose::Faults { migration, .. } => {
                self.with_session(at, migration, |world, session| {
                    world.serve_dialled(at, session, purpose, connection);
                });
            }
        }
    }

    pub(crate) fn lane_dialled(
        &mut self,
        at: HostId,
        migration: MigrationId,
        (number, path): (u16, usize),
        connection: Option<usize>,
    ) {
        let Some(daemon) = &mut self.hosts[at].daemon else { return };
        if let Some(preflight) = daemon.preflights.get_mut(&migration) {
            preflight.dialled += 1;
            preflight.lanes.extend(connection.map(|connection| (connection, number, path)));
            return self.begin_if_ready(at, migration);
        }
        let mut used = false;
        self.with_session(at, migration, |world, session| {
            let mut bench = world.bench(at, session.vmm);
            if let Role::Source(work) = &mut session.role {
                work.sender.tried(path);
                if let Some(connection) =
                    connection.filter(|_| work.is_copying() && !work.sender.outbound.is_quiesced())
                {
                    used = true;
                    work.sender.begin(connection, number, path, &mut bench);
                }
            }
        });
        if let Some(connection) = connection.filter(|_| !used) {
            self.close(connection, at);
        }
    }

    /// The other host has connected.
    pub(crate) fn accepted(&mut self, at: HostId, connection: usize) {
        if !self.network.is_open(connection, at) {
            return;
        }
        self.watch(at, connection);
        match self.network.connections[connection].purpose {
            Purpose::Control(_) | Purpose::Fetch(_) | Purpose::Word(_) => {}
            Purpose::Lane { migration, number, .. } if self.knows(at, migration) => {
                self.with_session(at, migration, |world, session| {
                    world.take_lane(at, session, connection, number)
                });
            }
            Purpose::FetchLane { migration, number, session: link, .. } if self.knows(at, migration) => {
                self.with_session(at, migration, |world, session| {
                    world.fetch_lane(at, session, (connection, link as usize), Some(number));
                });
            }
            Purpose::Faults { migration, session: link, .. } if self.knows(at, migration) => {
                self.with_session(at, migration, |world, session| {
                    world.fetch_lane(at, session, (connection, link as usize), None);
                });
            }
            _ => self.close(connection, at),
        }
    }

    /// Tells whether a migration is under way at a host.
    pub(crate) fn knows(&self, at: HostId, migration: MigrationId) -> bool {
        self.hosts[at].daemon.as_ref().is_some_and(|daemon| daemon.sessions.contains_key(&migration))
    }

    /// Pings a connection that must answer, from now on.
    pub(crate) fn watch(&mut self, at: HostId, connection: usize) {
        let purpose = self.network.connections[connection].purpose;
        if !matches!(purpose, Purpose::Control(_) | Purpose::Fetch(_) | Purpose::Faults { .. }) {
            return;
        }
        let heard = self.clock.now();
        let link = Link { heard, pinged: None, pings: 0, round_trips: VecDeque::new() };
        if let Some(daemon) = &mut self.hosts[at].daemon {
            daemon.links.insert(connection, link);
        }
        self.wake_now(at, Wake::Ping { connection });
    }

    pub(crate) fn ping(&mut self, at: HostId, connection: usize) {
        let (now, silence) = (self.clock.now(), self.plan.silence);
        let Some(daemon) = &mut self.hosts[at].daemon else { return };
        let Some(link) = daemon.links.get_mut(&connection) else { return };
        if now - link.heard > silence {
            self.close(connection, at);
            return self.lost(at, connection);
        }
        link.pings += 1;
        link.pinged = Some((link.pings, now));
        let number = link.pings;
        self.send_control(connection, at, &Control::Ping(number));
        self.wake_after(at, (silence / 5).min(Duration::from_secs(1)), Wake::Ping { connection });
    }

    pub(crate) fn ponged(&mut self, at: HostId, connection: usize, number: u64) {
        let now = self.clock.now();
        let Some(daemon) = &mut self.hosts[at].daemon else { return };
        let Some(link) = daemon.links.get_mut(&connection) else { return };
        let Some((_, pinged)) = link.pinged.take_if(|(pinged, _)| *pinged == number) else { return };
        if link.round_trips.len() == ROUND_TRIPS {
            link.round_trips.pop_front();
        }
        link.round_trips.push_back(now - pinged);
        let shortest = link.round_trips.iter().min().copied();
        let sessions = daemon.sessions.values_mut().filter(|session| session.is_over_connection(connection));
        for session in sessions {
            if let Role::Source(work) = &mut session.role {
                work.control_round_trip = shortest;
            }
        }
    }

    pub(crate) fn hand_over(&mut self, at: HostId, connection: usize) {
        let purpose = self.network.connections[connection].purpose;
        let Some(migration) = migration_of_lane(purpose) else { return };
        self.with_session(at, migration, |world, session| {
            let mut bench = world.bench(at, session.vmm);
            if let Some(sender) = sender_of(session, purpose) {
                sender.hand_over(connection, &mut bench);
            }
        });
    }

    pub(crate) fn check_lane(&mut self, at: HostId, connection: usize) {
        let purpose = self.network.connections[connection].purpose;
        let Some(migration) = migration_of_lane(purpose) else { return };
        let mut silent = false;
        self.with_session(at, migration, |world, session| {
            let mut bench = world.bench(at, session.vmm);
            silent = sender_of(session, purpose).is_some_and(|sender| sender.check(connection, &mut bench));
        });
        if silent {
            self.trace.note(self.clock.now(), || format!("host {at} gives up a silent lane, {purpose:?}"));
            self.close(connection, at);
            self.lost(at, connection);
        }
    }
}

/// Returns what sends over lanes of this purpose.
fn sender_of(session: &mut Session, purpose: Purpose) -> Option<&mut Sender> {
    match purpose {
        Purpose::Lane { .. } => session.sender_mut(),
        _ => session.serving.as_mut().map(|serving| &mut serving.sender),
    }
}

fn migration_of_lane(purpose: Purpose) -> Option<MigrationId> {
    match purpose {
        Purpose::Lane { migration, .. } | Purpose::FetchLane { migration, .. } => Some(migration),
        _ => None,
    }
}

/// Returns the path of a connection. The first is that between the daemons' own addresses.
fn path_of(purpose: Purpose) -> usize {
    match purpose {
        Purpose::Lane { path, .. } | Purpose::FetchLane { path, .. } | Purpose::Faults { path, .. } => path,
        Purpose::Control(_) | Purpose::Fetch(_) | Purpose::Word(_) => 0,
    }
}
