//! Copying while the guest runs: [round one](super::first_round) over all memory, then what was
//! written meanwhile, until the pause fits the limit.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use memlane_guest::{DriverError, Guest, StunReport};
use memlane_lane::Outbound;
use memlane_net::link::{LinkError, LinkSender};
use memlane_protocol::bandwidth::Bandwidth;
use memlane_protocol::convergence::{
    Conditions, Convergence, Decision, Forecast, Policy, Predictor, Round, Verdict,
};
use memlane_protocol::wire::control::Control;
use memlane_protocol::{PAGE_SIZE, PageSet};
use tokio::sync::{Mutex, Notify, mpsc};
use tracing::info;

use super::lanes::Lanes;
use super::reopen::Reopener;
use super::routes::Route;
use super::serve::{ServeError, Serving};
use crate::context::Context;
use crate::handle::Ticket;
use crate::observer::Measurement;
use crate::progress::{Forecast as ForecastView, Phase, Round as RoundView};

/// How often progress is looked at, and how long a ring of the bell may be missed.
const LOOK: Duration = Duration::from_millis(20);
/// Longest wait for an answer of the destination, besides its work.
const ANSWER: Duration = Duration::from_secs(30);

/// Why copying ended without success.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The VMM failed.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The control connection failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// No lane is left.
    #[error("every lane to the destination is lost; see `memlanectl ports` and the daemon's log")]
    NoLanes,
    /// Memory could not be looked at.
    #[error("cannot find out what the guest's memory holds: {0}")]
    Memory(std::io::Error),
    /// The pause would be too long.
    #[error("{0}")]
    GaveUp(memlane_protocol::convergence::Why),
    /// The destination cannot fetch.
    #[error("post-copy cannot begin: {0}")]
    Serve(#[from] ServeError),
    /// The destination's memory differs.
    #[error("the destination's memory is not equal: {0}; the guest was not handed over")]
    Unequal(String),
    /// The destination answered something else than it was asked.
    #[error("the destination broke the protocol: {0}")]
    Protocol(&'static str),
}

/// One migration's copying, shared by the stages of the source.
pub struct Copying {
    /// What every migration of this host works with.
    pub context: Rc<Context>,
    /// The guest.
    pub guest: Rc<Guest>,
    /// How everyone sees it.
    pub ticket: Rc<Ticket>,
    /// What the lanes share.
    pub outbound: Arc<Outbound>,
    /// Rung by the lanes when there is something to look at.
    pub bell: Arc<Notify>,
    /// The lanes.
    pub lanes: RefCell<Lanes>,
    /// Opens them again where they are lost, while the guest's memory is copied.
    pub reopener: RefCell<Option<Reopener>>,
    /// To the destination.
    pub link: LinkSender,
    /// What the destination says besides words of the handover.
    pub answers: Mutex<mpsc::Receiver<Control>>,
    /// How a stun went when it was looked at last.
    pub stunned: Cell<StunReport>,
    /// What the lanes deliver.
    pub bandwidth: RefCell<Bandwidth>,
    /// When it was measured last in this round, and what had been acknowledged by then.
    pub sampled: Cell<Option<(Instant, u64)>>,
    /// Forecasts for this kind of VMM.
    pub predictor: Rc<RefCell<Predictor>>,
    /// Round trip between the ports, before the first ping of the control connection.
    pub round_trip: Duration,
    /// What the order allows.
    pub policy: Policy,
    /// Compare digests in the pause.
    pub verify: bool,
    /// The forecast on which the switchover was decided.
    pub forecast: Cell<Option<Forecast>>,
    /// Measured in the pause: when it began, and the time until the state was saved.
    pub paused_at: Cell<Option<Instant>>,
    /// See `paused_at`.
    pub save_time: Cell<Duration>,
    /// Digests are being compared.
    pub comparing: Cell<bool>,
    /// Messages about holes that were sent,
    pub holes_sent: Cell<u64>,
    /// and those that the destination has dealt with.
    pub holes_made: Cell<u64>,
    /// Lanes of which the destination was told that they are lost.
    pub lanes_lost: RefCell<BTreeSet<u16>>,
    /// Time that comparing digests took, which the limit does not bound.
    pub verify_time: Cell<Duration>,
    /// Serves what is missing at the destination, once post-copy was decided.
    pub postcopy: RefCell<Option<Serving>>,
    /// Pages that the destination was told are missing.
    pub told_missing: Arc<PageSet>,
}

impl Copying {
    /// Copies until it is time to switch over.
    pub async fn run(&self) -> Result<(), CopyError> {
        let convergence = RefCell::new(Convergence::new(self.policy));
        tokio::select! {
            result = self.rounds(&convergence) => result,
            never = self.keep_measuring(&convergence) => never,
            never = self.keep_lanes_open() => never,
        }
    }

    async fn rounds(&self, convergence: &RefCell<Convergence>) -> Result<(), CopyError> {
        let memory = self.guest.shape.ram_bytes();
        let at_once = convergence.borrow().before_rounds(memory, &self.now(), &self.predictor.borrow());
        if let Some(verdict) = at_once {
            self.note(&verdict);
            return match verdict.decision {
                Decision::GiveUp { why } => Err(CopyError::GaveUp(why)),
                _ => {
                    // Beginning to track is what prepares a VMM to give up its guest; all pages will be
                    // missing, whatever is written to them.
                    self.start_tracking().await?;
                    self.guest.driver.stop_tracking().await?;
                    self.guest.tracked.set(false);
                    self.open_postcopy(false).await
                }
            };
        }
        self.start_tracking().await?;
        for number in 1.. {
            let started = Instant::now();
            self.begin_sample();
            let bytes_before = self.lanes.borrow().wire_bytes();
            let pages_before = self.lanes.borrow().pages();
            let pages = if number == 1 { self.guest.ram.pages() } else { self.outbound.dirty.count() };
            self.link.send(&Control::Round { round: number, pages }).await?;
            self.ticket.update(|progress| {
                progress.rounds.push(RoundView { round: number, pages, ..RoundView::default() });
            });
            if number == 1 {
                self.first_round().await?;
            }
            self.until_all_claimed().await?;
            self.sample();
            let looked = Instant::now();
            let dirtied_pages = self.harvest().await?;
            let harvest_seconds = looked.elapsed().as_secs_f64();
            let duration = started.elapsed();
            let unclaimed = self.outbound.dirty.count();
            let remaining = unclaimed + self.outbound.in_flight.count();
            self.outbound.wake(unclaimed);
            let bytes = self.lanes.borrow().wire_bytes() - bytes_before;
            let sent = self.lanes.borrow().pages() - pages_before;
            self.context.observer.measured(Measurement::Iteration { took: duration, dirtied_pages });
            self.ticket.update(|progress| {
                let round = progress.rounds.last_mut().expect("pushed when the round began");
                let pages = if number == 1 { sent } else { pages };
                let seconds = duration.as_secs_f64();
                *round = RoundView { round: number, pages, bytes, seconds, dirtied_pages, harvest_seconds };
            });
            let remaining_bytes = remaining * PAGE_SIZE;
            let round = Round { number, duration, dirtied_pages, remaining_bytes };
            let decision = self.decide(&mut convergence.borrow_mut(), &round);
            match decision {
                Decision::Continue => {}
                Decision::Stun { pages_per_second, .. } => self.stun(pages_per_second).await?,
                Decision::SwitchOver => return Ok(()),
                Decision::Postcopy { .. } => return self.open_postcopy(true).await,
                Decision::GiveUp { why } => return Err(CopyError::GaveUp(why)),
            }
        }
        unreachable!("the policy bounds the number of rounds")
    }

    /// What to do after a round.
    fn decide(&self, convergence: &mut Convergence, round: &Round) -> Decision {
        let verdict = convergence.after_round(round, &self.now(), &self.predictor.borrow());
        info!(
            guest = %self.ticket.guest,
            round = round.number,
            seconds = round.duration.as_secs_f64(),
            dirtied_pages = round.dirtied_pages,
            "round ended"
        );
        self.note(&verdict);
        verdict.decision
    }

    /// What decisions are made from, as it is now.
    fn now(&self) -> Conditions {
        Conditions {
            bandwidth: self.bandwidth.borrow().bytes_per_second(),
            // Pages may take another way than words.
            round_trip: self
                .link
                .round_trip()
                .unwrap_or(self.round_trip)
                .max(self.lanes.borrow().round_trip()),
            // Comparing is for those who have the time: the limit bounds the rest of the pause.
            verify: Duration::ZERO,
        }
    }

    /// Tells what was decided, and from which figures.
    fn note(&self, verdict: &Verdict) {
        self.forecast.set(Some(verdict.forecast));
        self.ticket.update(|progress| {
            progress.downtime_predicted_seconds = Some(verdict.forecast.total().as_secs_f64());
            progress.forecast = Some(view(&verdict.forecast));
            progress.decision = Some(verdict.to_string());
        });
        let figures = &verdict.figures;
        info!(
            guest = %self.ticket.guest,
            remaining_bytes = figures.remaining_bytes,
            dirty_bytes_per_second = figures.dirty_bytes_per_second,
            bandwidth_bytes_per_second = figures.bandwidth,
            predicted_downtime = ?verdict.forecast.total(),
            margin = ?verdict.forecast.margin,
            downtime_limit = ?figures.downtime_limit,
            "decided: {verdict}"
        );
    }

    async fn start_tracking(&self) -> Result<(), CopyError> {
        self.ticket.update(|progress| progress.phase = Phase::Preparing);
        let started = Instant::now();
        self.guest.tracked.set(true);
        self.guest.driver.start_tracking().await?;
        let took = started.elapsed().as_secs_f64();
        self.context.observer.measured(Measurement::TrackingStarted(started.elapsed()));
        self.ticket.update(|progress| {
            progress.tracking_start_seconds = Some(took);
            progress.phase = Phase::Copying;
        });
        Ok(())
    }

    /// Makes dirty what was written since it was armed or last harvested; returns how many pages
    /// are new.
    pub async fn harvest(&self) -> Result<u64, CopyError> {
        let found = self.guest.harvest(&self.outbound.dirty).await?;
        if found.holes {
            self.outbound.sparse.store(true, Ordering::Release);
        }
        Ok(found.new)
    }

    /// The destination writes nothing of this lane any more: the others send what it had.
    pub fn take_back(&self, lane: u16) {
        self.outbound.take_back(lane);
        self.outbound.wake(self.outbound.dirty.count());
    }

    /// How long to wait for the destination when it may have to go through all of memory.
    pub fn patience(&self) -> Duration {
        /// Slower than this, in bytes per second, nobody goes through memory.
        const SLOWEST: u64 = 128 << 20;
        ANSWER + Duration::from_secs(self.guest.shape.ram_bytes() / SLOWEST)
    }

    /// The destination's next answer, for which it may have to go through all of memory.
    pub async fn answer(&self) -> Result<Control, CopyError> {
        let mut answers = self.answers.lock().await;
        match tokio::time::timeout(self.patience(), answers.recv()).await {
            Ok(answer) => answer.ok_or(CopyError::Link(LinkError::Closed)),
            Err(_) => Err(CopyError::Protocol("nothing where an answer was due")),
        }
    }

    /// Returns when every page of this round is in some lane's hands. Those that are still on
    /// their way do not hold up the next round.
    ///
    /// A round that has nothing to claim ends when nothing is on its way either: it would else be
    /// over in no time, and tell nothing about how fast pages are written and sent.
    async fn until_all_claimed(&self) -> Result<(), CopyError> {
        if self.outbound.dirty.is_empty() {
            return self.until_all_acknowledged().await;
        }
        while !self.outbound.dirty.is_empty() {
            self.wait_for_lanes().await?;
        }
        Ok(())
    }

    /// Returns when the destination has every page that there was to send.
    pub async fn until_all_acknowledged(&self) -> Result<(), CopyError> {
        while !self.outbound.all_acknowledged() {
            self.wait_for_lanes().await?;
        }
        Ok(())
    }

    /// Returns when a lane has something to tell, or after a moment.
    pub async fn wait_for_lanes(&self) -> Result<(), CopyError> {
        let _ = tokio::time::timeout(LOOK, self.bell.notified()).await;
        self.outbound.ram.intact().map_err(CopyError::Memory)?;
        for lane in self.outbound.orphaned_lanes() {
            // Bytes of a lost lane may still lie in some buffer: its pages are not sent again
            // before the destination has closed it too.
            if self.lanes_lost.borrow_mut().insert(lane) {
                self.link.send(&Control::LaneLost(lane)).await?;
            }
        }
        if self.lanes.borrow().all_ended() { Err(no_lanes().await) } else { Ok(()) }
    }

    /// Opens lanes again on ports that have lost them.
    async fn keep_lanes_open(&self) -> ! {
        let mut reopener = self.reopener.take().expect("a migration copies once");
        let silence = self.context.limits().silence;
        let is_missing = |route: &Route| {
            let running = self.lanes.borrow().running_on(&route.port.name);
            !self.outbound.is_held() && running < usize::from(route.lanes())
        };
        loop {
            let end = reopener.next(is_missing).await;
            // Once the lanes are to come to an end, what was being opened meanwhile is closed.
            if !self.outbound.is_held() {
                self.lanes.borrow_mut().send(end, &self.outbound, silence);
            }
        }
    }

    /// Measures bandwidth and shows progress, now and then.
    async fn keep_measuring(&self, convergence: &RefCell<Convergence>) -> ! {
        let mut ticker = tokio::time::interval(LOOK);
        for tick in 0u64.. {
            ticker.tick().await;
            self.sample();
            if tick % 5 == 0 {
                self.follow_lanes(convergence).await;
                self.show();
            }
        }
        unreachable!("the loop has no end")
    }

    /// From here on the lanes are busy with a round.
    fn begin_sample(&self) {
        self.sampled.set(Some((Instant::now(), self.lanes.borrow().acked_bytes())));
    }

    /// Adds what was acknowledged since the last sample of this round.
    fn sample(&self) {
        let Some((before, bytes_before)) = self.sampled.get() else { return };
        let bytes = self.lanes.borrow().acked_bytes();
        self.bandwidth.borrow_mut().record(bytes - bytes_before, before.elapsed());
        self.sampled.set(Some((Instant::now(), bytes)));
    }

    /// Brings what everyone sees up to date.
    pub fn show(&self) {
        self.lanes.borrow_mut().measure(true);
        self.show_stun();
        let bandwidth = self.bandwidth.borrow().bytes_per_second().unwrap_or(0.0);
        self.ticket.update(|progress| {
            self.lanes.borrow().show(progress);
            progress.bandwidth_bytes_per_second = bandwidth;
            progress.pages_remaining = match progress.rounds.as_slice() {
                [first] if first.seconds == 0.0 => {
                    let done = progress.pages_sent + progress.zero_pages + progress.hole_pages;
                    progress.pages_total.saturating_sub(done)
                }
                _ => self.outbound.dirty.count() + self.outbound.in_flight.count(),
            };
        });
    }
}

/// A destination that gives up closes its lanes before it says why: leaves it a moment for that.
async fn no_lanes() -> CopyError {
    const LAST_WORDS: Duration = Duration::from_millis(200);
    tokio::time::sleep(LAST_WORDS).await;
    CopyError::NoLanes
}

fn view(forecast: &Forecast) -> ForecastView {
    ForecastView {
        remaining_seconds: forecast.transfer.as_secs_f64(),
        round_trip_seconds: forecast.round_trips.as_secs_f64(),
        state_seconds: (forecast.save + forecast.load).as_secs_f64(),
        resume_seconds: (forecast.journal + forecast.resume).as_secs_f64(),
        verify_seconds: forecast.verify.as_secs_f64(),
        margin_seconds: forecast.margin.as_secs_f64(),
    }
}
