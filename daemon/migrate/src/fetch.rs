//! The destination fetches when the guest runs here, and part of its memory is only at the source.
//!
//! A [`Session`] is one connection of the source for control, and its lanes. Sessions come and go. Only the destination
//! knows what is missing, and tells it to each session anew.

use std::future::pending;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memlane_api::ids;
use memlane_guest::{DriverError, Guest, VmmMemory};
use memlane_kvm::ram::GuestRam;
use memlane_kvm::userfault::{self, Userfault, UserfaultError};
use memlane_lane::postcopy::{Faults, PostcopyIncoming};
use memlane_lane::{ReceiveState, Totals, Transport};
use memlane_net::link::{Link, LinkError};
use memlane_net::port::{ArrivedLane, LaneKind};
use memlane_net::task;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::MigrationId;
use memlane_protocol::wire::control::{Accept, Control, FetchReport, Missing};
use tokio::sync::{Notify, mpsc};
use tracing::{debug, info, warn};

use crate::context::Context;
use crate::lanes::{self, LaneEnd, Lanes};
use crate::missing::{NoSuchPage, heard, tell};
use crate::observer::Measurement;
use crate::progress::Progress;

/// A source may have this many lanes open.
const MOST_LANES: usize = 256;
/// The source gets a report in these intervals.
const REPORT: Duration = Duration::from_millis(200);

/// What is missing cannot be fetched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    /// The VMM does not hand over the descriptors from which its memory can be found.
    #[error("cannot have the guest's accesses wait: {0}")]
    Memory(#[from] DriverError),
    /// The kernel does not let accesses wait.
    #[error("cannot have the guest's accesses wait: {0}")]
    Wait(io::Error),
    /// The VMM's userfaultfd is of no use.
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
    /// Pages that are out of date cannot be dropped.
    #[error("cannot drop pages that are out of date: {0}")]
    Drop(io::Error),
    /// A page is there that should be missing, or that cannot be seen.
    #[error("{0}")]
    NotAHole(io::Error),
    /// The guest's memory is not right, and never will be.
    #[error("{0}")]
    Broken(String),
    /// The source named missing pages after it had said that it had named them all.
    #[error("the source adds missing pages when all were known")]
    AllKnown,
    /// The source named a page that the guest does not have.
    #[error(transparent)]
    NoSuchPage(#[from] NoSuchPage),
}

/// A guest whose memory is not all here.
pub(crate) struct Fetching {
    context: Rc<Context>,
    /// This is the name of the guest.
    name: Label,
    ram: Arc<GuestRam>,
    placing: Arc<PostcopyIncoming>,
    faults: Faults,
    /// This is notified when the lane for faults is lost.
    lost: Arc<Notify>,
    session: Option<FetchSession>,
    /// The guest runs without all of its memory since this moment.
    since: Option<Instant>,
    counted: FetchReport,
    /// This is notified when nothing is missing any more, and when memory is not right.
    bell: Arc<Notify>,
}

/// The source's connection, with its lanes.
pub(crate) struct FetchSession {
    link: Link,
    arriving: mpsc::Receiver<ArrivedLane>,
    lanes: Lanes,
    inbound: Arc<ReceiveState>,
    reported: Instant,
    /// This is true when the lane for faults has come: another takes its place only when it is lost.
    asks: bool,
}

impl Fetching {
    /// Makes the guest's memory such that accesses to missing pages wait. Nothing is missing yet.
    pub(crate) async fn open(context: Rc<Context>, guest: Rc<Guest>) -> Result<Self, FetchError> {
        guest.stop_prefault().await;
        let memory = guest.driver.open_memory(true).await;
        let memory = memory.map_err(FetchError::Memory)?;
        let (name, ram) = (guest.shape.name.clone(), memory.memory.ram().clone());
        let ((bell, ring), observer) = (lanes::bell(), context.faults.clone());
        let register = move || {
            let userfault =
                Userfault::from_fd_with_optional(memory.userfault, userfault::MISSING, userfault::POISON);
            let (userfault, _) = userfault?;
            PostcopyIncoming::new(userfault, memory.memory, ring, observer).map_err(FetchError::Wait)
        };
        let placing = Arc::new(task::aside(register).await?);
        match Self::with(context, (name, ram), placing.clone(), bell) {
            Ok(fetching) => Ok(fetching),
            Err(error) => {
                // Only this ends the waiting: the VMM keeps a copy of the userfaultfd.
                let _ = task::aside(move || placing.end()).await;
                Err(error)
            }
        }
    }

    /// Goes on with what a daemon was fetching that is no more: the guest `name`, whose VMM has kept its userfaultfd. What
    /// `memory` does not hold is missing.
    pub(crate) async fn again(
        context: Rc<Context>,
        name: Label,
        memory: VmmMemory,
    ) -> Result<Self, FetchError> {
        let ram = memory.memory.ram().clone();
        let ((bell, ring), observer) = (lanes::bell(), context.faults.clone());
        let look = move || {
            let userfault = Userfault::from_fd_set_up(memory.userfault)?;
            PostcopyIncoming::again(userfault, memory.memory, ring, observer).map_err(FetchError::Wait)
        };
        let placing = Arc::new(task::aside(look).await?);
        Self::with(context, (name, ram), placing, bell)
    }

    fn with(
        context: Rc<Context>,
        (name, ram): (Label, Arc<GuestRam>),
        placing: Arc<PostcopyIncoming>,
        bell: Arc<Notify>,
    ) -> Result<Self, FetchError> {
        let lost = Arc::new(Notify::new());
        let ring = lost.clone();
        let silence = context.limits().silence;
        let faults = Faults::start(placing.clone(), silence, move || ring.notify_one());
        let faults = faults.map_err(FetchError::Wait)?;
        let counted = FetchReport::default();
        Ok(Self { context, name, ram, placing, faults, lost, session: None, since: None, counted, bell })
    }

    /// Returns the pages that are missing.
    pub(crate) fn placing(&self) -> &Arc<PostcopyIncoming> {
        &self.placing
    }

    /// Takes the source's offer to serve over `link`, in place of any session before.
    pub(crate) async fn accept(&mut self, mut link: Link, peer: &Label, migration: MigrationId) {
        self.session = None;
        let token = ids::random();
        let arriving = self.context.rendezvous.await_lanes(token, peer.clone(), MOST_LANES);
        let accept = Control::Accept(Accept { token, ports: self.context.offered_ports() });
        if let Err(error) = link.send(&accept).await {
            return info!(guest = %self.name, %error, "the source went away");
        }
        if self.placing.is_known()
            && let Err(error) = tell_missing(&mut link, &self.placing).await
        {
            return info!(guest = %self.name, %error, "the source went away");
        }
        debug!(guest = %self.name, migration = ids::encode(&migration), "the source is about to serve missing pages");
        let lanes = Lanes::new(&self.context);
        let inbound = Arc::new(ReceiveState { ram: self.ram.clone(), postcopy: Some(self.placing.clone()) });
        self.session =
            Some(FetchSession { link, arriving, lanes, inbound, reported: Instant::now(), asks: false });
    }

    /// Notes that the source says that these pages are missing.
    ///
    /// # Errors
    ///
    /// Fails if all missing pages were known already, if the guest does not have these, or if they cannot be dropped.
    pub(crate) async fn add(&self, missing: Missing) -> Result<(), FetchError> {
        if self.placing.is_known() {
            return Err(FetchError::AllKnown);
        }
        let placing = self.placing.clone();
        task::aside(move || {
            let runs = heard(&missing, placing.pages())?;
            let added = runs.into_iter().try_for_each(|run| placing.add_missing(run));
            added.map_err(FetchError::Drop)
        })
        .await
    }

    /// Notes that all missing pages are known, so that they may come.
    pub(crate) async fn all_known(&mut self) {
        self.placing.all_known();
        self.faults.wake();
        if let Some(session) = &mut self.session
            && let Err(error) = tell_missing(&mut session.link, &self.placing).await
        {
            info!(guest = %self.name, %error, "the source cannot be told what is missing");
            self.session = None;
        }
    }

    /// Checks that there is nothing where pages are missing, while the guest has not run here. It runs on a thread of
    /// its own, because it looks at each run of missing pages.
    ///
    /// # Errors
    ///
    /// Fails if a page is there that should be missing.
    pub(crate) fn verify_holes(&self) -> impl Future<Output = Result<(), FetchError>> + use<> {
        let placing = self.placing.clone();
        let looking = tokio::task::spawn_blocking(move || placing.verify_holes());
        async move { looking.await.expect("looking does not panic").map_err(FetchError::NotAHole) }
    }

    /// Notes that the guest runs from now on.
    pub(crate) fn begin(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    /// Returns when nothing is missing any more. The caller awaits this again and again.
    ///
    /// # Errors
    ///
    /// Fails when memory turns out not to be right.
    pub(crate) async fn completes(&mut self) -> Result<(), FetchError> {
        loop {
            tokio::select! {
                () = self.bell.notified() => {
                    if let Some(reason) = self.placing.broken() {
                        return Err(FetchError::Broken(reason.to_owned()));
                    }
                    if self.placing.is_known() && self.placing.remaining() == 0 {
                        return Ok(());
                    }
                }
                happened = happens(&mut self.session, &self.faults) => if let Err(error) = happened {
                    self.lose(&error);
                },
                () = self.lost.notified() => {
                    // The source opens everything anew, over ports that answer.
                    if !self.faults.is_connected() {
                        self.session = None;
                    }
                }
                () = tokio::time::sleep(REPORT) => {}
            }
            self.report().await;
        }
    }

    /// Notes that the source is gone. It connects again.
    fn lose(&mut self, error: &LinkError) {
        // A source whose ports are down connects and goes twice a second.
        match self.faults.is_connected() {
            true => {
                warn!(guest = %self.name, %error, "lost the source, from which pages are fetched")
            }
            false => debug!(guest = %self.name, %error, "the source cannot serve yet"),
        }
        self.session = None;
    }

    /// Returns how the fetching goes.
    pub(crate) fn progress(&self) -> FetchReport {
        let nanoseconds = self.since.map_or(0, |since| since.elapsed().as_nanos() as u64);
        FetchReport { nanoseconds, ..self.placing.report() }
    }

    /// Returns what is waited for, in words, or `None` while pages can come.
    pub(crate) fn waits_for(&self) -> Option<&'static str> {
        match &self.session {
            None => Some("the source host, from which missing pages are fetched"),
            Some(_) if !self.faults.is_connected() => {
                Some("a lane of the source's for pages that are waited for")
            }
            Some(_) => None,
        }
    }

    /// Shows the lanes in the progress.
    pub(crate) fn show(&mut self, progress: &mut Progress) {
        if let Some(session) = &mut self.session {
            session.lanes.measure(false);
            session.lanes.show(progress, Totals::default());
        }
    }

    /// Makes accesses to what is missing fail from now on, and accesses to the rest as any other. Returns how many
    /// pages are missing.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses. Accesses then go on waiting: letting go of them would have them find zeros.
    pub(crate) async fn poison(self) -> io::Result<u64> {
        let placing = self.placing.clone();
        let poison = move || placing.poison().and_then(|pages| placing.end().map(|()| pages));
        let poisoned = task::aside(poison).await;
        if poisoned.is_err() {
            std::mem::forget(self);
        }
        poisoned
    }

    /// Makes the VMM's memory as any other, for the next guest, because no guest comes after all.
    pub(crate) async fn withdraw(self) {
        if let Err(error) = let_go(&self.placing).await {
            warn!(guest = %self.name, %error, "cannot let go of a VMM's memory; it must be started anew");
        }
    }

    /// Makes the guest's memory as any other, because nothing is missing any more. Returns how it went, and the session
    /// of the source, which takes the end of that for a loss until it has heard.
    pub(crate) async fn end(mut self) -> (FetchReport, Option<FetchSession>) {
        let report = self.progress();
        self.count();
        if let Err(error) = let_go(&self.placing).await {
            // The guest is served all the same, as long as this daemon lives.
            warn!(guest = %self.name, %error, "cannot let go of the guest's memory");
            std::mem::forget(self.faults);
        }
        (report, self.session)
    }

    async fn report(&mut self) {
        let due = self.session.as_ref().is_some_and(|session| session.reported.elapsed() >= REPORT);
        if !due || !self.placing.is_known() {
            return;
        }
        self.count();
        let report = Control::Fetched(self.progress());
        if let Some(session) = &mut self.session {
            session.reported = Instant::now();
            // A broken link is noticed by the task that listens to it.
            let _ = session.link.send(&report).await;
        }
    }

    /// Reports what is new to the observer.
    fn count(&mut self) {
        let report = self.placing.report();
        self.context.observer.measured(Measurement::Fetched { before: &self.counted, now: &report });
        self.counted = report;
    }
}

impl FetchSession {
    /// Tells the source how the fetching went.
    pub(crate) async fn tell(&self, report: FetchReport) {
        let _ = self.link.send(&Control::Fetched(report)).await;
    }
}

/// Deals with what the source does, until it is gone.
async fn happens(session: &mut Option<FetchSession>, faults: &Faults) -> Result<(), LinkError> {
    let Some(session) = session else { return pending().await };
    tokio::select! {
        message = session.link.receive() => match message? {
            Control::LaneLost(lane) => {
                // The source has taken back what it had: its end is not waited for.
                drop(session.lanes.close_lane(lane));
                Ok(())
            }
            other => Err(LinkError::Unexpected { expected: "nothing but lanes", found: other.name() }),
        },
        Some(ArrivedLane { port, kind, socket, records, remote }) = session.arriving.recv() => {
            match kind {
                LaneKind::Faults if session.asks && faults.is_connected() => {
                    warn!(%port, %remote, "refused a second lane for faults while the first one lives");
                }
                LaneKind::Faults => {
                    session.asks = true;
                    faults.connect(Transport { socket: Arc::new(socket), records });
                }
                // More than that are dropped, and so closed.
                LaneKind::Pages(_) if session.lanes.running() >= MOST_LANES => {}
                // The state came before the guest was handed over.
                LaneKind::State(_) => {}
                LaneKind::Pages(number) => {
                    let end = LaneEnd { port, number, local: String::new(), remote, socket, records };
                    session.lanes.receive(end, &session.inbound);
                }
            }
            Ok(())
        }
    }
}

/// Has the VMM's memory behave as any other: all of it is gone through for that.
async fn let_go(placing: &Arc<PostcopyIncoming>) -> io::Result<()> {
    let placing = placing.clone();
    task::aside(move || placing.end()).await
}

async fn tell_missing(link: &mut Link, placing: &Arc<PostcopyIncoming>) -> Result<(), LinkError> {
    let placing = placing.clone();
    for missing in task::aside(move || tell(&placing.missing())).await {
        link.send(&Control::Missing(missing)).await?;
    }
    Ok(())
}
