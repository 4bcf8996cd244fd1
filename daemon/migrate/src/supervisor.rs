//! Everything that comes to the engine from outside comes here: orders, offers, words of other daemons, and VMMs that
//! attach.

use std::rc::Rc;
use std::time::{Duration, Instant};

use memlane_api::ids;
use memlane_guest::{Guest, GuestObserver, Process, Stranger};
use memlane_net::journal::{Entry, VmmIdentity};
use memlane_net::link::Link;
use memlane_net::task;
use memlane_protocol::handover::{Destination, Message, Record, Source};
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::{MigrationId, RunState};
use memlane_protocol::wire::control::Offer;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::oneshot;
use tracing::info;

use crate::context::Context;
use crate::effects::refuse_to_resume;
use crate::handle::{MigrationHandle, Returned, Word};
use crate::observer::Measurement;
use crate::preflight::{self, Findings, Request, Severity};
use crate::progress::Role;
use crate::source::{self, MigrateParameters};
use crate::{destination, recover};

/// A migration may take this long to answer a word.
const PATIENCE: Duration = Duration::from_secs(5);
/// Within this time after the daemon's start all VMMs have attached again.
const RETURNING: Duration = Duration::from_secs(5);

/// Runs the migrations of this host.
pub struct Supervisor {
    context: Rc<Context>,
    started: Instant,
}

/// An order to move a guest.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// These parameters are what the order allows and wants.
    pub parameters: MigrateParameters,
    /// The ports must promise this many bits per second.
    pub min_bandwidth: u64,
}

/// An order was not taken; nothing was moved.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// The guest takes part in a migration.
    #[error("the guest is being moved already")]
    Moving,
    /// Something is in the way, which the findings name.
    #[error("{}", .0.reasons())]
    Refused(Findings),
    /// The VMM went away during the preflight.
    #[error("the connection to the VMM was lost meanwhile; order it again")]
    VmmLost,
}

impl Supervisor {
    /// Makes the supervisor of a host, which is asked about each VMM that attaches from now on.
    pub fn new(context: Rc<Context>) -> Rc<Self> {
        let supervisor = Rc::new(Self { context: context.clone(), started: Instant::now() });
        let observer: Rc<dyn GuestObserver> = supervisor.clone();
        context.guests.observe(Rc::downgrade(&observer));
        supervisor
    }

    /// Returns the context that every migration of this host works with.
    pub fn context(&self) -> &Rc<Context> {
        &self.context
    }

    /// Takes up everything that the journal held when the daemon started.
    pub fn recover(&self, unfinished: Vec<Entry>) {
        recover::all(&self.context, unfinished);
    }

    /// Does the preflight of an order, and nothing else.
    pub async fn check(&self, guest: &Guest, peer: &Label, min_bandwidth: u64) -> Findings {
        let mut findings = Findings::default();
        let request = Request { migration: ids::random(), check_only: true, min_bandwidth };
        preflight::send(&self.context, guest, peer, request, &mut findings).await;
        findings
    }

    /// Does the preflight of an order and begins the migration `migration`, which then goes on by itself.
    ///
    /// # Errors
    ///
    /// Fails if the guest takes part in another migration, or cannot be moved. It then runs on.
    pub async fn migrate(
        &self,
        guest: &Rc<Guest>,
        peer: &Label,
        migration: MigrationId,
        order: Order,
    ) -> Result<Rc<MigrationHandle>, OrderError> {
        let context = &self.context;
        let name = &guest.shape.name;
        // Taken before anything is awaited, so that no second order can take the guest too.
        let claim = guest.claim(migration).ok_or(OrderError::Moving)?;
        let mut findings = Findings::default();
        let request = Request { migration, check_only: false, min_bandwidth: order.min_bandwidth };
        let Some(plan) = preflight::send(context, guest, peer, request, &mut findings).await else {
            for finding in findings.findings.iter().filter(|finding| finding.severity != Severity::Ok) {
                info!(guest = %name, %peer, what = finding.what, detail = finding.detail, "preflight");
            }
            context.observer.measured(Measurement::Refused("preflight"));
            return Err(OrderError::Refused(findings));
        };
        if !context.guests.get(name).is_some_and(|now| Rc::ptr_eq(&now, guest)) {
            return Err(OrderError::VmmLost);
        }
        let entry = Entry {
            migration,
            guest: name.clone(),
            peer: peer.clone(),
            record: Record::Leaving,
            vmm: guest.process.identity(),
            shape: guest.digest(),
            fetching: false,
        };
        let (handle, arrivals) =
            MigrationHandle::new(&entry, context.name(), Role::Source, context.observer.clone());
        handle.update(|progress| {
            progress.ram.pages_total = guest.shape.pages();
            progress.pause.downtime_limit_seconds = order.parameters.policy.downtime_limit.as_secs_f64();
        });
        context.migrations.add(handle.clone());
        let to_handle = (handle.clone(), arrivals);
        let source = source::run(context.clone(), claim, entry, to_handle, plan, order.parameters);
        task::spawn("source of a migration", source);
        Ok(handle)
    }

    /// Answers an offer of `peer`, and takes the guest if it can come. Returns when the migration is over.
    pub async fn take_offer(&self, peer: Label, link: Link, offer: Offer) {
        destination::run(self.context.clone(), peer, link, offer).await;
    }

    /// Hands a connection of `peer` over which it offers to serve missing pages to the migration that wants them.
    pub fn serve(&self, peer: &Label, migration: &MigrationId, link: Link) {
        let handle = self.context.migrations.with(peer, migration).filter(|handle| handle.is_live());
        let Some(handle) = handle else {
            return info!(%peer, "a peer would serve a guest that does not fetch anything here");
        };
        // One that finds no room is dropped, and so closed: the source tries again.
        let _ = handle.links.try_send(link);
    }

    /// Hands a connection of `peer`, in place of one that is lost, to the migration that it resumes, and tells the peer if
    /// there is none. The peer has received `received` messages of that migration.
    pub fn resume(&self, peer: &Label, migration: &MigrationId, link: Link, received: u64) {
        let handle = self.context.migrations.with(peer, migration).filter(|handle| handle.is_live());
        let unsent = match handle {
            Some(handle) => handle.resumptions.try_send((link, received)).err().map(TrySendError::into_inner),
            None => Some((link, received)),
        };
        let Some((link, _)) = unsent else { return };
        info!(%peer, "a peer would resume a migration that is not under way here any more");
        refuse_to_resume(link);
    }

    /// Returns what this host answers to a word of `peer` about a migration, and the reason for that, if it answers. The word
    /// has a `reason` too if it is bad news.
    pub async fn answer(
        &self,
        peer: &Label,
        migration: MigrationId,
        (message, reason): (Message, String),
    ) -> Option<(Message, String)> {
        let handle = self.context.migrations.with(peer, &migration);
        // It has ended since this daemon was started.
        let ended = handle.as_ref().is_some_and(|handle| !handle.is_live());
        if let Some(handle) = handle.filter(|handle| handle.is_live()) {
            let (reply, answer) = oneshot::channel();
            let asked = async {
                handle.words.send(Word { message, reason, reply }).await.ok()?;
                answer.await.ok()
            };
            return tokio::time::timeout(PATIENCE, asked).await.ok()?;
        }
        if self.context.journal.known(peer, &migration).is_some() {
            return None; // it is remembered, and its task will answer when it is asked again
        }
        let answer = match message {
            // A VMM that this journal should know of, and does not, may be about to say so.
            _ if !message.awaits_source() => Destination::answer_unknown(message),
            _ if !ended && self.started.elapsed() < RETURNING => None,
            _ => Source::answer_unknown(message),
        };
        answer.map(|answer| (answer, "this host knows of no such migration any more".to_owned()))
    }

    /// Returns the migration under way that a VMM which attaches belongs to, if one does.
    ///
    /// # Errors
    ///
    /// Fails if the VMM is a stranger, which claims to belong to a migration or is in the place of its VMM.
    fn recognise(&self, guest: &Guest) -> Result<Option<Rc<MigrationHandle>>, Stranger> {
        let claimed = guest.bond.borrow().as_ref().map(|bond| bond.migration);
        let concerned = |handle: &Rc<MigrationHandle>| {
            handle.is_live() && (handle.guest == guest.shape.name || claimed == Some(handle.id))
        };
        let mut handles = self.context.migrations.all();
        handles.retain(concerned);
        // A guest may move again before the other host of its last move has heard of the end.
        if let Some(handle) = handles.iter().rev().find(|handle| handle.stranger(guest).is_none()) {
            return Ok(Some(handle.clone()));
        }
        // Of a source that is done nothing is waited for but the end of its old VMM, which has no claim to the name.
        let done =
            |handle: &MigrationHandle| handle.is_over() && handle.progress.borrow().role == Role::Source;
        let claims = |handle: &&Rc<MigrationHandle>| {
            claimed == Some(handle.id) || !done(handle) && Process::lives(handle.vmm)
        };
        match handles.iter().rev().find(claims).and_then(|handle| handle.stranger(guest)) {
            Some(why) => Err(why),
            None => Ok(None),
        }
    }
}

impl GuestObserver for Supervisor {
    fn expects(&self, guest: &Guest) -> Result<(), Stranger> {
        self.recognise(guest).map(drop)
    }

    fn attached(&self, guest: &Rc<Guest>) {
        if let Ok(Some(handle)) = self.recognise(guest) {
            // A migration that works on it already, and waits for it or is about to.
            let claim = if handle.is_over() { None } else { guest.claim(handle.id) };
            let returned = Returned { guest: guest.clone(), claim };
            task::spawn("return of a VMM", async move {
                if let Err(unsent) = handle.returns.send(returned).await {
                    // Over meanwhile: it attaches again, and is judged anew.
                    unsent.0.guest.driver.hang_up();
                }
            });
        } else if matches!(guest.run_state.get(), RunState::Relinquished | RunState::Loaded) {
            let unknown = recover::unknown(self.context.clone(), guest.clone());
            task::spawn("recovery of an unknown guest", unknown);
        }
    }

    fn works_with(&self, vmm: VmmIdentity) -> bool {
        self.context.migrations.all().iter().any(|handle| handle.is_live() && handle.vmm == vmm)
    }
}
