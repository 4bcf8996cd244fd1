//! The half that has the guest and gives it away.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, pending};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use memlane_guest::{Claim, DriverError};
use memlane_lane::Outbound;
use memlane_net::journal::Entry;
use memlane_net::link::LinkError;
use memlane_protocol::PageSet;
use memlane_protocol::bandwidth::Bandwidth;
use memlane_protocol::compression;
use memlane_protocol::convergence::{Measured, Policy};
use memlane_protocol::handover::{Action, Event, Message, Outcome, Phase, Source};
use memlane_protocol::wire::control::Control;
use tokio::sync::{Mutex, mpsc};
use tracing::{info, warn};

use super::copy::{CopyError, Copying};
use super::executor::{Deadline, Executor, TICK, Vmm, receive, until, vmm_news};
use super::lanes::{self, Lanes};
use super::preflight::Plan;
use super::reopen::Reopener;
use crate::context::Context;
use crate::handle::{Arrivals, Ticket};
use crate::observer::Measurement;
use crate::progress::{Outcome as OutcomeView, Phase as PhaseView};

/// Answers of the destination that wait to be dealt with.
const ANSWERS_WAITING: usize = 16;

/// What the order allows and wants.
#[derive(Clone, Copy, Debug)]
pub struct Wishes {
    /// Downtime limit and rounds.
    pub policy: Policy,
    /// Compare digests in the pause.
    pub verify: bool,
    /// Whether lanes may compress.
    pub compression: compression::Mode,
}

/// A stage of the work that goes on while messages are listened to.
type Stage = Pin<Box<dyn Future<Output = Result<Event, CopyError>>>>;

struct Run {
    executor: Executor,
    machine: Source,
    ticket: Rc<Ticket>,
    copying: Rc<Copying>,
    stage: Option<Stage>,
    /// Takes what the destination says to the stage that waits for it.
    answers: mpsc::Sender<Control>,
    /// What the destination measured: loading, resuming.
    remote_times: (Duration, Duration),
    downtime: Option<Duration>,
}

/// Moves `guest` as planned, to the end.
pub async fn run(
    context: Rc<Context>,
    claim: Claim,
    entry: Entry,
    (ticket, arrivals): (Rc<Ticket>, Arrivals),
    plan: Plan,
    wishes: Wishes,
) {
    Run::prepare(context, claim, entry, (ticket, arrivals), plan, wishes).drive().await;
}

impl Run {
    fn prepare(
        context: Rc<Context>,
        claim: Claim,
        entry: Entry,
        (ticket, arrivals): (Rc<Ticket>, Arrivals),
        plan: Plan,
        wishes: Wishes,
    ) -> Self {
        let (guest, (bell, ring)) = (claim.guest().clone(), lanes::bell());
        let mut outbound = Outbound::new(guest.ram.clone(), ring);
        outbound.compress = wishes.compression == compression::Mode::Auto;
        let outbound = Arc::new(outbound);
        let mut lanes = Lanes::new(&context);
        for end in plan.lanes {
            lanes.send(end, &outbound, context.limits().silence);
        }
        let (answers, answers_arriving) = mpsc::channel(ANSWERS_WAITING);
        let copying = Rc::new(Copying {
            context: context.clone(),
            bell,
            guest: guest.clone(),
            ticket: ticket.clone(),
            outbound,
            lanes: lanes.into(),
            reopener: Some(Reopener::new(plan.routes)).into(),
            link: plan.link.sender(),
            answers: Mutex::new(answers_arriving),
            bandwidth: RefCell::new(Bandwidth::new()),
            sampled: Cell::default(),
            stunned: Cell::default(),
            predictor: context.predictor(&guest.shape.machine.vmm),
            round_trip: plan.round_trip,
            policy: wishes.policy,
            verify: wishes.verify,
            forecast: Cell::default(),
            paused_at: Cell::default(),
            save_time: Cell::default(),
            comparing: Cell::default(),
            verify_time: Cell::default(),
            holes_sent: Cell::default(),
            holes_made: Cell::default(),
            lanes_lost: RefCell::default(),
            postcopy: RefCell::default(),
            told_missing: PageSet::new(guest.ram.pages()).into(),
        });
        let (machine, _offer) = Source::new();
        let for_executor = (ticket.clone(), arrivals);
        Self {
            executor: Executor::new(
                context,
                entry,
                Vmm::Attached(guest),
                Some(claim),
                (Some(plan.link), for_executor),
            ),
            machine,
            ticket,
            copying,
            stage: None,
            answers,
            remote_times: Default::default(),
            downtime: None,
        }
    }

    async fn drive(mut self) {
        // The preflight has offered the guest and heard the acceptance.
        let mut events = VecDeque::from([Event::Message(Message::Accept)]);
        while !self.machine.is_over() {
            let event = match events.pop_front() {
                Some(event) => event,
                None => match self.next_event().await {
                    Some(event) => event,
                    None => continue,
                },
            };
            self.note(event);
            let actions = self.machine.on(event);
            if !matches!(self.machine.phase(), Phase::Copying | Phase::SwitchingOver) {
                self.end_stage();
            }
            if matches!(self.machine.phase(), Phase::Returning | Phase::Finishing | Phase::Completed) {
                self.copying.postcopy.take();
            }
            self.executor.commit_by = self.deadline();
            let left = self.executor.carry_out(&mut self.machine, actions).await;
            if event == Event::PeerLost {
                events.push_back(Event::Tick); // what is in doubt is asked about at once
            }
            self.ticket.cancellable.set(self.machine.can_cancel());
            self.ticket.abandonable.set(self.machine.can_abandon());
            for action in left {
                self.begin(action).await;
            }
            self.show_phase();
            self.executor.show_doubt(&self.machine);
        }
        let closed = self.copying.lanes.borrow().close();
        closed.await;
        self.executor.release();
    }

    /// Copies no more. A stage may be waiting for the VMM, which could not be asked anything
    /// else meanwhile; and before the guest runs again, no lane must read its memory.
    fn end_stage(&mut self) {
        self.stage = None;
        self.copying.guest.let_writes_go();
        drop(self.copying.lanes.borrow().close());
        self.copying.outbound.still.store(false, Ordering::Release);
    }

    /// Starts a stage, or reports the end.
    async fn begin(&mut self, action: Action) {
        let copying = self.copying.clone();
        match action {
            Action::Copy => {
                self.stage = Some(Box::pin(async move { copying.run().await.map(|()| Event::SwitchOver) }));
            }
            Action::Pause => {
                // What was written before is not part of the pause.
                self.executor.journal_time = Duration::ZERO;
                self.stage = Some(Box::pin(async move { copying.pause().await.map(|()| Event::Sent) }));
            }
            // It is served since before the guest was handed over.
            Action::Serve => {
                info!(guest = %self.ticket.guest, "the guest runs at the destination, without all of its memory")
            }
            Action::Report(outcome) => self.report(outcome),
            _ => unreachable!("the executor carries out all other actions"),
        }
    }

    /// Waits for whatever happens next; `None` if it does not concern the handover.
    async fn next_event(&mut self) -> Option<Event> {
        let deadline = self.deadline();
        let mut cancelled = self.ticket.cancelled.subscribe();
        let mut abandoned = self.ticket.abandoned.subscribe();
        let Arrivals { words, returns, resolutions, .. } = &mut self.executor.arrivals;
        tokio::select! {
            biased;
            message = receive(&mut self.executor.link) => self.hear(message),
            Some(word) = words.recv() => {
                self.executor.reply = Some(word.reply);
                Some(Event::Message(word.message))
            }
            result = work(&mut self.stage) => {
                self.stage = None;
                Some(result.unwrap_or_else(|error| {
                    warn!(guest = %self.ticket.guest, %error, "the migration fails");
                    match error {
                        CopyError::Driver(DriverError::Gone | DriverError::Unheard) => self.executor.note_gone(),
                        _ => self.executor.blame(error),
                    }
                    Event::Failed
                }))
            }
            Ok(_) = cancelled.wait_for(|cancelled| *cancelled), if self.machine.can_cancel() => {
                self.executor.blame("cancelled by the operator");
                Some(Event::Cancel)
            }
            Ok(_) = abandoned.wait_for(|abandoned| *abandoned), if self.machine.can_abandon() => {
                self.executor.blame("abandoned by the operator: the destination is gone for good");
                Some(Event::Abandoned)
            }
            Some(resolution) = resolutions.recv() => Some(self.executor.note_resolution(resolution)),
            news = vmm_news(&self.executor.vmm, returns) => self.executor.note_vmm(news).await,
            () = until(deadline.map(|deadline| deadline.at)) => {
                self.executor.blame(deadline.map(|deadline| deadline.reason()).unwrap_or_default());
                Some(Event::Failed)
            }
            () = tokio::time::sleep(TICK) => Some(self.executor.tick(&self.machine)),
        }
    }

    /// A message on the migration's own connection.
    fn hear(&mut self, message: Result<Control, LinkError>) -> Option<Event> {
        let message = match message {
            Ok(message) => message,
            Err(error) => return Some(self.peer_lost(error.to_string())),
        };
        match message {
            Control::Handover { migration, message, nanoseconds, reason }
                if migration == self.executor.entry.migration =>
            {
                let time = Duration::from_nanos(nanoseconds);
                match message {
                    Message::Ready => self.remote_times.0 = time,
                    Message::Running | Message::Fetching if self.downtime.is_none() => {
                        self.remote_times.1 = time
                    }
                    Message::Lost => {
                        self.executor.blame(format!("the destination says that the guest is lost: {reason}"))
                    }
                    Message::Abort | Message::Declined => {
                        self.executor.blame(format!("the destination gave up: {reason}"));
                    }
                    _ => {}
                }
                Some(Event::Message(message))
            }
            Control::Fetched(report) => {
                self.ticket.update(|progress| progress.postcopy.get_or_insert_default().report(&report));
                None
            }
            Control::LaneClosed(lane) => {
                self.copying.take_back(lane);
                None
            }
            Control::HolesDone => {
                self.copying.holes_made();
                None
            }
            Control::Digests { .. } | Control::MissingDone if self.stage.is_some() => {
                match self.answers.try_send(message) {
                    Ok(()) => None,
                    Err(_) => Some(self.peer_lost("the destination answers more than it was asked".into())),
                }
            }
            // Of a stage that has ended meanwhile.
            Control::Digests { .. } | Control::MissingDone => None,
            other => Some(self.peer_lost(format!("the destination sent `{}` out of turn", other.name()))),
        }
    }

    fn peer_lost(&mut self, reason: String) -> Event {
        self.executor.blame(reason);
        self.executor.link = None;
        Event::PeerLost
    }

    /// When the pause must have come to the commit, or end.
    fn deadline(&self) -> Option<Deadline> {
        let limit = self.copying.policy.downtime_limit;
        // Until the commit begins to be written, the guest can be kept.
        let paused_at = self.copying.paused_at.get().filter(|_| self.machine.can_cancel())?;
        // Comparing digests has a bound of its own, by the size of memory.
        let verified = (!self.copying.comparing.get()).then(|| self.copying.verify_time.get())?;
        let later = self.copying.forecast.get().map_or(Duration::ZERO, |forecast| forecast.after_commit());
        Some(Deadline { at: paused_at + verified + limit.saturating_sub(later), limit })
    }

    /// Takes the time as soon as the destination says that the guest runs.
    fn note(&mut self, event: Event) {
        if matches!(event, Event::Message(Message::Running | Message::Fetching))
            && self.downtime.is_none()
            && let Some(paused_at) = self.copying.paused_at.get()
        {
            let downtime = paused_at.elapsed();
            self.downtime = Some(downtime);
            self.learn(downtime);
            let peer = self.ticket.peer.to_string();
            self.ticket.update(|progress| {
                progress.downtime_seconds = Some(downtime.as_secs_f64());
                progress.load_seconds = Some(self.remote_times.0.as_secs_f64());
                progress.guest_runs_at = Some(peer);
            });
        }
    }

    fn learn(&self, downtime: Duration) {
        let Some(forecast) = self.copying.forecast.get() else { return };
        let measured = Measured {
            downtime: downtime.saturating_sub(self.copying.verify_time.get()),
            save: self.copying.save_time.get(),
            load: self.remote_times.0.min(downtime),
            // The destination writes two records, this host one.
            journal: self.executor.journal_time * 3,
            resume: self.remote_times.1.min(downtime),
        };
        let (actual, predicted) = (measured.downtime, forecast.total());
        self.copying.context.observer.measured(Measurement::Downtime { actual, predicted });
        self.copying.predictor.borrow_mut().learn(&forecast, &measured);
        info!(guest = %self.ticket.guest, ?measured, predicted = ?forecast, "the pause, and what was expected");
    }

    fn show_phase(&self) {
        let phase = match self.machine.phase() {
            Phase::Committing | Phase::Finishing => PhaseView::Committing,
            Phase::Fetching => PhaseView::Fetching,
            _ => return,
        };
        self.ticket.update(|progress| {
            if progress.outcome.is_none() {
                progress.phase = phase;
            }
        });
    }

    fn report(&mut self, outcome: Outcome) {
        if self.ticket.progress.borrow().postcopy.is_none() {
            self.copying.show();
        }
        let (here, there) = (self.executor.context.name().to_string(), self.ticket.peer.to_string());
        let reason = self.executor.reason.take();
        let (view, reason, runs_at) = match outcome {
            Outcome::Completed => (OutcomeView::Completed, None, Some(there)),
            Outcome::Refused => (OutcomeView::Refused, reason, Some(here)),
            Outcome::Cancelled => (OutcomeView::Cancelled, reason, Some(here)),
            Outcome::Failed | Outcome::TakenBack => (OutcomeView::Failed, reason, Some(here)),
            Outcome::VmmGone | Outcome::GivenUp => (OutcomeView::Failed, reason, None),
            Outcome::Lost => (OutcomeView::Lost, reason, None),
        };
        info!(guest = %self.ticket.guest, %outcome, reason, "migration ended");
        self.ticket.update(|progress| {
            progress.pages_remaining = 0;
            if let Some(postcopy) = &mut progress.postcopy {
                postcopy.waits_for = None;
            }
        });
        self.ticket.end(view, reason, runs_at);
    }
}

async fn work(stage: &mut Option<Stage>) -> Result<Event, CopyError> {
    match stage {
        Some(stage) => stage.await,
        None => pending().await,
    }
}
