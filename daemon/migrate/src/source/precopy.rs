//! Pre-copy sends memory while the guest runs: [the first iteration](super::first_iteration) goes over all memory, and
//! the others over what was written meanwhile, until the pause fits the limit.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memlane_protocol::bandwidth::Bandwidth;
use memlane_protocol::convergence::{
    Conditions, Convergence, Decision, Forecast, Iteration, Policy, Predictor, Reason, Verdict,
};
use memlane_protocol::wire::control::Control;
use memlane_protocol::{PAGE_SIZE, PageSet};
use tracing::info;

use super::error::CopyError;
use super::serve::Serving;
use super::state::IN_PAUSE_BYTES;
use super::switchover::{Switchover, sends_state_at_once};
use super::transfer::{Harvested, LOOK, Transfer};
use crate::lane_reconnect::LaneReconnector;
use crate::observer::Measurement;
use crate::progress::{Forecast as ForecastView, Iteration as IterationView, Phase};
use crate::routes::Route;

/// The stage in which the guest runs and is copied.
pub(super) struct Precopy {
    pub(super) transfer: Rc<Transfer>,
    /// If this is true, digests are compared in the pause.
    verify: bool,
    policy: Policy,
    pub(super) convergence: RefCell<Convergence>,
    /// These are the forecasts for this kind of VMM.
    predictor: Rc<RefCell<Predictor>>,
    /// This is the round trip between the ports, for the time before the first ping of the control connection.
    round_trip: Duration,
    /// This measures what the lanes deliver.
    pub(super) bandwidth: RefCell<Bandwidth>,
    /// This is when it was last measured in this iteration, and what had been acknowledged by then.
    sampled: Cell<Option<(Instant, u64)>>,
    /// This is the forecast of the last decision.
    forecast: Cell<Option<Forecast>>,
    /// This serves what is missing at the destination, once post-copy was decided.
    pub(super) serving: Cell<Option<Serving>>,
    /// The destination was told that these pages are missing.
    pub(super) told_missing: Arc<PageSet>,
}

impl Precopy {
    /// Prepares to copy. `round_trip` is that between the ports.
    pub(super) fn new(transfer: Rc<Transfer>, policy: Policy, verify: bool, round_trip: Duration) -> Self {
        let predictor = transfer.context.predictor(&transfer.guest.shape.machine.vmm);
        let told_missing = Arc::new(PageSet::new(transfer.guest.ram.pages()));
        Self {
            transfer,
            verify,
            policy,
            convergence: Convergence::new(policy).into(),
            predictor,
            round_trip,
            bandwidth: Bandwidth::new().into(),
            sampled: Cell::default(),
            forecast: Cell::default(),
            serving: Cell::default(),
            told_missing,
        }
    }

    /// Copies until it is time to switch over. Lanes that are lost meanwhile are opened again by `reconnector`.
    ///
    /// # Errors
    ///
    /// Fails if the guest cannot be copied, or was given up on. It then runs on.
    pub(super) async fn run(self, reconnector: LaneReconnector) -> Result<Switchover, CopyError> {
        let ended = tokio::select! {
            result = self.iterate() => result,
            never = self.keep_measuring() => never,
            never = self.keep_lanes_open(reconnector) => never,
            never = self.keep_state_lane_open() => never,
        };
        self.show();
        ended?;
        Ok(Switchover {
            transfer: self.transfer,
            downtime_limit: self.policy.downtime_limit,
            verify: self.verify,
            forecast: self.forecast.get(),
            predictor: self.predictor,
            serving: self.serving.take(),
            told_missing: self.told_missing,
        })
    }

    async fn iterate(&self) -> Result<(), CopyError> {
        let transfer = &self.transfer;
        let memory = transfer.guest.shape.ram_bytes();
        let at_once =
            self.convergence.borrow().before_iterations(memory, &self.now(), &self.predictor.borrow());
        if let Some(verdict) = at_once {
            self.note(&verdict);
            return match verdict.decision {
                Decision::GiveUp { why } => Err(CopyError::GaveUp(why)),
                _ => {
                    // Beginning to track is what prepares a VMM to give up its guest; all pages will be
                    // missing, even if they are written to.
                    self.start_tracking().await?;
                    transfer.guest.driver.stop_tracking().await?;
                    transfer.guest.tracked.set(false);
                    self.open_postcopy(false).await
                }
            };
        }
        self.start_tracking().await?;
        for number in 1.. {
            match self.iteration(number).await? {
                Decision::Continue => {}
                // The next round begins when the other host is there again: the pause needs it.
                Decision::SwitchOver | Decision::Postcopy { .. } if transfer.link.is_suspended() => {}
                Decision::Stun { pages_per_second, .. } => self.stun(pages_per_second).await?,
                Decision::SwitchOver => return Ok(()),
                Decision::Postcopy { .. } => return self.open_postcopy(true).await,
                Decision::GiveUp { why } => return Err(CopyError::GaveUp(why)),
            }
        }
        unreachable!("the policy bounds the number of iterations")
    }

    /// Sends what is dirty, finds what was written meanwhile, and decides how to go on.
    async fn iteration(&self, number: u32) -> Result<Decision, CopyError> {
        let transfer = &self.transfer;
        let started = Instant::now();
        self.begin_sample();
        let bytes_before = transfer.lanes.borrow().wire_bytes();
        let pages_before = transfer.lanes.borrow().pages();
        let pages = if number == 1 { transfer.guest.ram.pages() } else { transfer.outbound.dirty.count() };
        transfer.link.send(&Control::Iteration { number, pages }).await?;
        transfer.handle.update(|progress| {
            progress.ram.iterations.push(IterationView { number, pages, ..IterationView::default() });
        });
        if number == 1 {
            self.first_iteration().await?;
        }
        self.until_all_claimed().await?;
        self.sample();
        // Nothing is left to be sent until there is something new.
        self.sampled.set(None);
        let looked = Instant::now();
        let Harvested { new: dirtied_pages, stall } = transfer.harvest().await?;
        let harvest_seconds = looked.elapsed().saturating_sub(stall).as_secs_f64();
        let duration = started.elapsed().saturating_sub(stall);
        // While block I/O was waited for, the guest wrote on.
        let meanwhile = dirtied_pages as f64 * stall.as_secs_f64() / duration.as_secs_f64().max(1e-6);
        let remaining =
            transfer.outbound.dirty.count() + transfer.outbound.in_flight.count() + meanwhile as u64;
        let bytes = transfer.lanes.borrow().wire_bytes() - bytes_before;
        let sent = transfer.lanes.borrow().pages() - pages_before;
        let measured = Measurement::Iteration { took: duration, dirtied_pages };
        transfer.context.observer.measured(measured);
        transfer.handle.update(|progress| {
            let shown = progress.ram.iterations.last_mut().expect("pushed when the iteration began");
            let pages = if number == 1 { sent } else { pages };
            let seconds = duration.as_secs_f64();
            *shown = IterationView { number, pages, bytes, seconds, dirtied_pages, harvest_seconds };
        });
        let remaining_bytes = remaining * PAGE_SIZE;
        Ok(self.decide(&Iteration { number, duration, dirtied_pages, remaining_bytes }))
    }

    /// Decides what to do after an iteration.
    fn decide(&self, iteration: &Iteration) -> Decision {
        let mut convergence = self.convergence.borrow_mut();
        let verdict = convergence.after_iteration(iteration, &self.now(), &self.predictor.borrow());
        info!(
            guest = %self.transfer.handle.guest,
            round = iteration.number,
            seconds = iteration.duration.as_secs_f64(),
            dirtied_pages = iteration.dirtied_pages,
            "round ended"
        );
        self.note(&verdict);
        if let Some(remedy) = remedy(&verdict.decision) {
            self.transfer.context.observer.measured(Measurement::NotConverging(remedy));
        }
        verdict.decision
    }

    /// Returns what decisions are made from, as it is now.
    fn now(&self) -> Conditions {
        let transfer = &self.transfer;
        Conditions {
            bandwidth: self.bandwidth.borrow().bytes_per_second(),
            // Pages may take another way than words.
            round_trip: transfer
                .link
                .round_trip()
                .unwrap_or(self.round_trip)
                .max(transfer.lanes.borrow().round_trip()),
            state_bytes: self.state_bytes_in_pause(),
            // Comparing takes its time: the limit bounds the rest of the pause.
            verify: Duration::ZERO,
        }
    }

    /// Returns how much of the VMM's state will be sent in the pause, as far as that is known.
    fn state_bytes_in_pause(&self) -> u64 {
        let guest = &self.transfer.guest;
        match guest.saved_bytes.get() {
            Some(saved) if !sends_state_at_once(guest, self.verify) => saved,
            // Most of what the VMM could have it may never have used: video memory that is zero takes no room.
            saved => saved.or(guest.state_bytes.get()).unwrap_or_default().min(IN_PAUSE_BYTES),
        }
    }

    /// Logs and shows what was decided, and from which figures.
    fn note(&self, verdict: &Verdict) {
        self.forecast.set(Some(verdict.forecast));
        self.transfer.handle.update(|progress| {
            progress.pause.downtime_predicted_seconds = Some(verdict.forecast.total().as_secs_f64());
            progress.pause.forecast = Some(view(&verdict.forecast));
            progress.status.decision = Some(verdict.to_string());
        });
        let figures = &verdict.figures;
        info!(
            guest = %self.transfer.handle.guest,
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
        let transfer = &self.transfer;
        transfer.handle.update(|progress| progress.status.phase = Phase::Preparing);
        let started = Instant::now();
        transfer.start_tracking().await?;
        let took = started.elapsed();
        transfer.context.observer.measured(Measurement::TrackingStarted(took));
        transfer.handle.update(|progress| {
            progress.ram.tracking_start_seconds = Some(took.as_secs_f64());
            progress.status.phase = Phase::Copying;
        });
        Ok(())
    }

    /// Returns when a lane has claimed every page of this iteration. Pages that are on their way do not hold up the
    /// next one.
    ///
    /// An iteration that has nothing to claim ends when nothing is on its way either: it would otherwise be over in no
    /// time, and show nothing about how fast pages are written and sent.
    async fn until_all_claimed(&self) -> Result<(), CopyError> {
        let dirty = &self.transfer.outbound.dirty;
        if dirty.is_empty() {
            return self.transfer.until_all_acknowledged().await;
        }
        while !dirty.is_empty() {
            self.transfer.wait_for_lanes().await?;
        }
        Ok(())
    }

    /// Opens lanes again on ports that have lost them.
    async fn keep_lanes_open(&self, mut reconnector: LaneReconnector) -> ! {
        let transfer = &self.transfer;
        let silence = transfer.context.limits().silence;
        let is_missing = |route: &Route| {
            let busy = !transfer.outbound.dirty.is_empty();
            let too_few = transfer.lanes.borrow_mut().are_too_few(&route.port.name, route.lanes(), busy);
            too_few && !transfer.outbound.is_quiesced()
        };
        loop {
            let end = reconnector.next(is_missing).await;
            // Once the lanes are to come to an end, what was being opened meanwhile is closed.
            if !transfer.outbound.is_quiesced() {
                transfer.lanes.borrow_mut().send(end, &transfer.outbound, silence);
            }
        }
    }

    /// Keeps a lane for the VMM's state, so that none has to be opened when the guest is about to be paused. On its way there
    /// may be somebody who forgets a connection on which nothing happens for long.
    async fn keep_state_lane_open(&self) -> ! {
        const FORGOTTEN: Duration = Duration::from_secs(30);
        loop {
            self.transfer.open_state_lane().await;
            tokio::time::sleep(FORGOTTEN).await;
            self.transfer.state_lane.take();
        }
    }

    /// Measures bandwidth and shows progress, now and then.
    async fn keep_measuring(&self) -> ! {
        let mut ticker = tokio::time::interval(LOOK);
        for tick in 0u64.. {
            ticker.tick().await;
            self.sample();
            if tick % 5 == 0 {
                self.follow_lanes().await;
                self.show();
            }
        }
        unreachable!("the loop has no end")
    }

    /// Notes that from here on the lanes are busy with an iteration.
    fn begin_sample(&self) {
        self.sampled.set(Some((Instant::now(), self.transfer.lanes.borrow().acked_bytes())));
    }

    /// Adds what was acknowledged since the last sample of this iteration.
    fn sample(&self) {
        let Some((before, bytes_before)) = self.sampled.get() else { return };
        let bytes = self.transfer.lanes.borrow().acked_bytes();
        if bytes == bytes_before && before.elapsed() < LOOK {
            // What was sent just now cannot have been acknowledged yet.
            return;
        }
        let outbound = &self.transfer.outbound;
        // As while the first pages are protected, or block I/O is waited for: that says nothing of the wire.
        let idle = bytes == bytes_before && outbound.dirty.is_empty() && outbound.in_flight.is_empty();
        if !idle {
            self.bandwidth.borrow_mut().record(bytes - bytes_before, before.elapsed());
        }
        self.sampled.set(Some((Instant::now(), bytes)));
    }

    fn show(&self) {
        self.transfer.show();
        let bandwidth = self.bandwidth.borrow().bytes_per_second().unwrap_or(0.0);
        self.transfer.handle.update(|progress| progress.ram.bandwidth_bytes_per_second = bandwidth);
    }
}

/// Returns what a decision does about a guest that writes faster than it is sent, if that is what it is about.
fn remedy(decision: &Decision) -> Option<&'static str> {
    let (word, why) = match decision {
        Decision::Continue | Decision::SwitchOver => return None,
        Decision::Stun { why, .. } => ("stun", why),
        Decision::Postcopy { why } => ("postcopy", why),
        Decision::GiveUp { why } => ("give_up", why),
    };
    (!matches!(why.reason, Reason::Ordered | Reason::LimitTooShort)).then_some(word)
}

fn view(forecast: &Forecast) -> ForecastView {
    ForecastView {
        remaining_seconds: forecast.transfer.as_secs_f64(),
        round_trip_seconds: forecast.round_trips.as_secs_f64(),
        state_seconds: (forecast.save + forecast.state + forecast.load).as_secs_f64(),
        resume_seconds: (forecast.journal + forecast.resume).as_secs_f64(),
        verify_seconds: forecast.verify.as_secs_f64(),
        margin_seconds: forecast.margin.as_secs_f64(),
    }
}
