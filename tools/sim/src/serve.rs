//! The source serves what is missing at the destination. This is a model of `daemon/migrate/src/source/serve.rs` and of
//! `PageServer` of `daemon/lane`.

use std::time::Duration;

use memlane_protocol::wire::control::{Control, Missing};
use memlane_protocol::wire::frame::{Content, Run, encode_head};

use crate::event::{HostId, Wake};
use crate::lane::Sender;
use crate::network::{Payload, Purpose};
use crate::outbound::Outbound;
use crate::session::{Session, identity};
use crate::world::World;

/// The answer of the destination may take this long.
const ANSWER: Duration = Duration::from_secs(15);
/// The lanes are looked at in these intervals.
const LOOK: Duration = Duration::from_millis(100);
/// A lost session is opened again after this time.
const AGAIN: Duration = Duration::from_millis(500);

/// Serves until it is dropped.
#[derive(Debug)]
pub(crate) struct Serving {
    state: State,
    pub sender: Sender,
    link: Option<usize>,
    pub faults: Option<usize>,
    /// This number of tries, and of lanes that are being opened.
    ticket: u64,
    dialled: usize,
    sequence: u64,
    /// The first session is not open yet, and must not fail.
    first: bool,
    failed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Dialling,
    Asked,
    Opening,
    Open,
    Waiting,
}

impl World {
    /// Begins to serve. If it is the `first` time, the migration depends on it.
    pub(crate) fn begin_to_serve(&mut self, at: HostId, session: &mut Session, first: bool) {
        let serving = Serving {
            state: State::Dialling,
            sender: self.serving_sender(),
            link: None,
            faults: None,
            ticket: 0,
            dialled: 0,
            sequence: 0,
            first,
            failed: false,
        };
        session.serving = Some(serving);
        self.tally.postcopies += u64::from(first);
        self.dial_to_serve(at, session);
    }

    fn serving_sender(&self) -> Sender {
        let mut outbound = Outbound::of_paused_guest(self.plan.pages);
        outbound.sparse = true;
        Sender::new(outbound, 1..self.network.paths.len())
    }

    /// Tells whether the first session is open, or has failed.
    pub(crate) fn is_serving(&self, session: &Session) -> Option<bool> {
        let serving = session.serving.as_ref()?;
        match serving.state {
            State::Open => Some(true),
            _ if serving.failed => Some(false),
            _ => None,
        }
    }

    pub(crate) fn end_serving(&mut self, at: HostId, session: &mut Session) {
        if let Some(mut serving) = session.serving.take() {
            self.close_serving(at, &mut serving);
        }
    }

    fn close_serving(&mut self, at: HostId, serving: &mut Serving) {
        let lanes = serving.sender.lanes.drain(..).map(|lane| lane.connection);
        let connections: Vec<usize> = lanes.chain(serving.faults.take()).chain(serving.link.take()).collect();
        for connection in connections {
            self.close(connection, at);
        }
    }

    fn dial_to_serve(&mut self, at: HostId, session: &mut Session) {
        let (migration, ticket) = (session.migration, self.ticket());
        let Some(serving) = &mut session.serving else { return };
        (serving.state, serving.ticket) = (State::Dialling, ticket);
        self.dial(at, Purpose::Fetch(migration));
        self.wake_after(at, ANSWER, Wake::ServeAgain { migration, ticket });
    }

    /// The session is lost: another one is opened after a while.
    pub(crate) fn serve_again(&mut self, at: HostId, session: &mut Session, ticket: u64) {
        let Some(serving) = session.serving.as_ref().filter(|serving| serving.ticket == ticket) else {
            return;
        };
        match serving.state {
            State::Waiting => self.dial_to_serve(at, session),
            State::Open => {}
            _ => self.lose_serving(at, session),
        }
    }

    fn lose_serving(&mut self, at: HostId, session: &mut Session) {
        let (migration, ticket, sender) = (session.migration, self.ticket(), self.serving_sender());
        let Some(mut serving) = session.serving.take() else { return };
        self.trace.note(self.clock.now(), || format!("host {at} migration {migration} cannot serve"));
        self.close_serving(at, &mut serving);
        serving.failed = serving.first;
        (serving.state, serving.ticket, serving.sender) = (State::Waiting, ticket, sender);
        if !serving.failed {
            self.wake_after(at, AGAIN, Wake::ServeAgain { migration, ticket });
        }
        session.serving = Some(serving);
    }

    /// What was dialled to serve is there, or not to be had.
    pub(crate) fn serve_dialled(
        &mut self,
        at: HostId,
        session: &mut Session,
        purpose: Purpose,
        connection: Option<usize>,
    ) {
        let (migration, vmm, paths) = (session.migration, session.vmm, self.network.paths.len());
        let Some(serving) = &mut session.serving else {
            return connection.into_iter().for_each(|connection| self.close(connection, at));
        };
        match (purpose, connection) {
            (Purpose::Fetch(_), Some(link)) if serving.state == State::Dialling => {
                (serving.state, serving.link) = (State::Asked, Some(link));
                self.send_control(link, at, &Control::Fetch(identity(migration)));
            }
            (Purpose::Fetch(_), None) if serving.state == State::Dialling => self.lose_serving(at, session),
            (Purpose::Faults { session: of, .. } | Purpose::FetchLane { session: of, .. }, _)
                if serving.link == Some(of as usize)
                    && matches!(serving.state, State::Opening | State::Open) =>
            {
                match (purpose, connection) {
                    (Purpose::Faults { .. }, connection) => serving.faults = connection,
                    (Purpose::FetchLane { number, path, .. }, Some(connection)) => {
                        serving.sender.tried(path);
                        let mut bench = self.bench(at, vmm);
                        serving.sender.begin(connection, number, path, &mut bench);
                    }
                    (Purpose::FetchLane { path, .. }, None) => serving.sender.tried(path),
                    _ => {}
                }
                serving.dialled += 1;
                if serving.state == State::Opening && serving.dialled == paths {
                    let opened = serving.faults.is_some() && !serving.sender.lanes.is_empty();
                    if opened {
                        (serving.state, serving.first) = (State::Open, false);
                        self.trace
                            .note(self.clock.now(), || format!("host {at} migration {migration} serves"));
                        let ticket = serving.ticket;
                        self.wake_after(at, LOOK, Wake::LookAtServing { migration, ticket });
                    } else {
                        self.lose_serving(at, session);
                    }
                }
            }
            (_, connection) => connection.into_iter().for_each(|connection| self.close(connection, at)),
        }
    }

    /// Something came over the control link of the session.
    pub(crate) fn serving_hears(
        &mut self,
        at: HostId,
        session: &mut Session,
        connection: usize,
        payload: &Payload,
    ) {
        let (migration, vmm, paths) = (session.migration, session.vmm, self.network.paths.len());
        let Some(serving) = session.serving.as_mut().filter(|serving| serving.link == Some(connection))
        else {
            return;
        };
        match payload {
            Payload::Answer { accepted: true } if serving.state == State::Asked => {
                (serving.state, serving.dialled) = (State::Opening, 0);
                let faults = 1 + self.dice.below(paths as u64 - 1) as usize;
                let of = connection as u64;
                self.dial(at, Purpose::Faults { migration, path: faults, session: of });
                for path in 1..paths {
                    self.open_lane(at, migration, path, Some(of), &mut serving.sender);
                }
            }
            Payload::Answer { accepted: false } => self.lose_serving(at, session),
            Payload::Control(bytes) => {
                if let Control::Missing(missing) = Payload::decode(bytes) {
                    add(&missing, &mut serving.sender.outbound);
                    let mut bench = self.bench(at, vmm);
                    serving.sender.publish(0, &mut bench);
                }
            }
            _ => {}
        }
    }

    /// A connection of the session has ended.
    pub(crate) fn serving_lost(&mut self, at: HostId, session: &mut Session, connection: usize) {
        let vmm = session.vmm;
        let Some(serving) = &mut session.serving else { return };
        let essential = [serving.link, serving.faults].contains(&Some(connection));
        let link = serving.link;
        let lane = serving.sender.ended(connection);
        if let (Some(lane), Some(link)) = (lane, link) {
            // Bytes in some buffer may come late: they are the same as what comes again.
            serving.sender.outbound.take_back(lane, false);
            let mut bench = self.bench(at, vmm);
            serving.sender.publish(0, &mut bench);
            self.send_control(link, at, &Control::LaneLost(lane));
        }
        let serving = session.serving.as_ref().expect("it was there");
        let none_left = lane.is_some() && serving.state == State::Open && serving.sender.lanes.is_empty();
        if essential || none_left {
            self.lose_serving(at, session);
        }
    }

    /// The destination asks for a page that the guest waits for.
    pub(crate) fn page_requested(&mut self, at: HostId, session: &mut Session, connection: usize, page: u64) {
        let vmm = session.vmm;
        let Some(serving) = session.serving.as_mut().filter(|serving| serving.faults == Some(connection))
        else {
            return;
        };
        serving.sender.outbound.on_page_request(page);
        serving.sequence += 1;
        let content = match self.vmms[vmm].memory.content(page, false) {
            Content::Hole => Content::Zero,
            content => content,
        };
        let mut head = Vec::new();
        encode_head(&mut head, serving.sequence, &[Run { pages: page..page + 1, content }], None);
        let versions = vec![self.vmms[vmm].memory.version(page)];
        self.send(connection, at, Payload::Frame { head, versions });
    }

    /// Looks at the lanes of the session, now and then.
    pub(crate) fn look_at_serving(&mut self, at: HostId, session: &mut Session, ticket: u64) {
        let (migration, now) = (session.migration, self.clock.now());
        let Some(serving) = session.serving.as_mut().filter(|serving| serving.ticket == ticket) else {
            return;
        };
        let (State::Open, Some(link)) = (serving.state, serving.link) else { return };
        for path in serving.sender.missing_lanes(1, now) {
            self.open_lane(at, migration, path, Some(link as u64), &mut serving.sender);
        }
        self.wake_after(at, LOOK, Wake::LookAtServing { migration, ticket });
    }
}

fn add(missing: &Missing, outbound: &mut Outbound) {
    for run in missing.runs() {
        outbound.dirty.insert_range(run);
    }
}
