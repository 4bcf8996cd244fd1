//! Everyone else on this host sees a migration through its handle.

use std::rc::Rc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use memlane_api::ids;
use memlane_guest::{Claim, Guest, Stranger};
use memlane_net::journal::{Entry, VmmIdentity};
use memlane_net::link::Link;
use memlane_protocol::handover::{Message, Resolution};
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::{MigrationId, RunState};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::observer::{Measurement, Observer};
use crate::progress::{MigrationStatus, Outcome, Phase, Progress, Role};

/// A migration as everyone else on this host sees it.
pub struct MigrationHandle {
    /// This is the migration's identity.
    pub id: MigrationId,
    /// This is the guest's name.
    pub guest: Label,
    /// This is the other host.
    pub peer: Label,
    /// This is how the migration stands. The outcome is set last.
    pub progress: watch::Sender<Progress>,
    /// This becomes true when the operator wants it cancelled.
    pub cancelled: watch::Sender<bool>,
    /// This tells whether cancelling would have an effect now.
    pub cancellable: std::cell::Cell<bool>,
    /// This tells whether another try may end better, if the migration fails.
    pub may_be_retried: std::cell::Cell<bool>,
    /// This takes words of the handover that came over another connection than the migration's own.
    pub(crate) words: mpsc::Sender<Word>,
    /// This takes the guest, when its VMM attaches again.
    pub(crate) returns: mpsc::Sender<Returned>,
    /// This takes connections over which the source offers to serve what is missing here.
    pub(crate) links: mpsc::Sender<Link>,
    /// This takes connections over which the source resumes the migration, with the number of messages that it has
    /// received.
    pub(crate) resumptions: mpsc::Sender<(Link, u64)>,
    /// This is true while the two hosts try to reach each other again.
    pub(crate) suspended: std::cell::Cell<bool>,
    /// This is notified when a suspended migration makes way for another one.
    pub(crate) make_way: Notify,
    /// This becomes true when the operator has given up what is missing.
    pub abandoned: watch::Sender<bool>,
    /// This tells whether giving up would have an effect now.
    pub abandonable: std::cell::Cell<bool>,
    /// This takes what the operator decides about a guest in doubt.
    pub resolutions: mpsc::Sender<Resolution>,
    /// This tells whether such a decision would have an effect now.
    pub resolvable: std::cell::Cell<bool>,
    /// This is the process of the guest's VMM.
    pub vmm: VmmIdentity,
    /// This is a digest of what the guest is made of; 0 means that it is not known.
    pub shape: u64,
    started: Instant,
    observer: Rc<dyn Observer>,
}

/// A migration receives here what others on this host have for it.
pub(crate) struct Arrivals {
    /// This receives what is sent to [`MigrationHandle::words`].
    pub words: mpsc::Receiver<Word>,
    /// This receives what is sent to [`MigrationHandle::returns`].
    pub returns: mpsc::Receiver<Returned>,
    /// This receives what is sent to [`MigrationHandle::links`]. Only a destination listens to it.
    pub links: Option<mpsc::Receiver<Link>>,
    /// This receives what is sent to [`MigrationHandle::resumptions`].
    pub resumptions: mpsc::Receiver<(Link, u64)>,
    /// This receives what is sent to [`MigrationHandle::resolutions`].
    pub resolutions: mpsc::Receiver<Resolution>,
}

/// A guest whose VMM has attached again.
pub(crate) struct Returned {
    /// This is the guest.
    pub guest: Rc<Guest>,
    /// This is the migration's claim on it, unless the migration is over.
    pub claim: Option<Claim>,
}

/// A word of the handover that came over a connection of its own, and where the answer goes.
pub(crate) struct Word {
    /// This is the word.
    pub message: Message,
    /// This is the reason, if the word is bad news.
    pub reason: String,
    /// This takes the answer, and the reason for it. It is dropped where there is none.
    pub reply: oneshot::Sender<(Message, String)>,
}

impl MigrationHandle {
    /// Makes the handle of a migration that begins now, and the receivers of what arrives for it.
    pub(crate) fn new(
        entry: &Entry,
        here: &Label,
        role: Role,
        observer: Rc<dyn Observer>,
    ) -> (Rc<Self>, Arrivals) {
        const WAITING: usize = 4;
        let Entry { migration: id, guest, peer, vmm, shape, .. } = entry;
        let (words, words_arriving) = mpsc::channel(WAITING);
        let (returns, returning) = mpsc::channel(WAITING);
        let (links, linking) = mpsc::channel(WAITING);
        let (resumptions, resuming) = mpsc::channel(WAITING);
        let (resolutions, resolving) = mpsc::channel(WAITING);
        let destination = if role == Role::Source { peer } else { here };
        let mut progress = Progress::new(ids::encode(id), guest.as_str(), destination.as_str());
        progress.role = role;
        progress.started_at_unix_seconds = unix_seconds();
        let source = if role == Role::Source { here } else { peer };
        progress.status.guest_runs_at = Some(source.to_string());
        let handle = Self {
            id: *id,
            guest: guest.clone(),
            peer: peer.clone(),
            progress: watch::Sender::new(progress),
            cancelled: watch::Sender::new(false),
            cancellable: (role == Role::Source).into(),
            may_be_retried: true.into(),
            words,
            returns,
            links,
            resumptions,
            suspended: false.into(),
            make_way: Notify::new(),
            abandoned: watch::Sender::new(false),
            abandonable: false.into(),
            resolutions,
            resolvable: false.into(),
            vmm: *vmm,
            shape: *shape,
            started: Instant::now(),
            observer,
        };
        let (words, returns, links) = (words_arriving, returning, Some(linking));
        let (resumptions, resolutions) = (resuming, resolving);
        (Rc::new(handle), Arrivals { words, returns, links, resumptions, resolutions })
    }

    /// Returns why a VMM that attaches is not the one that this migration works with, or `None` if it is that one.
    pub fn stranger(&self, guest: &Guest) -> Option<Stranger> {
        let bond = guest.bond.borrow();
        let role = self.progress.borrow().role;
        let told = match guest.run_state.get() {
            RunState::Running => true,
            RunState::Incoming | RunState::Loaded => role == Role::Destination,
            RunState::Relinquished => role == Role::Source,
        };
        let ours = bond.as_ref().is_none_or(|bond| bond.migration == self.id && bond.peer == self.peer);
        [
            (guest.shape.name == self.guest, Stranger::Guest),
            (guest.process.identity() == self.vmm, Stranger::Process),
            (self.shape == 0 || self.shape == guest.digest(), Stranger::Shape),
            (told, Stranger::RunState),
            (ours, Stranger::Migration),
        ]
        .into_iter()
        .find_map(|(holds, otherwise)| (!holds).then_some(otherwise))
    }

    /// Changes the progress that everyone sees.
    pub fn update(&self, change: impl FnOnce(&mut Progress)) {
        self.progress.send_modify(|progress| {
            progress.total_seconds = self.started.elapsed().as_secs_f64();
            change(progress);
        });
    }

    /// Makes the last change of the progress, which sets the outcome.
    pub fn end(&self, outcome: Outcome, reason: Option<String>, guest_runs_at: Option<String>) {
        self.observer.measured(Measurement::Ended(outcome));
        self.cancellable.set(false);
        self.abandonable.set(false);
        self.resolvable.set(false);
        self.update(|progress| {
            progress.status = MigrationStatus {
                phase: Phase::Ended,
                outcome: Some(outcome),
                reason,
                guest_runs_at,
                decision: progress.status.decision.take(),
                ..MigrationStatus::default()
            };
        });
    }

    /// Tells whether the migration's task works on it.
    pub fn is_live(&self) -> bool {
        !self.words.is_closed()
    }

    /// Tells whether it has ended, as far as the operator is concerned.
    pub fn is_over(&self) -> bool {
        self.progress.borrow().status.outcome.is_some()
    }
}

/// Returns the present time in seconds of Unix time.
pub(crate) fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
