//! The destination is the side that is given the guest.

mod postcopy;
mod receive;
mod state;

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use memlane_api::ids;
use memlane_guest::Guest;
use memlane_lane::{ReceiveState, Totals};
use memlane_net::journal::Entry;
use memlane_net::link::{Link, LinkError};
use memlane_net::port::{ArrivedLane, LaneKind};
use memlane_net::resumable::ResumableLink;
use memlane_protocol::handover::{Action, Destination, Event, Message, Outcome, Phase, Record};
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::RunState;
use memlane_protocol::wire::control::{Accept, Control, Offer, Refusal, RefusalKind};
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::context::Context;
use crate::drive::{News, Role, Session, drive};
use crate::effects::Effects;
use crate::handle::MigrationHandle;
use crate::lanes::{LaneEnd, Lanes};
use crate::observer::Measurement;
use crate::preflight;
use crate::progress::{Outcome as OutcomeView, Phase as PhaseView, Role as RoleView};
use crate::state_lane::StateLane;
use crate::vmm::Vmm;

pub(crate) use postcopy::{Postcopy, PostcopyNews};
use receive::ReceiveError;
use state::{IncomingState, StateNews};

/// A source may have this many lanes open.
const MOST_LANES: usize = 256;

/// Answers an offer, and takes the guest if it can come.
pub(crate) async fn run(context: Rc<Context>, peer: Label, mut link: Link, offer: Offer) {
    let name = offer.shape.name.clone();
    let Some(offered) = context.take_offer(offer.migration) else {
        warn!(guest = %name, %peer, "refused an offer that names a migration which is known here");
        let reason = "this host knows a migration of that identity already, and one is never offered twice; \
            order it anew";
        let refusal = Refusal { what: RefusalKind::Busy, reason: reason.to_owned() };
        let _ = link.send(&Control::Refuse(vec![refusal])).await;
        link.until_closed().await;
        return;
    };
    make_way(&context, &peer, &name).await;
    let claim = match preflight::receive(&context, &peer, &offer).await {
        Ok(claim) => claim,
        Err(refusals) => {
            for refusal in &refusals {
                info!(guest = %name, %peer, what = refusal.what.name(), reason = refusal.reason, "refused a guest");
                context.observer.measured(Measurement::Refused(refusal.what.name()));
            }
            let _ = link.send(&Control::Refuse(refusals)).await;
            link.until_closed().await;
            return;
        }
    };
    let guest = claim.guest().clone();
    let token = ids::random();
    let accept = Control::Accept(Accept { token, ports: context.offered_ports() });
    let arriving = context.rendezvous.await_lanes(token, peer.clone(), MOST_LANES);
    if let Err(error) = link.send(&accept).await {
        info!(guest = %name, %peer, %error, "the source went away");
        return preflight::release(claim).await;
    }
    if offer.check_only {
        link.until_closed().await;
        return preflight::release(claim).await;
    }
    let vmm = guest.process.identity();
    let record = Record::Prepared;
    let (guest_name, migration) = (name.clone(), offer.migration);
    let (peer_name, shape) = (peer.clone(), guest.digest());
    let entry = Entry { migration, guest: guest_name, peer: peer_name, vmm, shape, record, fetching: false };
    let (handle, mut arrivals) =
        MigrationHandle::new(&entry, context.name(), RoleView::Destination, context.observer.clone());
    handle.update(|progress| {
        progress.ram.pages_total = guest.shape.pages();
        progress.status.phase = PhaseView::Copying;
    });
    context.migrations.add(handle.clone());
    drop(offered);
    info!(guest = %name, %peer, "a guest is coming");
    let inbound = Arc::new(ReceiveState { ram: guest.ram.clone(), postcopy: None });
    let lanes = Lanes::new(&context);
    let role = DestinationRole {
        handle: handle.clone(),
        guest: guest.clone(),
        lanes,
        inbound,
        arriving,
        postcopy: Postcopy::new(arrivals.links.take().expect("a new migration listens")),
        state: IncomingState::default(),
    };
    let to_effects = (Some(ResumableLink::over(link)), (handle, arrivals));
    let effects = Effects::new(context, entry, Vmm::Attached(guest), Some(claim), to_effects);
    // The acceptance has been sent with the ports.
    let session = Session::new(Destination::new(), effects);
    let mut session = drive(role, session, Vec::new(), [Event::Accepted]).await;
    let link = session.effects.link.take();
    drop(session);
    // What is said last, such as why it failed, is lost if this side closes the connection first.
    if let Some(mut link) = link {
        link.until_closed().await;
    }
}

struct DestinationRole {
    handle: Rc<MigrationHandle>,
    guest: Rc<Guest>,
    lanes: Lanes,
    inbound: Arc<ReceiveState>,
    arriving: mpsc::Receiver<ArrivedLane>,
    postcopy: Postcopy,
    /// This is the VMM's state, as far as it has come.
    state: IncomingState,
}

/// The destination itself waits for these events.
enum Own {
    Lane(ArrivedLane),
    Postcopy(PostcopyNews),
    State(StateNews),
}

impl Role for DestinationRole {
    type Machine = Destination;

    async fn next_event(&mut self, session: &mut Session<Destination>) -> Option<Event> {
        // Once its memory is there, nothing may write to it.
        let copying = session.machine.phase() == Phase::Copying && !self.state.is_with_memory();
        let receiving = session.machine.phase() == Phase::Copying
            && !self.state.is_whole()
            && self.lanes.running() < MOST_LANES;
        let Self { arriving, postcopy, state, .. } = self;
        let own = async {
            tokio::select! {
                biased;
                Some(lane) = arriving.recv(), if receiving => Own::Lane(lane),
                news = postcopy.next() => Own::Postcopy(news),
                news = state.news() => Own::State(news),
            }
        };
        match session.news(own).await {
            News::Message(message) => self.hear(session, message).await,
            News::Own(Own::Lane(lane)) => {
                let started = self.start(session, lane).map(|()| None);
                self.event(session, started)
            }
            News::Own(Own::State(StateNews::Loaded(loaded))) => self.note_loaded(session, loaded),
            News::Own(Own::State(StateNews::Lost(error))) => self.event(session, Err(error)),
            News::Own(Own::State(StateNews::Piece(piece))) => {
                if session.machine.phase() != Phase::Copying {
                    return None;
                }
                let taken = self.take_state(session, piece).await;
                self.event(session, taken)
            }
            News::Own(Own::Postcopy(PostcopyNews::Link(link))) => {
                self.postcopy.offered(&mut session.effects, link, copying).await;
                None
            }
            News::Own(Own::Postcopy(PostcopyNews::Fetched(Ok(())))) => {
                self.postcopy.complete(&mut session.effects).await
            }
            News::Own(Own::Postcopy(PostcopyNews::Fetched(Err(error)))) => self.fail(session, error),
            News::Event(event) => event,
            News::Cancelled => None,
            News::Abandoned => self.postcopy.abandoned(&mut session.effects).await,
            News::Moment => {
                self.show_lanes();
                match self.guest.ram.check() {
                    Err(lost) if copying => self.fail(session, lost),
                    _ => Some(session.tick()),
                }
            }
        }
    }

    async fn before(&mut self, session: &mut Session<Destination>, event: Event) {
        if self.gives_up_at(&session.machine, event) {
            self.abandon(session).await;
        }
    }

    fn decided(&mut self, session: &mut Session<Destination>) {
        if session.machine.phase() != Phase::Copying {
            self.state.stop();
        }
    }

    async fn begin(&mut self, session: &mut Session<Destination>, action: Action) {
        if let Action::Report(outcome) = action {
            self.report(session, outcome).await;
        }
    }

    fn show(&mut self, session: &mut Session<Destination>) {
        let phase = match session.machine.phase() {
            Phase::Committing => PhaseView::Committing,
            Phase::Fetching => PhaseView::Fetching,
            _ => return,
        };
        self.handle.abandonable.set(session.machine.can_abandon());
        let here = session.effects.context.name().to_string();
        self.handle.update(|progress| {
            if progress.status.outcome.is_some() {
                return;
            }
            progress.status.phase = phase;
            if phase == PhaseView::Fetching {
                progress.status.guest_runs_at = Some(here);
                self.postcopy.show(progress);
            }
        });
    }

    async fn end(&mut self, _: &mut Session<Destination>) {
        self.lanes.close().await;
    }
}

impl DestinationRole {
    pub(super) fn start(
        &mut self,
        session: &Session<Destination>,
        lane: ArrivedLane,
    ) -> Result<(), ReceiveError> {
        let context = &session.effects.context;
        let ArrivedLane { port, kind, socket, records, remote } = lane;
        let local = context.port_address(&port);
        let end = |number| LaneEnd { port, number, local, remote, socket, records };
        match kind {
            LaneKind::Pages(number) if !self.state.is_with_memory() => {
                self.lanes.receive(end(number), &self.inbound);
            }
            LaneKind::State(number) => {
                let lane = StateLane::over(end(number), context);
                self.state.come_over(number, lane.receive())?;
            }
            LaneKind::Pages(_) | LaneKind::Faults => {}
        }
        Ok(())
    }

    /// Returns the event of what was done, or has the migration fail.
    fn event(
        &mut self,
        session: &mut Session<Destination>,
        done: Result<Option<Event>, ReceiveError>,
    ) -> Option<Event> {
        done.unwrap_or_else(|error| self.fail(session, error))
    }

    async fn hear(
        &mut self,
        session: &mut Session<Destination>,
        message: Result<Control, LinkError>,
    ) -> Option<Event> {
        let message = match message {
            Ok(message) => message,
            Err(error) if self.state.is_loading() => return Some(session.peer_lost(error)),
            Err(error) => return session.link_lost(error),
        };
        match message {
            Control::Handover { migration, message, reason, .. }
                if migration == session.effects.entry.migration =>
            {
                session.effects.heard(message, &reason);
                Some(Event::Message(message))
            }
            message if session.machine.phase() == Phase::Copying => {
                let obeyed = self.obey(session, message).await;
                self.event(session, obeyed)
            }
            other => Some(session.peer_lost(format!("the source sent `{}` out of turn", other.name()))),
        }
    }

    /// Deals with memory of the guest that is not right here, and will not be. Where nothing can be done about that
    /// now, it is looked at again later.
    fn fail(&mut self, session: &mut Session<Destination>, error: impl std::fmt::Display) -> Option<Event> {
        let event = match session.machine.phase() {
            Phase::Copying => Event::Failed,
            _ if session.machine.can_abandon() => Event::Abandoned,
            _ => return None,
        };
        warn!(guest = %self.handle.guest, %error, "the migration fails");
        session.effects.blame(error);
        Some(event)
    }

    /// Tells whether the machine will give up at this event, before it was in doubt.
    fn gives_up_at(&self, machine: &Destination, event: Event) -> bool {
        let fatal = matches!(
            event,
            Event::PeerLost | Event::Failed | Event::VmmGone | Event::Message(Message::Abort)
        );
        fatal && machine.phase() == Phase::Copying
    }

    /// Leaves a VMM that others started waiting for another try if nothing was loaded into it. Its memory is given
    /// back, and discarding it would only have it started again.
    async fn abandon(&mut self, session: &mut Session<Destination>) {
        self.lanes.close().await;
        self.postcopy.withdraw(&mut session.effects).await;
        let has_begun = self.state.is_loading();
        self.state.stop();
        if !has_begun && !self.guest.launched_for_migration.get() && session.effects.guest().is_some() {
            session.effects.vmm = Vmm::Released;
            self.guest.driver.stand_down().await;
            let (ram, pages) = (self.guest.ram.clone(), self.guest.ram.pages());
            let punched = tokio::task::spawn_blocking(move || ram.punch(0..pages)).await;
            if let Ok(Err(error)) = punched {
                warn!(guest = %self.handle.guest, %error, "cannot give back the memory of a guest that did not come");
            }
        }
    }

    fn show_lanes(&mut self) {
        self.lanes.measure(false);
        self.handle.update(|progress| {
            let lanes = &self.lanes;
            self.postcopy.show_lanes(progress, |progress| lanes.show(progress, Totals::default()));
        });
    }

    async fn report(&mut self, session: &mut Session<Destination>, outcome: Outcome) {
        self.show_lanes();
        let here = session.effects.context.name().to_string();
        let reason = session.effects.reason.take();
        info!(guest = %self.handle.guest, %outcome, reason, "migration ended");
        match outcome {
            Outcome::Completed => {
                // Its VMM may have attached again since.
                let guest = session.effects.guest().unwrap_or(&self.guest);
                guest.run_state.set(RunState::Running);
                arrived(&session.effects.context, guest);
                session.effects.claim = None;
                self.handle.end(OutcomeView::Completed, None, Some(here));
            }
            Outcome::VmmGone => self.handle.end(OutcomeView::Lost, reason, None),
            Outcome::PoweredOff => self.handle.end(OutcomeView::PoweredOff, reason, None),
            Outcome::GivenUp => self.handle.end(OutcomeView::Failed, reason, None),
            Outcome::Lost => {
                self.postcopy.poison(&session.effects).await;
                let runs_here = session.effects.guest().map(|guest| {
                    guest.run_state.set(RunState::Running);
                    here
                });
                self.handle.end(OutcomeView::Lost, reason, runs_here);
            }
            // Only the source knows whether it still has the guest: its VMM may have ended.
            _ => self.handle.end(OutcomeView::Failed, reason, None),
        }
    }
}

/// Ends a migration of the same guest whose source was lost: it has begun anew. A moment is waited for that.
async fn make_way(context: &Context, peer: &Label, guest: &Label) {
    const MAKING_WAY: Duration = Duration::from_secs(2);
    let before = context.migrations.all().into_iter().rev().find(|handle| {
        handle.is_live() && handle.suspended.get() && handle.peer == *peer && handle.guest == *guest
    });
    let Some(before) = before else { return };
    before.make_way.notify_one();
    let ended = async {
        while before.is_live() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let _ = tokio::time::timeout(MAKING_WAY, ended).await;
}

/// Notes that a guest has begun to run on this host.
pub(crate) fn arrived(context: &Context, guest: &Guest) {
    guest.launched_for_migration.set(false);
    context.qemu.note_arrival(&guest.shape.name);
}
