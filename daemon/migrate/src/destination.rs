//! The half that is given the guest.

use std::collections::VecDeque;
use std::future::pending;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use memlane_api::ids;
use memlane_guest::{DriverError, Guest};
use memlane_lane::Inbound;
use memlane_net::journal::Entry;
use memlane_net::link::{Link, LinkError};
use memlane_net::port::{ArrivedLane, LaneKind};
use memlane_protocol::handover::{Action, Destination, Event, Message, Outcome, Phase, Record};
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::Standing;
use memlane_protocol::wire::control::{Accept, Control, MAX_DIGESTS, Offer, Refusal, Respect};
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use super::digest::digest_all;
use super::executor::{Executor, TICK, Vmm, receive, vmm_news};
use super::fetch::{Fetching, Session};
use super::lanes::{LaneEnd, Lanes};
use super::preflight;
use crate::context::Context;
use crate::handle::{Arrivals, Ticket};
use crate::observer::Measurement;
use crate::progress::{Outcome as OutcomeView, Phase as PhaseView, Role, Round as RoundView};

/// Lanes that a source may have open.
const MOST_LANES: usize = 256;
/// The source has no memory for this guest.
const GONE: &str = "the source does not have the guest's memory any more, and part of it is missing here";

struct Run {
    executor: Executor,
    machine: Destination,
    ticket: Rc<Ticket>,
    guest: Rc<Guest>,
    lanes: Lanes,
    inbound: Arc<Inbound>,
    arriving: mpsc::Receiver<ArrivedLane>,
    /// The state, as far as it has come.
    state: Vec<u8>,
    /// The VMM was told to load, and has not said that it did not.
    loaded: bool,
    /// The source offered to serve what is missing: the guest is to run without all of its memory.
    fetching: Option<Fetching>,
    /// What the source had connected until the last page came: closed when it has heard of that.
    fetched: Option<Session>,
}

/// Answers an offer, and takes the guest if it can come.
pub async fn run(context: Rc<Context>, peer: Label, mut link: Link, offer: Offer) {
    let name = offer.shape.name.clone();
    let Some(offered) = context.take_offer(offer.migration) else {
        warn!(guest = %name, %peer, "refused an offer that names a migration which is known here");
        let reason = "this host knows a migration of that identity already, and one is never offered twice; \
            order it anew";
        let refusal = Refusal { what: Respect::Busy, reason: reason.to_owned() };
        let _ = link.send(&Control::Refuse(vec![refusal])).await;
        link.until_closed().await;
        return;
    };
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
    let (ticket, arrivals) = Ticket::new(&entry, &context, Role::Destination);
    ticket.update(|progress| {
        progress.pages_total = guest.shape.pages();
        progress.phase = PhaseView::Copying;
    });
    context.migrations.add(ticket.clone());
    drop(offered);
    info!(guest = %name, %peer, "a guest is coming");
    let inbound = Arc::new(Inbound { ram: guest.ram.clone(), placing: None });
    let lanes = Lanes::new(&context);
    let run = Run {
        executor: Executor::new(
            context,
            entry,
            Vmm::Attached(guest.clone()),
            Some(claim),
            (Some(link), (ticket.clone(), arrivals)),
        ),
        machine: Destination::new(),
        ticket,
        guest: guest.clone(),
        lanes,
        inbound,
        arriving,
        state: Vec::new(),
        loaded: false,
        fetching: None,
        fetched: None,
    };
    run.drive().await;
}

impl Run {
    async fn drive(mut self) {
        // The acceptance has been sent with the ports.
        let mut events = VecDeque::from([Event::Accepted]);
        while !self.machine.is_over() {
            let event = match events.pop_front() {
                Some(event) => event,
                None => match self.next_event().await {
                    Some(event) => event,
                    None => {
                        self.show_phase();
                        continue;
                    }
                },
            };
            if self.gives_up_at(event) {
                self.abandon().await;
            }
            let actions = self.machine.on(event);
            let left = self.executor.carry_out(&mut self.machine, actions).await;
            if event == Event::PeerLost {
                events.push_back(Event::Tick); // what is in doubt is asked about at once
            }
            for action in left {
                if let Action::Report(outcome) = action {
                    self.report(outcome).await;
                }
            }
            self.show_phase();
            self.executor.show_doubt(&self.machine);
        }
        self.lanes.close().await;
        self.executor.release();
    }

    /// Waits for whatever happens next; `None` if it does not concern the handover.
    async fn next_event(&mut self) -> Option<Event> {
        // Once the state is there, nothing may write to the guest's memory.
        let copying = self.machine.phase() == Phase::Copying && !self.loaded;
        let receiving = copying && self.lanes.running() < MOST_LANES;
        let mut abandoned = self.ticket.abandoned.subscribe();
        let Arrivals { words, returns, links, resolutions } = &mut self.executor.arrivals;
        tokio::select! {
            biased;
            message = receive(&mut self.executor.link) => self.hear(message).await,
            Some(word) = words.recv() => {
                self.executor.reply = Some(word.reply);
                Some(Event::Message(word.message))
            }
            Some(lane) = self.arriving.recv(), if receiving => {
                self.start(lane);
                None
            }
            Some(link) = links.recv() => self.fetch_over(link).await,
            whole = completes(&mut self.fetching) => match whole {
                Ok(()) => self.complete().await,
                Err(reason) => self.fail(reason),
            },
            Ok(_) = abandoned.wait_for(|abandoned| *abandoned), if self.machine.can_abandon() => {
                self.abandoned().await
            }
            Some(resolution) = resolutions.recv() => Some(self.executor.note_resolution(resolution)),
            news = vmm_news(&self.executor.vmm, returns) => self.executor.note_vmm(news).await,
            () = tokio::time::sleep(TICK) => {
                self.show();
                match self.guest.ram.check() {
                    Err(lost) if copying => self.fail(lost.to_string()),
                    _ => Some(self.executor.tick(&self.machine)),
                }
            }
        }
    }

    fn start(&mut self, lane: ArrivedLane) {
        let ArrivedLane { port, kind: LaneKind::Pages(number), socket, remote } = lane else { return };
        let local = self.executor.context.port_address(&port);
        self.lanes.receive(LaneEnd { port, number, local, remote, socket }, &self.inbound);
    }

    async fn hear(&mut self, message: Result<Control, LinkError>) -> Option<Event> {
        let message = match message {
            Ok(message) => message,
            Err(error) => return Some(self.peer_lost(error.to_string())),
        };
        match message {
            Control::Handover { migration, message, reason, .. }
                if migration == self.executor.entry.migration =>
            {
                match message {
                    Message::Abort => self.executor.blame(format!("the source gave up: {reason}")),
                    Message::Gone => self.executor.blame(GONE),
                    _ => {}
                }
                Some(Event::Message(message))
            }
            message if self.machine.phase() == Phase::Copying => {
                self.obey(message).await.unwrap_or_else(|reason| {
                    warn!(guest = %self.ticket.guest, reason, "the migration fails");
                    self.executor.blame(reason);
                    Some(Event::Failed)
                })
            }
            other => Some(self.peer_lost(format!("the source sent `{}` out of turn", other.name()))),
        }
    }

    /// The guest's memory here is not right, and will not be. Where nothing can be done about that now, it is
    /// looked at again.
    fn fail(&mut self, reason: String) -> Option<Event> {
        let event = match self.machine.phase() {
            Phase::Copying => Event::Failed,
            _ if self.machine.can_abandon() => Event::Abandoned,
            _ => return None,
        };
        warn!(guest = %self.ticket.guest, reason, "the migration fails");
        self.executor.blame(reason);
        Some(event)
    }

    fn peer_lost(&mut self, reason: String) -> Event {
        self.executor.blame(reason);
        self.executor.link = None;
        Event::PeerLost
    }

    /// Does what the source says while it copies.
    async fn obey(&mut self, message: Control) -> Result<Option<Event>, String> {
        match message {
            Control::Round { round, pages } => {
                self.ticket.update(|progress| {
                    progress.rounds.push(RoundView { round, pages, ..RoundView::default() });
                    // A source that counts forever must not fill this host's memory.
                    if progress.rounds.len() > 1000 {
                        progress.rounds.remove(0);
                    }
                });
            }
            Control::LaneLost(lane) => {
                self.lanes.close_lane(lane).await;
                self.guest.ram.intact().map_err(|lost| lost.to_string())?;
                self.answer(Control::LaneClosed(lane)).await?;
            }
            Control::Holes(holes) => {
                self.make_holes(holes).await?;
                self.answer(Control::HolesDone).await?;
            }
            Control::Verify => {
                let ram = self.guest.ram.clone();
                let digests = tokio::task::spawn_blocking(move || digest_all(&ram)).await;
                let digests = digests.expect("digesting does not panic");
                let digests = digests.map_err(|error| format!("cannot digest memory: {error}"))?;
                let mut rest = digests.as_slice();
                loop {
                    let (digests, later) = rest.split_at(rest.len().min(MAX_DIGESTS));
                    rest = later;
                    let last = rest.is_empty();
                    self.answer(Control::Digests { digests: digests.to_vec(), last }).await?;
                    if last {
                        break;
                    }
                }
            }
            Control::Missing(missing) => {
                let Some(fetching) = &self.fetching else {
                    return Err("the source says what is missing before it offers to serve it".into());
                };
                let last = missing.last;
                fetching.add(missing).await?;
                if last {
                    self.answer(Control::MissingDone).await?;
                }
            }
            Control::State { total, offset, bytes } => {
                if offset != self.state.len() as u64 {
                    let expected = self.state.len();
                    return Err(format!("state from byte {offset} came where byte {expected} is next"));
                }
                self.state.extend(bytes);
                if self.state.len() as u64 == total {
                    return self.load().await.map(Some);
                }
            }
            other => return Err(format!("the source sent `{}` out of turn", other.name())),
        }
        Ok(None)
    }

    async fn answer(&self, message: Control) -> Result<(), String> {
        match &self.executor.link {
            Some(link) => link.send(&message).await.map_err(|error| error.to_string()),
            None => Ok(()),
        }
    }

    async fn make_holes(&self, holes: Vec<Range<u64>>) -> Result<(), String> {
        let (ram, pages) = (self.guest.ram.clone(), self.guest.ram.pages());
        if let Some(hole) = holes.iter().find(|hole| hole.start >= hole.end || hole.end > pages) {
            return Err(format!("the source sent the hole {hole:?} of a guest of {pages} pages"));
        }
        let count: u64 = holes.iter().map(|hole| hole.end - hole.start).sum();
        self.ticket.update(|progress| progress.hole_pages = progress.hole_pages.saturating_add(count));
        let punching = move || holes.into_iter().try_for_each(|hole| ram.punch(hole));
        let punched = tokio::task::spawn_blocking(punching).await.expect("punching does not panic");
        punched.map_err(|error| format!("cannot make pages zero: {error}"))
    }

    /// Loads the state, after the last lane has let go of the guest's memory.
    async fn load(&mut self) -> Result<Event, String> {
        self.lanes.close().await;
        self.show();
        // All that came is the guest's.
        self.guest.ram.check().map_err(|lost| lost.to_string())?;
        let mut seen = None;
        if let Some(fetching) = &mut self.fetching {
            // Device models look at the guest's memory while they load, and wait for what is missing.
            fetching.all_known().await;
            seen = Some(fetching.see_holes());
        }
        let driver = &self.guest.driver;
        self.loaded = true;
        let loaded = driver.load(&self.state).await;
        if let Some(seen) = seen {
            seen.await?;
        }
        if let Err(DriverError::Failed { .. }) = loaded {
            self.loaded = false;
        }
        let took = loaded.map_err(|error| error.to_string())?;
        driver.prepare(&self.executor.bond()).await.map_err(|error| error.to_string())?;
        self.guest.standing.set(Standing::Loaded);
        self.executor.load_time = took;
        self.ticket.update(|progress| {
            progress.phase = PhaseView::SwitchingOver;
            progress.vmm_state_bytes = Some(self.state.len() as u64);
            progress.load_seconds = Some(took.as_secs_f64());
        });
        self.state = Vec::new();
        Ok(Event::Loaded)
    }

    /// Whether the half will give up at this event, before it was in doubt.
    fn gives_up_at(&self, event: Event) -> bool {
        let fatal = matches!(
            event,
            Event::PeerLost | Event::Failed | Event::VmmGone | Event::Message(Message::Abort)
        );
        fatal && self.machine.phase() == Phase::Copying
    }

    /// Leaves a VMM that others started waiting for another try if nothing was loaded into it: its
    /// memory is given back, and discarding it would only make somebody start it again.
    async fn abandon(&mut self) {
        self.lanes.close().await;
        if let Some(fetching) = self.fetching.take() {
            (self.executor.placing, self.executor.entry.fetching) = (None, false);
            fetching.withdraw().await;
        }
        if !self.loaded && !self.guest.summoned.get() && self.executor.guest().is_some() {
            self.executor.vmm = Vmm::Released;
            self.guest.driver.stand_down().await;
            let (ram, pages) = (self.guest.ram.clone(), self.guest.ram.pages());
            let punched = tokio::task::spawn_blocking(move || ram.punch(0..pages)).await;
            if let Ok(Err(error)) = punched {
                warn!(guest = %self.ticket.guest, %error, "cannot give back the memory of a guest that did not come");
            }
        }
    }

    fn show(&mut self) {
        self.lanes.measure(false);
        self.ticket.update(|progress| match (&mut self.fetching, &self.fetched) {
            (Some(fetching), _) => fetching.show(progress),
            (None, Some(_)) => {}
            (None, None) => self.lanes.show(progress),
        });
    }

    /// The source offers to serve what is missing of the guest.
    async fn fetch_over(&mut self, mut link: Link) -> Option<Event> {
        let may_begin = self.machine.phase() == Phase::Copying && !self.loaded;
        if self.fetching.is_none() && may_begin {
            match Fetching::open(self.executor.context.clone(), self.guest.clone()).await {
                Ok(fetching) => {
                    self.executor.placing = Some(fetching.placing().clone());
                    self.executor.entry.fetching = true;
                    self.fetching = Some(fetching);
                }
                Err(reason) => {
                    warn!(guest = %self.ticket.guest, reason, "cannot fetch what would be missing");
                    let refusal = Refusal { what: Respect::Host, reason: reason.clone() };
                    // The source ends it, and says why.
                    let _ = link.send(&Control::Refuse(vec![refusal])).await;
                    link.until_closed().await;
                    return None;
                }
            }
        }
        if let Some(fetching) = &mut self.fetching {
            fetching.accept(link, &self.ticket.peer, self.ticket.id).await;
        }
        None
    }

    /// The last missing page is here.
    async fn complete(&mut self) -> Option<Event> {
        let fetching = self.fetching.take()?;
        let report;
        (report, self.fetched) = fetching.end().await;
        info!(guest = %self.ticket.guest, ?report, "all of the guest's memory is here");
        self.ticket.update(|progress| {
            progress.pages_remaining = 0;
            let postcopy = progress.postcopy.get_or_insert_default();
            postcopy.report(&report);
            postcopy.waits_for = None;
        });
        if let Some(link) = &self.executor.link {
            // Ahead of the word that ends it. A broken link is noticed by whoever listens to it.
            let _ = link.send(&Control::Fetched(report)).await;
        }
        self.executor.whole().await;
        Some(Event::Complete)
    }

    /// The operator gives up what is missing, if anything still is.
    async fn abandoned(&mut self) -> Option<Event> {
        if self.fetching.as_ref().is_some_and(|fetching| fetching.placing().remaining() == 0) {
            return self.complete().await;
        }
        self.executor.blame("what was missing of the guest's memory was abandoned by the operator");
        Some(Event::Abandoned)
    }

    fn show_phase(&mut self) {
        let phase = match self.machine.phase() {
            Phase::Committing => PhaseView::Committing,
            Phase::Fetching => PhaseView::Fetching,
            _ => return,
        };
        self.ticket.abandonable.set(self.machine.can_abandon());
        let here = self.executor.context.name().to_string();
        let fetching = self.fetching.as_mut().filter(|_| phase == PhaseView::Fetching);
        let fetched = fetching.map(|fetching| {
            fetching.begin();
            (fetching.progress(), fetching.waits_for())
        });
        self.ticket.update(|progress| {
            if progress.outcome.is_some() {
                return;
            }
            progress.phase = phase;
            if let Some((report, waits_for)) = fetched {
                progress.guest_runs_at = Some(here);
                progress.pages_remaining = report.remaining_pages;
                let postcopy = progress.postcopy.get_or_insert_default();
                postcopy.report(&report);
                postcopy.waits_for = waits_for.map(str::to_owned);
            }
        });
    }

    /// What is missing will never come: accesses to it fail from now on.
    async fn poison(&mut self) {
        let Some(fetching) = self.fetching.take() else { return };
        // Where the VMM is gone, so is whoever could touch what is missing.
        let Some(guest) = self.executor.guest() else { return };
        guest.incomplete.set(true);
        match fetching.poison().await {
            Ok(pages) => {
                warn!(guest = %self.ticket.guest, pages, "accesses to the guest's missing pages fail from now on")
            }
            Err(error) => {
                self.executor.context.guests.note_lost(&self.ticket.guest, guest.process.identity());
                error!(guest = %self.ticket.guest, %error, "cannot have accesses to missing pages fail; they go on waiting");
            }
        }
    }

    async fn report(&mut self, outcome: Outcome) {
        self.show();
        let (here, there) = (self.executor.context.name().to_string(), self.ticket.peer.to_string());
        let reason = self.executor.reason.take();
        info!(guest = %self.ticket.guest, %outcome, reason, "migration ended");
        match outcome {
            Outcome::Completed => {
                // Its VMM may have attached again since.
                let guest = self.executor.guest().unwrap_or(&self.guest);
                guest.standing.set(Standing::Running);
                arrived(&self.executor.context, guest);
                self.executor.claim = None;
                self.ticket.end(OutcomeView::Completed, None, Some(here));
            }
            Outcome::VmmGone => self.ticket.end(OutcomeView::Lost, reason, None),
            Outcome::GivenUp => self.ticket.end(OutcomeView::Failed, reason, None),
            Outcome::Lost => {
                self.poison().await;
                let runs_here = self.executor.guest().map(|guest| {
                    guest.standing.set(Standing::Running);
                    here
                });
                self.ticket.end(OutcomeView::Lost, reason, runs_here);
            }
            _ => self.ticket.end(OutcomeView::Failed, reason, Some(there)),
        }
    }
}

async fn completes(fetching: &mut Option<Fetching>) -> Result<(), String> {
    match fetching {
        Some(fetching) => fetching.completes().await,
        None => pending().await,
    }
}

/// Notes that a guest has begun to run on this host.
pub fn arrived(context: &Context, guest: &Guest) {
    guest.summoned.set(false);
    context.qemu.note_arrival(&guest.shape.name);
}
