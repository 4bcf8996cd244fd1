//! The destination fetches what is missing while the guest runs. This is a model of
//! `daemon/migrate/src/destination/postcopy.rs`, `daemon/migrate/src/fetch.rs`,
//! `daemon/migrate/src/effects/lost.rs` and `daemon/lane/src/postcopy/`.

use std::collections::BTreeSet;

use memlane_protocol::PageSet;
use memlane_protocol::handover::{Event as Told, Phase, Record};
use memlane_protocol::wire::control::Control;
use memlane_protocol::wire::frame::{Content, Run};

use crate::destination::Work;
use crate::event::{Answer, HostId};
use crate::network::Payload;
use crate::plant::Plant;
use crate::session::{Busy, Reach, Role, Session};
use crate::switchover::missing;
use crate::vmm::{Command, State};
use crate::world::World;

/// The post-copy of one guest at its destination, if there is one.
#[derive(Debug, Default)]
pub(crate) struct Postcopy {
    pub fetching: Option<Fetching>,
    /// The source's session until it has heard that the last page came.
    fetched: Option<FetchSession>,
}

/// A guest whose memory is not all here.
#[derive(Debug)]
pub(crate) struct Fetching {
    pub missing: PageSet,
    /// All missing pages are known.
    pub known: bool,
    /// Accesses wait for these.
    awaited: BTreeSet<u64>,
    session: Option<FetchSession>,
}

/// The source's connection, with its lanes.
#[derive(Debug, Default)]
struct FetchSession {
    link: usize,
    faults: Option<usize>,
    lanes: Vec<(u16, usize)>,
}

impl Fetching {
    /// Nothing is missing yet.
    pub(crate) fn new(pages: u64) -> Self {
        Self { missing: PageSet::new(pages), known: false, awaited: BTreeSet::new(), session: None }
    }

    /// Tells whether this is the source's lane for pages that are waited for.
    pub(crate) fn is_for_faults(&self, connection: usize) -> bool {
        self.session.as_ref().is_some_and(|session| session.faults == Some(connection))
    }
}

impl World {
    /// Takes the source's offer to serve what is missing.
    pub(crate) fn fetch_over(&mut self, at: HostId, session: &mut Session, connection: usize) {
        let copying = session.machine.phase() == Phase::Copying;
        let may_begin = matches!(&session.role, Role::Destination(work) if copying && !work.loaded);
        if session.postcopy.fetching.is_some() {
            self.accept_fetch(at, session, connection);
        } else if may_begin {
            let ticket = self.ticket();
            session.busy = Some((ticket, Busy::Destination(Work::Open(connection))));
            self.command(session.vmm, Command::OpenMemory, session.asker(at, ticket));
        } else {
            self.close(connection, at);
        }
    }

    pub(crate) fn accept_fetch(&mut self, at: HostId, session: &mut Session, link: usize) {
        let Some(fetching) = &mut session.postcopy.fetching else { return };
        let before = fetching.session.replace(FetchSession { link, ..FetchSession::default() });
        let all = fetching.known.then(|| missing(&fetching.missing));
        self.close_fetch(at, before);
        self.send(link, at, Payload::Answer { accepted: true });
        if let Some(all) = all {
            self.send_control(link, at, &Control::Missing(all));
        }
    }

    /// All missing pages are known.
    pub(crate) fn all_known(&mut self, at: HostId, session: &mut Session) {
        let Some(fetching) = &mut session.postcopy.fetching else { return };
        fetching.known = true;
        let all = missing(&fetching.missing);
        let link = fetching.session.as_ref().map(|session| session.link);
        let memory = &self.vmms[session.vmm].memory;
        let present = fetching.missing.runs().flatten().find(|page| !memory.is_hole(*page));
        if let Some(link) = link {
            self.send_control(link, at, &Control::Missing(all));
        }
        if let Some(page) = present {
            self.violated(format!("page {page} is missing at the destination, and present"));
        }
    }

    /// Makes the VMM's memory as any other, because no guest comes after all.
    pub(crate) fn withdraw(&mut self, at: HostId, session: &mut Session) {
        if let Some(fetching) = session.postcopy.fetching.take() {
            (session.placing, session.fetching) = (false, false);
            self.close_fetch(at, fetching.session);
            self.vmms[session.vmm].memory.waits = false;
        }
    }

    fn close_fetch(&mut self, at: HostId, session: Option<FetchSession>) {
        let Some(FetchSession { link, faults, lanes }) = session else { return };
        let lanes = lanes.into_iter().map(|(_, connection)| connection);
        let all: Vec<usize> = lanes.chain(faults).chain([link]).collect();
        all.into_iter().for_each(|connection| self.close(connection, at));
    }

    /// A lane of the source's session has come; the one for faults if it has no number.
    pub(crate) fn fetch_lane(
        &mut self,
        at: HostId,
        session: &mut Session,
        (connection, link): (usize, usize),
        number: Option<u16>,
    ) {
        let fetching = session.postcopy.fetching.as_mut();
        let known = fetching.filter(|it| it.session.as_ref().is_some_and(|fetch| fetch.link == link));
        let Some(fetching) = known else { return self.close(connection, at) };
        let Fetching { known, awaited, session: Some(fetch), .. } = fetching else { return };
        match number {
            Some(number) => fetch.lanes.push((number, connection)),
            None => {
                fetch.faults = Some(connection);
                let awaited: Vec<u64> = awaited.iter().copied().filter(|_| *known).collect();
                for page in awaited {
                    self.send(connection, at, Payload::Request(page));
                }
            }
        }
    }

    /// A lane or the link of the source's session is lost.
    pub(crate) fn fetch_lost(&mut self, at: HostId, session: &mut Session, connection: usize) {
        let Some(fetching) = &mut session.postcopy.fetching else { return };
        let Some(fetch) = &mut fetching.session else { return };
        fetch.lanes.retain(|(_, lane)| *lane != connection);
        if fetch.link == connection || fetch.faults == Some(connection) {
            // The source opens everything anew.
            let lost = fetching.session.take();
            self.close_fetch(at, lost);
        }
    }

    /// The source has lost a lane of its session.
    pub(crate) fn fetch_hears(
        &mut self,
        at: HostId,
        session: &mut Session,
        connection: usize,
        message: &Control,
    ) {
        let fetching = session.postcopy.fetching.as_mut();
        let Some(fetch) = fetching.and_then(|fetching| fetching.session.as_mut()) else { return };
        let Control::LaneLost(lost) = message else { return };
        if fetch.link != connection {
            return;
        }
        let gone: Vec<usize> =
            fetch.lanes.extract_if(.., |(lane, _)| lane == lost).map(|(_, connection)| connection).collect();
        gone.into_iter().for_each(|connection| self.close(connection, at));
    }

    /// Places the pages of a frame that are missing, each at most once.
    pub(crate) fn place(&mut self, vmm: usize, fetching: &mut Fetching, runs: &[Run], versions: &[u32]) {
        let pages = runs.iter().flat_map(|run| run.pages.clone().map(move |page| (page, run.content)));
        for ((page, content), version) in pages.zip(versions) {
            let missing = fetching.missing.contains(page);
            if !missing && self.plant != Plant::PostcopyPagePlacedTwice {
                continue;
            }
            fetching.missing.remove_range(page..page + 1);
            let awaited = fetching.awaited.remove(&page);
            if self.plant == Plant::PostcopyPageDropped && page % 7 == 3 && !self.is_waited_for(vmm, page) {
                continue;
            }
            self.check_placed(vmm, page, *version);
            // What is a hole at the source stays one, unless it is waited for.
            if content != Content::Hole || awaited {
                self.vmms[vmm].memory.put(page, *version);
            }
        }
    }

    /// The guest, or its VMM, waits for a page.
    pub(crate) fn page_fault(&mut self, vmm: usize, page: u64) {
        let at = self.vmms[vmm].host;
        let Self { hosts, vmms, .. } = self;
        let Some(daemon) = &mut hosts[at].daemon else { return };
        let mut sessions = daemon.sessions.values_mut().filter(|session| session.vmm == vmm);
        let Some(fetching) = sessions.find_map(|session| session.postcopy.fetching.as_mut()) else { return };
        if !fetching.missing.contains(page) {
            // It is a hole at the source too, and becomes zeros.
            return vmms[vmm].memory.put(page, 0);
        }
        let fresh = fetching.awaited.insert(page);
        let faults = fetching.session.as_ref().and_then(|session| session.faults);
        if let Some(faults) = faults.filter(|_| fresh) {
            self.send(faults, at, Payload::Request(page));
        }
    }

    /// Ends fetching if nothing is missing any more.
    pub(crate) fn complete(&mut self, at: HostId, session: &mut Session) -> Option<Told> {
        let vmm = session.vmm;
        let whole = |fetching: &mut Fetching| fetching.known && fetching.missing.is_empty();
        let fetching = session.postcopy.fetching.take_if(whole)?;
        self.trace.note(self.clock.now(), || format!("host {at}: nothing is missing any more"));
        session.postcopy.fetched = fetching.session;
        self.vmms[vmm].memory.waits = false;
        self.check_whole(vmm);
        session.fetching = false;
        if session.record == Some(Record::Running) {
            self.note_whole(at, session);
            return None;
        }
        Some(Told::Complete)
    }

    /// Notes that nothing is missing any more. Until that is durable, the source must keep what it has.
    pub(crate) fn note_whole(&mut self, at: HostId, session: &mut Session) {
        let note = (Record::Running, false, session.vmm);
        let ticket = self.write(at, session.migration, Some(note));
        session.busy = Some((ticket, Busy::Whole));
    }

    /// Accesses to what is missing fail from now on.
    pub(crate) fn poison(&mut self, session: &Session) {
        if self.vmms[session.vmm].state == State::Running {
            self.vmms[session.vmm].poisoned = true;
        }
    }

    /// Asks a VMM for the userfaultfd that it keeps, if an earlier daemon was fetching. Returns whether it was asked.
    pub(crate) fn reopen(&mut self, at: HostId, session: &mut Session, returns: bool) -> bool {
        if session.machine.is_source() || !session.fetching || session.placing {
            return false;
        }
        let ticket = self.ticket();
        session.busy = Some((ticket, Busy::Reopen { returns }));
        self.command(session.vmm, Command::ReopenMemory, session.asker(at, ticket));
        true
    }

    /// The VMM has handed over the userfaultfd that it keeps, or has not.
    pub(crate) fn reopened(&mut self, session: &mut Session, answer: Answer) {
        session.unknown_pages = answer != Answer::Done;
        if answer == Answer::Done {
            self.fetch_holes(session);
        }
    }

    /// Does the same for a QEMU whose monitor does not answer: its shim has a thread of its own.
    pub(crate) fn reopen_without_monitor(&mut self, session: &mut Session) {
        let vmm = &self.vmms[session.vmm];
        let wanted = session.reach == Reach::Away && session.fetching && !session.placing;
        let has_shim = !self.plan.linked && vmm.keeps && vmm.state != State::Ended;
        if wanted && has_shim && !session.machine.is_source() && self.plant != Plant::HangingVmmNotServed {
            self.fetch_holes(session);
        }
    }

    /// Goes on with what an earlier daemon was fetching: what memory does not hold is missing.
    fn fetch_holes(&mut self, session: &mut Session) {
        let vmm = session.vmm;
        let mut fetching = Fetching { known: true, ..Fetching::new(self.plan.pages) };
        let memory = &mut self.vmms[vmm].memory;
        memory.waits = true;
        let holes = (0..self.plan.pages).filter(|page| memory.is_hole(*page));
        for page in holes.filter(|page| self.plant != Plant::HolesTakenForWhole || page % 5 > 0) {
            fetching.missing.insert(page);
        }
        // The kernel has reported accesses to a daemon that is no more. It reports them again.
        let waiting = self.vcpus.iter().filter_map(|vcpu| vcpu.waits_for);
        let waiting = waiting.filter(|(there, _)| *there == vmm).map(|(_, page)| page);
        fetching.awaited =
            waiting.chain(self.vmms[vmm].hangs).filter(|page| fetching.missing.contains(*page)).collect();
        self.trace.note(self.clock.now(), || {
            format!("migration {} goes on to fetch {} pages", session.migration, fetching.missing.count())
        });
        self.tally.reopened += 1;
        session.placing = true;
        session.unknown_pages = false;
        session.postcopy.fetching = Some(fetching);
    }
}
