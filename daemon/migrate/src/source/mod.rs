//! The source is the side that has the guest and gives it away.
//!
//! It goes through two stages, each of which owns what it works with: [`Precopy`](precopy::Precopy) copies while the
//! guest runs, and becomes a [`Switchover`](switchover::Switchover), which sends the rest while it is paused. Both
//! share a [`Transfer`](transfer::Transfer).

mod error;
mod first_iteration;
mod postcopy;
mod precopy;
pub(crate) mod serve;
mod state;
mod stun;
mod switchover;
mod transfer;
mod verify;

use std::future::pending;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use memlane_guest::{Claim, DriverError};
use memlane_net::journal::Entry;
use memlane_net::link::LinkError;
use memlane_net::resumable::ResumableLink;
use memlane_protocol::compression;
use memlane_protocol::convergence::Policy;
use memlane_protocol::handover::{Action, Event, Message, Outcome, Phase, Source};
use memlane_protocol::wire::control::Control;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::context::Context;
use crate::drive::{News, Role, Session, drive, until};
use crate::effects::{Deadline, Effects};
use crate::handle::{Arrivals, MigrationHandle};
use crate::lane_reconnect::LaneReconnector;
use crate::observer::Measurement;
use crate::preflight::Plan;
use crate::progress::{Outcome as OutcomeView, Phase as PhaseView};
use crate::vmm::Vmm;

use error::CopyError;
use precopy::Precopy;
use switchover::{Paused, RemoteTimes, Switchover};
use transfer::Transfer;

/// The parameters are what an order allows and wants.
#[derive(Clone, Copy, Debug)]
pub struct MigrateParameters {
    /// This is the downtime limit, the number of iterations, and what is done when they do not shrink.
    pub policy: Policy,
    /// If this is true, digests are compared in the pause.
    pub verify: bool,
    /// This tells whether lanes may compress.
    pub compression: compression::Mode,
    /// While the guest is copied, the other host may be out of reach for this long, and so may all of its ports.
    pub patience: Duration,
}

/// Moves the claimed guest as planned, to the end.
pub(crate) async fn run(
    context: Rc<Context>,
    claim: Claim,
    entry: Entry,
    (handle, arrivals): (Rc<MigrationHandle>, Arrivals),
    plan: Plan,
    parameters: MigrateParameters,
) {
    let guest = claim.guest().clone();
    let (version, routes) = (plan.link.version(), Rc::new(plan.routes));
    let link = ResumableLink::over(plan.link);
    if link.can_resume() {
        let milliseconds = u32::try_from(parameters.patience.as_millis()).unwrap_or(u32::MAX);
        // A broken link is noticed by the task that listens to it.
        let _ = link.send(&Control::Patience { milliseconds }).await;
    }
    let (transfer, answers) = Transfer::new(
        context.clone(),
        guest.clone(),
        handle.clone(),
        (link.sender(), version, routes.clone()),
        &parameters,
    );
    for end in plan.lanes {
        transfer.lanes.borrow_mut().send(end, &transfer.outbound, context.limits().silence);
    }
    let precopy = Precopy::new(transfer.clone(), parameters.policy, parameters.verify, plan.round_trip);
    let role = SourceRole {
        handle: handle.clone(),
        transfer,
        next: Some(Next::Precopy(precopy, LaneReconnector::new(routes))),
        stage: None,
        paused: None,
        answers,
        remote_times: RemoteTimes::default(),
        downtime: None,
    };
    let (machine, _offer) = Source::new();
    let to_effects = (Some(link), (handle, arrivals));
    let mut effects = Effects::new(context, entry, Vmm::Attached(guest), Some(claim), to_effects);
    effects.patience = parameters.patience;
    // The preflight has offered the guest and heard the acceptance.
    drive(role, Session::new(machine, effects), Vec::new(), [Event::Message(Message::Accept)]).await;
}

/// A stage works while messages are listened to.
type Stage = Pin<Box<dyn Future<Output = Result<Done, CopyError>>>>;

/// A stage ends with one of these results.
enum Done {
    /// It is time to switch over.
    Copied(Switchover),
    /// The destination has all that it needs to run the guest.
    Sent(Paused),
}

/// The stage that is to begin next.
#[expect(clippy::large_enum_variant, reason = "each migration has one")]
enum Next {
    Precopy(Precopy, LaneReconnector),
    Switchover(Switchover),
}

struct SourceRole {
    handle: Rc<MigrationHandle>,
    transfer: Rc<Transfer>,
    next: Option<Next>,
    stage: Option<Stage>,
    /// This is the pause, from when everything is sent.
    paused: Option<Paused>,
    /// This takes what the destination says to the stage that waits for it.
    answers: mpsc::Sender<Control>,
    remote_times: RemoteTimes,
    downtime: Option<Duration>,
}

impl Role for SourceRole {
    type Machine = Source;

    async fn next_event(&mut self, session: &mut Session<Source>) -> Option<Event> {
        let deadline = self.deadline(&session.machine);
        let stage = &mut self.stage;
        let own = async {
            tokio::select! {
                biased;
                result = work(stage) => Ok(result),
                () = until(deadline.map(|deadline| deadline.at)) => Err(deadline),
            }
        };
        match session.news(own).await {
            News::Message(message) => self.hear(session, message),
            News::Own(Ok(result)) => Some(self.stage_ended(session, result)),
            News::Own(Err(deadline)) => {
                session.effects.blame(deadline.map(|deadline| deadline.reason()).unwrap_or_default());
                Some(Event::Failed)
            }
            News::Event(event) => event,
            News::Cancelled => {
                session.effects.blame("cancelled by the operator");
                Some(Event::Cancel)
            }
            News::Abandoned => {
                session.effects.blame("abandoned by the operator: the destination is gone for good");
                Some(Event::Abandoned)
            }
            News::Moment => Some(session.tick()),
        }
    }

    async fn before(&mut self, session: &mut Session<Source>, event: Event) {
        if matches!(event, Event::Message(Message::Running | Message::Fetching)) {
            self.note_downtime(session);
        }
    }

    fn decided(&mut self, session: &mut Session<Source>) {
        let phase = session.machine.phase();
        if !matches!(phase, Phase::Copying | Phase::SwitchingOver) {
            self.end_stage();
        }
        if matches!(phase, Phase::Returning | Phase::Finishing | Phase::Completed)
            && let Some(paused) = &mut self.paused
        {
            paused.end_serving();
        }
        session.effects.commit_by = self.deadline(&session.machine);
    }

    async fn begin(&mut self, session: &mut Session<Source>, action: Action) {
        match action {
            Action::Copy => {
                if let Some(Next::Precopy(precopy, reconnector)) = self.next.take() {
                    let copied = async move { precopy.run(reconnector).await.map(Done::Copied) };
                    self.stage = Some(Box::pin(copied));
                }
            }
            Action::Pause => {
                // What was written before is not part of the pause.
                session.effects.times.journal = Duration::ZERO;
                if let Some(Next::Switchover(switchover)) = self.next.take() {
                    let sent = async move { switchover.run().await.map(Done::Sent) };
                    self.stage = Some(Box::pin(sent));
                }
            }
            // It is served since before the guest was handed over.
            Action::Serve if session.machine.phase() == Phase::Fetching => {
                info!(guest = %self.handle.guest, "the guest runs at the destination, without all of its memory")
            }
            Action::Serve => {
                info!(guest = %self.handle.guest, "the guest's VMM at the destination waits for memory that is here")
            }
            Action::Report(outcome) => self.report(session, outcome),
            _ => unreachable!("these are effects"),
        }
    }

    fn show(&mut self, session: &mut Session<Source>) {
        self.handle.cancellable.set(session.machine.can_cancel());
        self.handle.abandonable.set(session.machine.can_abandon());
        let phase = match session.machine.phase() {
            Phase::Committing | Phase::Finishing => PhaseView::Committing,
            Phase::Fetching => PhaseView::Fetching,
            _ => return,
        };
        self.handle.update(|progress| {
            if progress.status.outcome.is_none() {
                progress.status.phase = phase;
            }
        });
    }

    async fn end(&mut self, _: &mut Session<Source>) {
        let closed = self.transfer.lanes.borrow().close();
        closed.await;
    }
}

impl SourceRole {
    /// Ends copying. A stage may be waiting for the VMM, which could not be asked anything else meanwhile. And before
    /// the guest runs again, no lane must read its memory.
    fn end_stage(&mut self) {
        (self.stage, self.next) = (None, None);
        drop(self.transfer.stop());
    }

    fn stage_ended(&mut self, session: &mut Session<Source>, result: Result<Done, CopyError>) -> Event {
        self.stage = None;
        match result {
            Ok(Done::Copied(switchover)) => {
                self.next = Some(Next::Switchover(switchover));
                Event::SwitchOver
            }
            Ok(Done::Sent(paused)) => {
                self.paused = Some(paused);
                Event::Sent
            }
            Err(error) => {
                warn!(guest = %self.handle.guest, %error, "the migration fails");
                self.handle.may_be_retried.set(!matches!(error, CopyError::GaveUp(_)));
                match error {
                    CopyError::Driver(DriverError::Gone | DriverError::Unheard) => {
                        session.effects.note_gone()
                    }
                    _ => session.effects.blame(error),
                }
                Event::Failed
            }
        }
    }

    /// Takes a message that came on the migration's own connection.
    fn hear(&mut self, session: &mut Session<Source>, message: Result<Control, LinkError>) -> Option<Event> {
        let message = match message {
            Ok(message) => message,
            Err(error) => return session.link_lost(error),
        };
        match message {
            Control::Handover { migration, message, nanoseconds, reason }
                if migration == session.effects.entry.migration =>
            {
                let time = Duration::from_nanos(nanoseconds);
                match message {
                    Message::Ready => self.remote_times.load = time,
                    Message::Running | Message::Fetching if self.downtime.is_none() => {
                        self.remote_times.resume = time
                    }
                    _ => {}
                }
                session.effects.heard(message, &reason);
                Some(Event::Message(message))
            }
            Control::Fetched(report) => {
                self.handle.update(|progress| progress.postcopy.get_or_insert_default().report(&report));
                None
            }
            Control::LaneClosed(lane) => {
                self.transfer.outbound.take_back(lane);
                None
            }
            Control::HolesDone => {
                self.transfer.holes_made();
                None
            }
            Control::Digests { .. } | Control::MissingDone if self.stage.is_some() => {
                match self.answers.try_send(message) {
                    Ok(()) => None,
                    Err(_) => Some(session.peer_lost("the destination answers more than it was asked")),
                }
            }
            // Of a stage that has ended meanwhile.
            Control::Digests { .. } | Control::MissingDone => None,
            other => Some(session.peer_lost(format!("the destination sent `{}` out of turn", other.name()))),
        }
    }

    /// Returns when a pause in which everything is sent must have come to the commit, or end. Before that the stage
    /// sees to it itself. Until the commit begins to be written, the guest can be kept.
    fn deadline(&self, machine: &Source) -> Option<Deadline> {
        let paused = self.paused.as_ref().filter(|_| machine.can_cancel())?;
        Some(paused.deadline())
    }

    /// Takes the time as soon as the destination says that the guest runs.
    fn note_downtime(&mut self, session: &mut Session<Source>) {
        let Some(paused) = self.paused.as_ref().filter(|_| self.downtime.is_none()) else { return };
        let downtime = paused.at.elapsed();
        self.downtime = Some(downtime);
        if let Some((measured, forecast)) =
            paused.learn(downtime, session.effects.times.journal, self.remote_times)
        {
            let (actual, predicted, limit) = (measured.downtime, forecast.total(), paused.downtime_limit);
            self.transfer.context.observer.measured(Measurement::Downtime { actual, predicted, limit });
            info!(guest = %self.handle.guest, ?measured, predicted = ?forecast, "the pause, and what was expected");
        }
        let peer = self.handle.peer.to_string();
        self.handle.update(|progress| {
            progress.pause.downtime_seconds = Some(downtime.as_secs_f64());
            progress.pause.load_seconds = Some(self.remote_times.load.as_secs_f64());
            progress.status.guest_runs_at = Some(peer);
        });
    }

    fn report(&mut self, session: &mut Session<Source>, outcome: Outcome) {
        if self.handle.progress.borrow().postcopy.is_none() {
            self.transfer.show();
        }
        let (here, there) = (self.transfer.context.name().to_string(), self.handle.peer.to_string());
        let reason = session.effects.reason.take();
        let (view, reason, runs_at) = match outcome {
            Outcome::PoweredOff => (OutcomeView::PoweredOff, reason, None),
            Outcome::Completed if session.effects.powered_off => (OutcomeView::PoweredOff, reason, None),
            Outcome::Completed => (OutcomeView::Completed, None, Some(there)),
            Outcome::Refused => (OutcomeView::Refused, reason, Some(here)),
            Outcome::Cancelled => (OutcomeView::Cancelled, reason, Some(here)),
            Outcome::Failed | Outcome::TakenBack => (OutcomeView::Failed, reason, Some(here)),
            Outcome::VmmGone | Outcome::GivenUp => (OutcomeView::Failed, reason, None),
            Outcome::Lost => (OutcomeView::Lost, reason, None),
        };
        info!(guest = %self.handle.guest, %outcome, reason, "migration ended");
        self.handle.update(|progress| {
            progress.ram.pages_remaining = 0;
            if let Some(postcopy) = &mut progress.postcopy {
                postcopy.end(matches!(outcome, Outcome::Completed | Outcome::PoweredOff));
            }
        });
        self.handle.end(view, reason, runs_at);
    }
}

async fn work(stage: &mut Option<Stage>) -> Result<Done, CopyError> {
    match stage {
        Some(stage) => stage.await,
        None => pending().await,
    }
}
