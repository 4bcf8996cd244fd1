//! Taking up migrations that were in doubt when the daemon went away.

use std::rc::Rc;
use std::time::Duration;

use memlane_protocol::handover::{Action, Destination, Event, Outcome, Record, Source, WrongRecord};
use memlane_protocol::wire::attach::{MigrationId, Standing};
use tokio::sync::mpsc;
use tracing::{error, info};

use super::executor::{Executor, Half};
use super::{Ticket, Word, destination};
use crate::api::types::{Outcome as OutcomeView, Phase, Role};
use crate::guest::Guest;
use crate::host::Host;
use crate::journal::Entry;

/// How often the other host is asked.
const TICK: Duration = Duration::from_secs(1);
/// A VMM that has not come back this long after the daemon is taken for gone. VMMs try again
/// every two seconds at the least.
pub const VMM_PATIENCE: Duration = Duration::from_secs(10);

/// A VMM is back that may only run with the daemon's permission.
pub async fn with_guest(host: Rc<Host>, guest: Rc<Guest>, entry: Option<Entry>) {
    let migration = guest.migration.borrow().unwrap_or_default();
    let source = guest.standing.get() == Standing::Relinquished;
    let record = entry.as_ref().map(|entry| entry.record);
    info!(guest = %guest.shape.name, ?record, "taking up a migration that was in doubt");
    let entry = entry.unwrap_or_else(|| unknown(&host, &guest, migration));
    take_up(host, Some(guest), entry, record, source).await;
}

/// The VMMs of these migrations have not come back.
pub async fn without_guests(host: Rc<Host>) {
    tokio::time::sleep(VMM_PATIENCE).await;
    while let Some(entry) = host.take_unfinished(|_| true) {
        let source = matches!(entry.record, Record::Committed | Record::Finished | Record::TakenBack);
        info!(guest = %entry.guest, record = %entry.record, "the VMM of a migration in doubt has not come back");
        // A guest that was started before the crash runs, and its VMM says no more than that.
        let running = host.guest(&entry.guest).filter(|guest| guest.standing.get() == Standing::Running);
        let record = entry.record;
        tokio::task::spawn_local(take_up(host.clone(), running, entry, Some(record), source));
    }
}

/// The journal knows nothing of it, so it was never committed.
fn unknown(host: &Host, guest: &Guest, migration: MigrationId) -> Entry {
    let (name, peer) = (guest.shape.name.clone(), host.config.host.clone());
    Entry { migration, guest: name, peer, record: Record::Prepared }
}

async fn take_up(
    host: Rc<Host>,
    guest: Option<Rc<Guest>>,
    entry: Entry,
    record: Option<Record>,
    source: bool,
) {
    let role = if source { Role::Source } else { Role::Destination };
    let (ticket, words) = Ticket::new(entry.migration, &entry.guest, (&host.config.host, &entry.peer), role);
    ticket.cancellable.set(false);
    ticket.update(|progress| progress.phase = Phase::Committing);
    host.add(ticket.clone());
    let mut executor = Executor::new(host, entry, guest, None);
    executor.resumed = executor.guest.as_ref().is_some_and(|guest| guest.standing.get() == Standing::Running);
    let ended = if source {
        match Source::recover(record) {
            Ok((half, actions)) => drive(executor, half, actions, &ticket, words).await,
            Err(error) => give_up(&ticket, error),
        }
    } else {
        match Destination::recover(record) {
            Ok((half, actions)) => drive(executor, half, actions, &ticket, words).await,
            Err(error) => give_up(&ticket, error),
        }
    };
    if !ticket.is_over() {
        ticket.end(OutcomeView::Failed, ended, None);
    }
}

fn give_up(ticket: &Ticket, failure: WrongRecord) -> Option<String> {
    error!(guest = %ticket.guest, %failure, "cannot take up a migration");
    Some(failure.to_string())
}

async fn drive<H: Half>(
    mut executor: Executor,
    mut half: H,
    actions: Vec<Action>,
    ticket: &Ticket,
    mut words: mpsc::Receiver<Word>,
) -> Option<String> {
    let mut gone = false;
    let mut left = executor.carry_out(&mut half, actions).await;
    loop {
        for action in left.drain(..) {
            if let Action::Report(outcome) = action {
                report(&mut executor, ticket, outcome);
            }
        }
        if half.is_over() {
            break;
        }
        let event = tokio::select! {
            Some(word) = words.recv() => {
                executor.reply = Some(word.reply);
                Event::Message(word.message)
            }
            () = until_gone(executor.guest.clone()), if !gone => {
                gone = true;
                executor.blame("the VMM is gone");
                Event::VmmGone
            }
            () = tokio::time::sleep(TICK) => Event::Tick,
        };
        left = executor.feed(&mut half, event).await;
    }
    if let Some(guest) = &executor.guest {
        guest.migration.take();
    }
    executor.reason.take()
}

async fn until_gone(guest: Option<Rc<Guest>>) {
    if let Some(guest) = guest {
        guest.driver.gone().await;
    }
}

fn report(executor: &mut Executor, ticket: &Ticket, outcome: Outcome) {
    let (here, there) = (executor.host.config.host.to_string(), ticket.peer.to_string());
    let reason = executor.reason.take();
    info!(guest = %ticket.guest, %outcome, reason, "a migration in doubt is settled");
    let role = ticket.progress.borrow().role;
    let runs_here = match (role, outcome) {
        (_, Outcome::VmmGone) => None,
        (Role::Source, Outcome::Completed) => Some(false),
        (Role::Source, _) => Some(true),
        (Role::Destination, Outcome::Completed) => Some(true),
        (Role::Destination, _) => Some(false),
    };
    if runs_here == Some(true)
        && let Some(guest) = &executor.guest
    {
        guest.standing.set(Standing::Running);
        guest.migration.take();
        if role == Role::Destination {
            destination::arrived(&executor.host, guest);
        }
    }
    let view = if outcome == Outcome::Completed { OutcomeView::Completed } else { OutcomeView::Failed };
    ticket.end(view, reason, runs_here.map(|here_it_is| if here_it_is { here } else { there }));
}
