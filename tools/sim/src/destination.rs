//! The destination: does what the source says while it copies. This is a model of
//! `daemon/migrate/src/destination/mod.rs` and `daemon/migrate/src/destination/receive.rs`.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use memlane_protocol::handover::{Event as Told, Message, Phase};
use memlane_protocol::wire::control::{Control, Missing};
use memlane_protocol::wire::frame::{Content, FRAME_HEADER_BYTES, Frame};

use crate::event::{Answer, HostId, Wake};
use crate::fetch::Fetching;
use crate::network::Payload;
use crate::session::{Busy, Reach, Role, Session};
use crate::vmm::{Bond, Command};
use crate::world::World;

/// What the destination works with.
#[derive(Debug, Default)]
pub(crate) struct DestinationWork {
    /// The lanes by their numbers, which are closed for good once they were lost.
    pub lanes: Vec<(u16, usize)>,
    closed: BTreeSet<u16>,
    pub loaded: bool,
    load_began: Duration,
}

/// What the destination is at, while everything else waits.
#[derive(Debug)]
pub(crate) enum Work {
    Holes(Vec<Range<u64>>),
    Drop(Missing),
    Open(usize),
    Load,
    Prepare,
}

/// Returns the destination's work of a session that has it.
pub(crate) fn work(session: &mut Session) -> &mut DestinationWork {
    match &mut session.role {
        Role::Destination(work) => work,
        _ => unreachable!("only a destination works at this"),
    }
}

impl World {
    pub(crate) fn destination_hears(
        &mut self,
        at: HostId,
        session: &mut Session,
        message: Control,
    ) -> Option<Told> {
        if let Control::Handover { message, .. } = message {
            return Some(Told::Message(message));
        }
        if session.machine.phase() != Phase::Copying {
            return Some(self.peer_lost(at, session));
        }
        match message {
            Control::LaneLost(lane) => {
                self.close_lane(at, session, lane);
                self.tell_peer(at, session, &Control::LaneClosed(lane));
            }
            Control::Patience { milliseconds } => {
                session.patience = Duration::from_millis(milliseconds.into());
            }
            Control::Holes(holes) => self.work_for(at, session, Work::Holes(holes)),
            Control::Missing(missing) => {
                let fetching = &session.postcopy.fetching;
                if fetching.as_ref().is_none_or(|fetching| fetching.known) {
                    return Some(Told::Failed);
                }
                self.work_for(at, session, Work::Drop(missing));
            }
            Control::Refuse(_) => return Some(Told::Failed),
            Control::State { .. } => {
                self.load(at, session);
                return Some(Told::Loading);
            }
            _ => {}
        }
        None
    }

    /// Does something that takes a while, and nothing else meanwhile.
    fn work_for(&mut self, at: HostId, session: &mut Session, work: Work) {
        let ticket = self.ticket();
        session.busy = Some((ticket, Busy::Destination(work)));
        let wait = self.dice.about(self.plan.command_time, 90);
        self.wake_after(at, wait, Wake::Worked { migration: session.migration, ticket });
    }

    fn close_lane(&mut self, at: HostId, session: &mut Session, number: u16) {
        let work = work(session);
        work.closed.insert(number);
        let gone: Vec<usize> = work
            .lanes
            .extract_if(.., |(lane, _)| *lane == number)
            .map(|(_, connection)| connection)
            .collect();
        gone.into_iter().for_each(|connection| self.close(connection, at));
    }

    pub(crate) fn take_lane(&mut self, at: HostId, session: &mut Session, connection: usize, number: u16) {
        let copying = session.machine.phase() == Phase::Copying;
        match &mut session.role {
            Role::Destination(work) if copying && !work.loaded && !work.closed.contains(&number) => {
                work.lanes.push((number, connection));
            }
            _ => self.close(connection, at),
        }
    }

    /// Loads the state, after the last lane has let go of the guest's memory.
    fn load(&mut self, at: HostId, session: &mut Session) {
        self.close_receivers(at, session);
        work(session).loaded = true;
        work(session).load_began = self.clock.now();
        self.all_known(at, session);
        let ticket = self.ticket();
        session.busy = Some((ticket, Busy::Destination(Work::Load)));
        self.command(session.vmm, Command::Load, session.asker(at, ticket));
    }

    fn close_receivers(&mut self, at: HostId, session: &mut Session) {
        for (_, connection) in std::mem::take(&mut work(session).lanes) {
            self.close(connection, at);
        }
    }

    /// Something that took a while is done.
    pub(crate) fn destination_did(&mut self, at: HostId, session: &mut Session, done: Work, answer: Answer) {
        let vmm = session.vmm;
        if answer != Answer::Done {
            if let Work::Open(connection) = done {
                self.send(connection, at, Payload::Answer { accepted: false });
                return self.close(connection, at);
            }
            if answer == Answer::Failed {
                work(session).loaded = false;
            }
            return session.event(Told::Failed);
        }
        match done {
            Work::Holes(holes) => {
                holes.into_iter().flatten().for_each(|page| self.vmms[vmm].memory.punch(page));
                self.tell_peer(at, session, &Control::HolesDone);
            }
            Work::Drop(missing) => {
                let Some(fetching) = &session.postcopy.fetching else { return };
                for run in missing.runs() {
                    fetching.missing.insert_range(run.clone());
                    run.for_each(|page| self.vmms[vmm].memory.punch(page));
                }
                self.tell_peer(at, session, &Control::MissingDone);
            }
            Work::Open(connection) => {
                session.placing = true;
                session.fetching = true;
                session.postcopy.fetching = Some(Fetching::new(self.plan.pages));
                self.accept_fetch(at, session, connection);
            }
            Work::Load => {
                let ticket = self.ticket();
                session.busy = Some((ticket, Busy::Destination(Work::Prepare)));
                let bond = Bond { migration: session.migration, fetching: session.fetching };
                self.command(vmm, Command::Prepare(bond), session.asker(at, ticket));
            }
            Work::Prepare => {
                session.load_time = self.clock.now() - work(session).load_began;
                session.event(Told::Loaded);
            }
        }
    }

    pub(crate) fn before_destination(&mut self, at: HostId, session: &mut Session, event: Told) {
        let fatal =
            matches!(event, Told::PeerLost | Told::Failed | Told::VmmGone | Told::Message(Message::Abort));
        if !fatal || session.machine.phase() != Phase::Copying {
            return;
        }
        self.close_receivers(at, session);
        self.withdraw(at, session);
        let vmm = session.vmm;
        if !work(session).loaded && !self.plan.launched && session.reach == Reach::Attached {
            session.reach = Reach::Released;
            (0..self.plan.pages).for_each(|page| self.vmms[vmm].memory.punch(page));
        }
    }

    /// A lane has ended.
    pub(crate) fn lane_lost(&mut self, session: &mut Session, connection: usize) {
        if let Role::Destination(work) = &mut session.role {
            work.lanes.retain(|(_, lane)| *lane != connection);
        }
    }

    /// Takes a frame: in pre-copy into memory as it is, in post-copy what is missing of it.
    pub(crate) fn take_frame(
        &mut self,
        at: HostId,
        session: &mut Session,
        connection: usize,
        (head, versions): (&[u8], &[u32]),
    ) {
        let (vmm, pages) = (session.vmm, self.plan.pages);
        let frame = Frame::decode_any(&head[..FRAME_HEADER_BYTES]).expect("the header is the protocol's own");
        let mut runs = Vec::new();
        frame
            .decode_runs(&head[FRAME_HEADER_BYTES..], pages, &mut runs)
            .expect("the table is the protocol's own");
        let number = |work: &DestinationWork| work.lanes.iter().any(|(_, lane)| *lane == connection);
        let is_lane = matches!(&session.role, Role::Destination(work) if number(work));
        if is_lane {
            let contents = runs.iter().flat_map(|run| run.pages.clone().map(move |page| (page, run.content)));
            for ((page, content), version) in contents.zip(versions) {
                match content {
                    Content::Hole => self.vmms[vmm].memory.punch(page),
                    _ => self.vmms[vmm].memory.put(page, *version),
                }
            }
        } else if let Some(fetching) = &mut session.postcopy.fetching {
            self.place(vmm, fetching, &runs, versions);
            if fetching.is_for_faults(connection) {
                return;
            }
        } else {
            return;
        }
        self.send(connection, at, Payload::Ack(frame.sequence));
    }
}
