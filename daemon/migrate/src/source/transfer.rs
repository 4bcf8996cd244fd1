//! All stages of the source share the guest, its lanes, and the connection to the destination.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use memlane_guest::{Guest, StunReport};
use memlane_lane::{SendState, Totals};
use memlane_net::link::LinkError;
use memlane_net::resumable::ResumableSender;
use memlane_net::task;
use memlane_protocol::PageSet;
use memlane_protocol::compression;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::control::{Control, MAX_RANGES};
use memlane_protocol::wire::hello::STATE_LANE;
use tokio::sync::{Mutex, Notify, mpsc};
use tracing::info;

use super::MigrateParameters;
use super::error::CopyError;
use crate::context::Context;
use crate::handle::MigrationHandle;
use crate::lanes::{self, Lanes};
use crate::observer::Measurement;
use crate::progress::Stun;
use crate::routes::{Route, Routes};
use crate::state_lane::StateLane;

/// A destination that gives up closes its lanes before it says why: that is waited for this long.
pub(super) const LAST_WORDS: Duration = Duration::from_millis(200);
/// If a ring of the bell is missed, that is noticed after this time.
pub(super) const LOOK: Duration = Duration::from_millis(20);
/// An answer of the destination may take this long, besides its work.
const ANSWER: Duration = Duration::from_secs(30);
/// This many answers of the destination may wait to be dealt with.
const ANSWERS_WAITING: usize = 16;

/// What a look at the guest's writes has found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Harvested {
    /// This many pages are dirty that were not.
    pub new: u64,
    /// Block I/O was waited for this long afterwards.
    pub stall: Duration,
}

/// The transfer of one guest.
pub(super) struct Transfer {
    /// This is the context that every migration of this host works with.
    pub context: Rc<Context>,
    /// This is the guest.
    pub guest: Rc<Guest>,
    /// Through this everyone else sees the migration.
    pub handle: Rc<MigrationHandle>,
    /// This is the state that the lanes share.
    pub outbound: Arc<SendState>,
    /// These are the lanes.
    pub lanes: RefCell<Lanes>,
    /// This sends to the destination.
    pub link: ResumableSender,
    /// Lanes are opened on these.
    routes: Rc<Routes>,
    /// The VMM's state is to go over this.
    pub state_lane: RefCell<Option<StateLane>>,
    /// If this is true, the destination knows of such lanes.
    has_state_lane: bool,
    /// There may be no lane for this long while the guest runs.
    patience: Duration,
    /// There is no lane since this moment.
    without_lanes: Cell<Option<Instant>>,
    bell: Arc<Notify>,
    /// This receives what the destination says besides words of the handover.
    answers: Mutex<mpsc::Receiver<Control>>,
    /// This many messages about holes were sent.
    holes_sent: Cell<u64>,
    /// The destination has dealt with this many of those messages.
    holes_made: Cell<u64>,
    /// The destination was told that these lanes are lost.
    lanes_lost: RefCell<BTreeSet<u16>>,
    /// This is how a stun went when it was last looked at.
    stunned: Cell<StunReport>,
    /// Devices may still be writing to these pages, which were reported as written. It is `None` if the guest has no disk
    /// that bypasses the page cache.
    unsettled: RefCell<Option<Rc<PageSet>>>,
    /// This is true once the guest is paused: no block I/O is under way then.
    at_rest: Cell<bool>,
}

impl Transfer {
    /// Makes a transfer without lanes, to a destination that speaks `version` of the protocol. Returns it with the sender that takes the destination's answers.
    pub(super) fn new(
        context: Rc<Context>,
        guest: Rc<Guest>,
        handle: Rc<MigrationHandle>,
        (link, version, routes): (ResumableSender, u16, Rc<Routes>),
        parameters: &MigrateParameters,
    ) -> (Rc<Self>, mpsc::Sender<Control>) {
        guest.driver.be_patient(parameters.patience);
        let (bell, ring) = lanes::bell();
        let mut outbound = SendState::new(guest.ram.clone(), ring);
        outbound.compress = parameters.compression == compression::Mode::Auto;
        let (answers, arriving) = mpsc::channel(ANSWERS_WAITING);
        let lanes = Lanes::new(&context).into();
        let (holes_sent, holes_made, lanes_lost, stunned, unsettled, at_rest) = Default::default();
        let transfer = Self {
            context,
            guest,
            handle,
            outbound: Arc::new(outbound),
            lanes,
            link,
            routes,
            state_lane: RefCell::default(),
            has_state_lane: version >= STATE_LANE,
            patience: parameters.patience,
            without_lanes: Cell::default(),
            bell,
            answers: Mutex::new(arriving),
            holes_sent,
            holes_made,
            lanes_lost,
            stunned,
            unsettled,
            at_rest,
        };
        (Rc::new(transfer), answers)
    }

    /// Begins to track the guest's writes.
    ///
    /// # Errors
    ///
    /// Fails if the VMM refuses or does not answer.
    pub(super) async fn start_tracking(&self) -> Result<(), CopyError> {
        self.guest.tracked.set(true);
        self.guest.driver.start_tracking().await?;
        if self.guest.driver.reads_directly() {
            self.unsettled.replace(Some(PageSet::new(self.guest.ram.pages()).into()));
        }
        Ok(())
    }

    /// Marks the pages as dirty that were written since they were write-protected or last harvested, and has the lanes
    /// send them.
    ///
    /// # Errors
    ///
    /// Fails if the VMM does not answer. What it has found may then be lost.
    pub(super) async fn harvest(&self) -> Result<Harvested, CopyError> {
        let (unsettled, dirty) = (self.unsettled.borrow().clone(), &self.outbound.dirty);
        let mut found = self.guest.harvest(unsettled.as_deref().unwrap_or(dirty)).await?;
        let stall = self.settle().await?;
        if let Some(unsettled) = unsettled {
            found.new = 0;
            let pass_on = |pages| found.new += unsettled.drain_into(pages, dirty);
            task::in_pieces(unsettled.pages(), pass_on).await;
        }
        if found.holes {
            self.outbound.sparse.store(true, Ordering::Release);
        }
        self.outbound.publish();
        Ok(Harvested { new: found.new, stall })
    }

    /// Returns when what has been reported as written, or was write-protected, may be read: a device that had begun to
    /// write to it by then, behind the page tables, has come to an end. Returns how long block I/O was waited for.
    ///
    /// # Errors
    ///
    /// Fails if the VMM does not answer.
    pub(super) async fn settle(&self) -> Result<Duration, CopyError> {
        let stall = if self.at_rest.get() { None } else { self.guest.drain().await? };
        self.note_stall(stall);
        Ok(stall.unwrap_or_default())
    }

    /// Notes how long block I/O stood still, if it had to be waited for.
    pub(super) fn note_stall(&self, stall: Option<Duration>) {
        let Some(stall) = stall else { return };
        self.context.observer.measured(Measurement::BlockIoStalled(stall));
        self.handle.update(|progress| {
            let longest = progress.ram.longest_io_stall_seconds.get_or_insert_default();
            *longest = longest.max(stall.as_secs_f64());
        });
    }

    /// Notes that the guest is paused.
    pub(super) fn note_pause(&self) {
        self.at_rest.set(true);
    }

    /// Notes that the destination has dealt with one message about holes.
    pub(super) fn holes_made(&self) {
        self.holes_made.set(self.holes_made.get() + 1);
        self.bell.notify_one();
    }

    /// Tells the destination that these pages are zero.
    ///
    /// # Errors
    ///
    /// Fails if the connection is lost.
    pub(super) async fn send_holes(&self, holes: &mut Vec<Range<u64>>) -> Result<(), CopyError> {
        let pages: u64 = holes.iter().map(|hole| hole.end - hole.start).sum();
        if pages == 0 {
            return Ok(());
        }
        self.context.observer.measured(Measurement::Holes { pages });
        self.handle.update(|progress| progress.ram.hole_pages += pages);
        for ranges in std::mem::take(holes).chunks(MAX_RANGES) {
            self.link.send(&Control::Holes(ranges.to_vec())).await?;
            self.holes_sent.set(self.holes_sent.get() + 1);
        }
        Ok(())
    }

    /// Returns when all holes are made: a hole must be one there before the page behind it can be sent as data.
    ///
    /// # Errors
    ///
    /// Fails if the destination does not answer in time.
    pub(super) async fn until_holes_are_made(&self) -> Result<(), CopyError> {
        let until = Instant::now() + self.patience();
        while self.holes_made.get() < self.holes_sent.get() {
            self.wait_for_lanes().await?;
            if Instant::now() > until {
                return Err(CopyError::Protocol("no word that holes are made"));
            }
        }
        Ok(())
    }

    /// Returns how long to wait for the destination when it may have to go through all of memory.
    pub(super) fn patience(&self) -> Duration {
        /// A host goes through memory at no less than this many bytes per second.
        const SLOWEST: u64 = 128 << 20;
        ANSWER + Duration::from_secs(self.guest.shape.ram_bytes() / SLOWEST)
    }

    /// Returns the destination's next answer, for which it may have to go through all of memory.
    ///
    /// # Errors
    ///
    /// Fails if none comes in time.
    pub(super) async fn answer(&self) -> Result<Control, CopyError> {
        let mut answers = self.answers.lock().await;
        match tokio::time::timeout(self.patience(), answers.recv()).await {
            Ok(answer) => answer.ok_or(CopyError::Link(LinkError::Closed)),
            Err(_) => Err(CopyError::Protocol("nothing where an answer was due")),
        }
    }

    /// Opens the lane for the VMM's state, unless there is one on a port that has other lanes. Without one, the state
    /// goes over the control connection.
    pub(super) async fn open_state_lane(&self) {
        let carries = |port: &Label| self.lanes.borrow().running_on(port) > 0;
        let before = self.state_lane.take();
        if before.as_ref().is_some_and(|lane| carries(lane.port())) {
            self.state_lane.replace(before);
            return;
        }
        if !self.has_state_lane {
            return;
        }
        let mut routes: Vec<&Route> = self.routes.all().iter().collect();
        routes.sort_by_key(|route| !carries(&route.port.name));
        for route in routes {
            match self.routes.open_state(route).await {
                Ok(end) => {
                    let lane = StateLane::over(end, &self.context);
                    self.state_lane.replace(Some(lane));
                    return;
                }
                Err(error) => info!(%error, "cannot open the lane for the VMM's state on this port"),
            }
        }
    }

    /// Returns when the destination has every page that there was to send.
    ///
    /// # Errors
    ///
    /// Fails as [`Transfer::wait_for_lanes`] does.
    pub(super) async fn until_all_acknowledged(&self) -> Result<(), CopyError> {
        while !self.outbound.all_acknowledged() {
            self.wait_for_lanes().await?;
        }
        Ok(())
    }

    /// Returns when a lane has something to report, or after a moment.
    ///
    /// # Errors
    ///
    /// Fails if no lane is left, or if the guest's memory is not there any more.
    pub(super) async fn wait_for_lanes(&self) -> Result<(), CopyError> {
        let _ = tokio::time::timeout(LOOK, self.bell.notified()).await;
        self.look_at_lanes().await
    }

    /// Deals with lanes that are lost.
    ///
    /// # Errors
    ///
    /// Fails as [`Transfer::wait_for_lanes`] does.
    pub(super) async fn look_at_lanes(&self) -> Result<(), CopyError> {
        self.outbound.ram.intact().map_err(CopyError::Memory)?;
        for lane in self.outbound.orphaned_lanes() {
            // Bytes of a lost lane may still lie in some buffer: its pages are not sent again
            // before the destination has closed it too.
            if self.lanes_lost.borrow_mut().insert(lane) {
                self.link.send(&Control::LaneLost(lane)).await?;
            }
        }
        if !self.lanes.borrow().all_ended() {
            self.without_lanes.set(None);
            return Ok(());
        }
        // They are opened again, unless they are to come to an end or the guest is paused.
        let since = self.without_lanes.get().unwrap_or_else(Instant::now);
        self.without_lanes.set(Some(since));
        let may_come = !self.outbound.is_quiesced() && !self.outbound.paused.load(Ordering::Acquire);
        if may_come && since.elapsed() < self.patience { Ok(()) } else { Err(self.no_lanes().await) }
    }

    /// Ends sending. No lane reads the guest's memory after the returned future is done. The guest's writes are not
    /// held up any more.
    pub(super) fn stop(&self) -> impl Future<Output = ()> + use<> {
        self.guest.let_writes_go();
        let closed = self.lanes.borrow().close();
        self.outbound.paused.store(false, Ordering::Release);
        closed
    }

    /// Brings up to date what everyone sees of the lanes and of a stun.
    pub(super) fn show(&self) {
        self.lanes.borrow_mut().measure(true);
        self.show_stun();
        self.handle.update(|progress| {
            self.lanes.borrow().show(progress, Totals::default());
            let ram = &mut progress.ram;
            ram.pages_remaining = match ram.iterations.as_slice() {
                [first] if first.seconds == 0.0 => {
                    ram.pages_total.saturating_sub(ram.pages_sent + ram.zero_pages + ram.hole_pages)
                }
                _ => self.outbound.dirty.count() + self.outbound.in_flight.count(),
            };
        });
    }

    /// Returns the error of having no lanes, unless the destination says why before.
    async fn no_lanes(&self) -> CopyError {
        tokio::time::sleep(LAST_WORDS).await;
        CopyError::NoLanes(self.lanes.borrow().last_words())
    }

    fn show_stun(&self) {
        let Some(report) = self.guest.stun_report() else { return };
        let before = self.stunned.replace(report);
        self.context.observer.measured(Measurement::Stunned { before: &before, now: &report });
        let seconds = report.in_force.as_secs_f64();
        let per_second = |pages: f64| if seconds > 0.0 { pages / seconds } else { 0.0 };
        self.handle.update(|progress| {
            let stun = progress.stun.get_or_insert_with(Stun::default);
            stun.seconds = seconds;
            stun.released_pages_per_second = per_second(report.released_pages as f64);
            stun.target_pages_per_second = per_second(report.target_pages);
        });
    }
}
