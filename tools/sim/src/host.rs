//! Hosts: each has a journal, which survives its daemon, and a daemon, which loses everything else.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use memlane_protocol::convergence::Predictor;
use memlane_protocol::handover::{Destination, Record, Source};

use crate::event::{Event, HostId, MigrationId, Wake};
use crate::invariants::Loss;
use crate::network::Payload;
use crate::plant::Plant;
use crate::session::{Input, Machine, Reach, Role, Session};
use crate::vmm::State;
use crate::world::World;

/// What the journal has of a migration: the record, whether pages are missing, and the VMM.
pub(crate) type Entry = (Record, bool, usize);

/// One host.
#[derive(Debug, Default)]
pub(crate) struct Host {
    pub daemon: Option<Daemon>,
    /// The number of the daemon's life.
    pub epoch: u32,
    /// What is durable.
    pub journal: BTreeMap<MigrationId, Entry>,
    /// What is being written.
    pub writing: BTreeMap<MigrationId, Option<Entry>>,
    /// The daemon stands still until this time, and this waits for it.
    pub stands_still: Option<Duration>,
    pub waiting: VecDeque<Wake>,
    /// The daemon stood still last at this time.
    pub stood_still: Option<Duration>,
    /// The words that are to go over connections that are being dialled.
    pub words: BTreeMap<MigrationId, Payload>,
}

/// A daemon, as long as it lives.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub started: Duration,
    pub sessions: BTreeMap<MigrationId, Session>,
    /// These have ended since the daemon started.
    pub ended: BTreeSet<MigrationId>,
    pub preflights: BTreeMap<MigrationId, Preflight>,
    pub predictor: Predictor,
    /// What is known of connections that are pinged.
    pub links: BTreeMap<usize, Link>,
}

/// An order of which it is not known yet whether it can be carried out.
#[derive(Debug)]
pub(crate) struct Preflight {
    pub vmm: usize,
    pub link: Option<usize>,
    pub accepted: bool,
    pub dialled: usize,
    pub lanes: Vec<(usize, u16, usize)>,
}

/// A connection on which something must be heard again and again.
#[derive(Debug)]
pub(crate) struct Link {
    pub heard: Duration,
    pub pinged: Option<(u64, Duration)>,
    pub pings: u64,
    pub round_trips: VecDeque<Duration>,
}

impl Host {
    /// Tells whether nothing at the host is in the way of another order: a destination whose source was lost makes way.
    pub(crate) fn takes_orders(&self) -> bool {
        let makes_way = |session: &Session| session.suspension.is_some() && !session.machine.is_source();
        let free = |daemon: &Daemon| daemon.sessions.values().all(makes_way) && daemon.preflights.is_empty();
        self.daemon.as_ref().is_some_and(free)
    }
}

impl Daemon {
    fn new(started: Duration) -> Self {
        Self {
            started,
            sessions: BTreeMap::new(),
            ended: BTreeSet::new(),
            preflights: BTreeMap::new(),
            predictor: Predictor::new(),
            links: BTreeMap::new(),
        }
    }
}

impl World {
    /// Starts a daemon, which takes up what the journal has.
    pub(crate) fn start_daemon(&mut self, at: HostId) {
        if self.hosts[at].daemon.is_some() {
            return;
        }
        self.trace.note(self.clock.now(), || format!("host {at}: the daemon starts"));
        let host = &mut self.hosts[at];
        host.epoch += 1;
        host.daemon = Some(Daemon::new(self.clock.now()));
        for (migration, (record, fetching, vmm)) in host.journal.clone() {
            self.tally.recovered += 1;
            self.take_up(at, migration, vmm, Some(record), fetching);
        }
        for vmm in self.vmms_of(at) {
            let wait = self.dice.time(Duration::ZERO, self.plan.attach_time);
            self.clock.after(wait, Event::Attach { vmm });
        }
    }

    /// Takes up a migration that was in doubt. With no record, its VMM has named it.
    pub(crate) fn take_up(
        &mut self,
        at: HostId,
        migration: MigrationId,
        vmm: usize,
        record: Option<Record>,
        fetching: bool,
    ) {
        let is_source = match record {
            Some(record) => record.is_of_source(),
            None => matches!(self.vmms[vmm].state, State::Paused | State::Relinquished),
        };
        let (machine, actions) = if is_source {
            let (source, actions) = Source::recover(record).expect("the record is a source's");
            (Machine::Source(source), actions)
        } else {
            let (destination, actions) = Destination::recover(record).expect("the record is a destination's");
            (Machine::Destination(destination), actions)
        };
        let role = Role::Recovery { serve: false };
        let mut session = Session::new(migration, machine, vmm, role).recovered(record, fetching, actions);
        session.attachment = self.vmms[vmm].attachment;
        if self.vmms[vmm].attached.is_none() {
            session.reach = Reach::Away;
        } else if !self.reopen(at, &mut session, false) {
            let told = self.told_by(&mut session);
            told.into_iter().for_each(|told| session.event(told));
        }
        if self.vmms[vmm].state == State::Ended {
            session.input(Input::VmmEnded);
        }
        if let Some(daemon) = &mut self.hosts[at].daemon {
            daemon.sessions.insert(migration, session);
        }
        self.pump(at, migration);
    }

    /// The daemon ends without warning. Of what was being written, some may be durable.
    pub(crate) fn crash(&mut self, at: HostId) {
        if self.hosts[at].daemon.take().is_none() {
            return;
        }
        self.tally.crashes += 1;
        self.trace.note(self.clock.now(), || format!("host {at}: the daemon crashes"));
        let host = &mut self.hosts[at];
        host.epoch += 1;
        (host.stands_still, host.stood_still) = (None, Some(self.clock.now()));
        host.waiting.clear();
        host.words.clear();
        for (migration, entry) in std::mem::take(&mut host.writing) {
            // Not at all, or in part, which is found out by its sum and taken for not at all; or as a whole.
            if self.dice.permille(500) {
                self.declined |= matches!(entry, Some((Record::Declined, ..)));
                set(&mut host.journal, migration, entry);
            }
        }
        for connection in 0..self.network.connections.len() {
            // The kernel may send what waits in its buffers, or not.
            if self.network.is_open(connection, at) {
                self.close(connection, at);
            }
        }
        for vmm in self.vmms_of(at) {
            if self.plant == Plant::MissingReadsAsZero {
                self.vmms[vmm].memory.waits = false;
            }
            self.hang(vmm);
            self.disconnect(vmm, false);
        }
        self.note_losses_of_crash(at);
        let wait = self.dice.time(Duration::from_millis(100), Duration::from_secs(2));
        self.clock.after(wait, Event::Restart(at));
    }

    fn note_losses_of_crash(&mut self, at: HostId) {
        for (migration, (record, _, vmm)) in self.hosts[at].journal.clone() {
            let there = &self.vmms[vmm];
            if record == Record::Running && there.state == State::Ended {
                // Whether it had been told to run, the next daemon does not know.
                self.losses.push(Loss::VmmOfGuest);
            }
            let source_memory = record == Record::Committed && there.state == State::Ended;
            if source_memory && self.is_fetching(migration) {
                self.losses.push(Loss::MemoryAtSource);
            }
        }
    }

    /// Tells whether the guest of a migration runs, or is to run, without all of its memory.
    pub(crate) fn is_fetching(&self, migration: MigrationId) -> bool {
        let of_journal = self.hosts.iter().filter_map(|host| host.journal.get(&migration));
        let noted = of_journal.into_iter().any(|(_, fetching, _)| *fetching);
        noted || self.vmms.iter().any(|vmm| vmm.memory.waits)
    }

    /// Returns the VMMs that are, or were, on a host.
    pub(crate) fn vmms_of(&self, at: HostId) -> Vec<usize> {
        (0..self.vmms.len()).filter(|vmm| self.vmms[*vmm].host == at).collect()
    }

    /// Begins to write to the journal.
    pub(crate) fn write(&mut self, at: HostId, migration: MigrationId, entry: Option<Entry>) -> u64 {
        let ticket = self.ticket();
        self.hosts[at].writing.insert(migration, entry);
        let written = !(self.troubled() && entry.is_some() && self.dice.permille(self.plan.journal_fails));
        let wait = self.dice.about(self.plan.sync_time, self.plan.sync_jitter);
        self.wake_after(at, wait, Wake::Journalled { migration, ticket, written });
        ticket
    }

    /// The journal has written, or has failed and undone what it wrote.
    pub(crate) fn written(&mut self, at: HostId, migration: MigrationId, written: bool) {
        let host = &mut self.hosts[at];
        if let Some(entry) = host.writing.remove(&migration).filter(|_| written) {
            set(&mut host.journal, migration, entry);
        }
    }
}

fn set(journal: &mut BTreeMap<MigrationId, Entry>, migration: MigrationId, entry: Option<Entry>) {
    match entry {
        Some(entry) => _ = journal.insert(migration, entry),
        None => _ = journal.remove(&migration),
    }
}
