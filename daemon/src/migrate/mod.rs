//! Moving a guest: the daemon's part, which does what `memlane_protocol` decides.
//!
//! [`source`] and [`destination`] are the two halves of a migration. Both let an executor
//! (`executor`) carry out what their half of the handover orders; `copy` (with its `first_round`)
//! and `pause` are what the source does before and in the switchover.

mod copy;
pub mod destination;
mod digest;
mod executor;
mod fetch;
mod first_round;
mod lanes;
mod missing;
mod pause;
mod postcopy;
pub mod preflight;
pub mod recover;
mod reopen;
mod routes;
mod serve;
pub mod source;
mod stun;

use std::rc::Rc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use memlane_protocol::handover::Message;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::MigrationId;
use tokio::sync::{mpsc, oneshot, watch};

use crate::api::types::{Migration, Outcome, Phase, Role};
use crate::guest::Guest;
use crate::journal::{Entry, VmmIdentity};
use crate::link::Link;

/// A migration as everyone else on this host sees it.
pub struct Ticket {
    /// Its identity.
    pub id: MigrationId,
    /// The guest.
    pub guest: Label,
    /// The other host.
    pub peer: Label,
    /// How it stands; the outcome is set last.
    pub progress: watch::Sender<Migration>,
    /// True once the operator wants it cancelled.
    pub cancelled: watch::Sender<bool>,
    /// Whether cancelling would still be heeded.
    pub cancellable: std::cell::Cell<bool>,
    /// Words of the handover that came over another connection than the migration's own.
    pub words: mpsc::Sender<Word>,
    /// The guest's VMM, when it attaches again.
    pub returns: mpsc::Sender<Rc<Guest>>,
    /// Connections over which the source offers to serve what is missing here.
    pub links: mpsc::Sender<Link>,
    /// True once the operator has given up what is missing.
    pub abandoned: watch::Sender<bool>,
    /// Whether that would be heeded.
    pub abandonable: std::cell::Cell<bool>,
    /// The process of the guest's VMM.
    pub vmm: VmmIdentity,
    started: Instant,
}

/// Where a migration receives what others on this host have for it.
pub struct Arrivals {
    /// See [`Ticket::words`].
    pub words: mpsc::Receiver<Word>,
    /// See [`Ticket::returns`].
    pub returns: mpsc::Receiver<Rc<Guest>>,
    /// See [`Ticket::links`].
    pub links: mpsc::Receiver<Link>,
}

/// A word of the handover that came over a connection of its own, and where the answer goes.
pub struct Word {
    /// The word.
    pub message: Message,
    /// Takes the answer; dropped where there is none.
    pub reply: oneshot::Sender<Message>,
}

impl Ticket {
    /// For a migration that begins now, together with what arrives for it.
    pub fn new(entry: &Entry, here: &Label, role: Role) -> (Rc<Self>, Arrivals) {
        const WAITING: usize = 4;
        let Entry { migration: id, guest, peer, vmm, .. } = entry;
        let (words, words_arriving) = mpsc::channel(WAITING);
        let (returns, returning) = mpsc::channel(WAITING);
        let (links, linking) = mpsc::channel(WAITING);
        let destination = if role == Role::Source { peer } else { here };
        let mut progress = Migration::new(crate::hex::encode(id), guest.as_str(), destination.as_str());
        progress.role = role;
        progress.started_at_unix_seconds = unix_seconds();
        let source = if role == Role::Source { here } else { peer };
        progress.guest_runs_at = Some(source.to_string());
        let ticket = Self {
            id: *id,
            guest: guest.clone(),
            peer: peer.clone(),
            progress: watch::Sender::new(progress),
            cancelled: watch::Sender::new(false),
            cancellable: (role == Role::Source).into(),
            words,
            returns,
            links,
            abandoned: watch::Sender::new(false),
            abandonable: false.into(),
            vmm: *vmm,
            started: Instant::now(),
        };
        (Rc::new(ticket), Arrivals { words: words_arriving, returns: returning, links: linking })
    }

    /// Changes what everyone sees.
    pub fn update(&self, change: impl FnOnce(&mut Migration)) {
        self.progress.send_modify(|progress| {
            progress.total_seconds = self.started.elapsed().as_secs_f64();
            change(progress);
        });
    }

    /// The last change.
    pub fn end(&self, outcome: Outcome, reason: Option<String>, guest_runs_at: Option<String>) {
        crate::metrics::migration_ended(outcome);
        self.cancellable.set(false);
        self.abandonable.set(false);
        self.update(|progress| {
            progress.phase = Phase::Ended;
            progress.reason = reason;
            progress.guest_runs_at = guest_runs_at;
            progress.outcome = Some(outcome);
        });
    }

    /// Whether its half still works on it.
    pub fn is_live(&self) -> bool {
        !self.words.is_closed()
    }

    /// Whether it has ended, as far as the operator is concerned.
    pub fn is_over(&self) -> bool {
        self.progress.borrow().outcome.is_some()
    }
}

/// Now, in seconds of Unix time.
fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
