//! Taking up migrations that were in doubt when the daemon went away.

use std::rc::Rc;

use memlane_api::ids;
use memlane_guest::{Guest, Process};
use memlane_net::journal::Entry;
use memlane_net::task;
use memlane_protocol::handover::{Action, Destination, Event, Outcome, Record, Source, WrongRecord};
use memlane_protocol::wire::attach::{Bond, Standing};
use tracing::{error, info, warn};

use super::destination;
use super::executor::{Executor, Half, NEVER_WHOLE, TICK, Vmm, until, vmm_news};
use super::serve::{Server, Serving};
use crate::context::Context;
use crate::handle::{Arrivals, Ticket};
use crate::progress::{Outcome as OutcomeView, Phase, Role};

/// Takes up everything that the journal held when the daemon started.
pub fn all(context: &Rc<Context>, unfinished: Vec<Entry>) {
    for entry in unfinished {
        let record = entry.record;
        let role = if record.is_of_source() { Role::Source } else { Role::Destination };
        info!(guest = %entry.guest, peer = %entry.peer, %record, "taking up a migration that was in doubt");
        let vmm = Vmm::Away(Rc::new(Process::remembered(entry.vmm)));
        take_up(context, vmm, entry, Some(record), role);
    }
}

/// A VMM has attached that may only run with the daemon's permission, and the journal knows nothing of
/// its migration: the other host, which the VMM names, is asked.
pub async fn unknown(context: Rc<Context>, guest: Rc<Guest>) {
    let bond = guest.bond.borrow().clone();
    let role = if guest.standing.get() == Standing::Relinquished { Role::Source } else { Role::Destination };
    let Some(bond) = bond else { return unbound(&context, guest, role).await };
    let name = &guest.shape.name;
    let (peer, migration) = (&bond.peer, ids::encode(&bond.migration));
    warn!(
        guest = %name, %peer, migration, ?role,
        "a VMM waits for word of a migration of which the journal knows nothing; the other host is asked"
    );
    let entry = entry(&guest, bond, if role == Role::Source { Record::Leaving } else { Record::Prepared });
    take_up(&context, Vmm::Attached(guest), entry, None, role);
}

/// The VMM is a QEMU that was paused and not relinquished, or has loaded a guest and not been prepared:
/// nothing was promised about either.
async fn unbound(context: &Rc<Context>, guest: Rc<Guest>, role: Role) {
    info!(guest = %guest.shape.name, ?role, "a VMM is back from a migration that came to nothing");
    if role == Role::Destination {
        if let Err(failure) = guest.driver.discard().await {
            warn!(guest = %guest.shape.name, %failure, "cannot end a VMM whose guest does not come any more");
        }
        return;
    }
    let bond = Bond { migration: ids::random(), peer: context.name().clone(), fetching: false };
    let record = Record::Leaving;
    take_up(context, Vmm::Attached(guest.clone()), entry(&guest, bond, record), Some(record), role);
}

fn entry(guest: &Guest, bond: Bond, record: Record) -> Entry {
    let Bond { migration, peer, fetching } = bond;
    let (name, vmm, shape) = (guest.shape.name.clone(), guest.process.identity(), guest.digest());
    Entry { migration, guest: name, peer, vmm, shape, record, fetching }
}

/// Makes the migration known at once, and works on it in a task of its own.
fn take_up(context: &Rc<Context>, vmm: Vmm, entry: Entry, record: Option<Record>, role: Role) {
    let claim = match &vmm {
        Vmm::Attached(guest) => guest.claim(entry.migration),
        _ => None,
    };
    let (ticket, arrivals) = Ticket::new(&entry, context, role);
    ticket.cancellable.set(false);
    ticket.update(|progress| {
        progress.phase = Phase::Committing;
        // Whatever was known before is not known any more.
        progress.guest_runs_at = None;
    });
    context.migrations.add(ticket.clone());
    let lacks_pages = record == Some(Record::Prepared) && entry.fetching;
    let mut executor = Executor::new(context.clone(), entry, vmm, claim, (None, (ticket.clone(), arrivals)));
    task::spawn("recovery of a migration", async move {
        let reason = match role {
            Role::Source => match Source::recover(record) {
                Ok((half, actions)) => drive(executor, half, actions).await,
                Err(error) => give_up(&ticket, error),
            },
            Role::Destination => match Destination::recover(record) {
                Ok((mut half, _)) if lacks_pages => {
                    // It never ran here, and can never be whole: nothing is left to ask.
                    executor.blame(NEVER_WHOLE);
                    let actions = half.on(Event::ResumeFailed);
                    drive(executor, half, actions).await
                }
                Ok((half, actions)) => drive(executor, half, actions).await,
                Err(error) => give_up(&ticket, error),
            },
        };
        if !ticket.is_over() {
            ticket.end(OutcomeView::Failed, reason, None);
        }
    });
}

fn give_up(ticket: &Ticket, failure: WrongRecord) -> Option<String> {
    error!(guest = %ticket.guest, %failure, "cannot take up a migration");
    Some(failure.to_string())
}

async fn drive<H: Half>(mut executor: Executor, mut half: H, actions: Vec<Action>) -> Option<String> {
    let mut left = executor.carry_out(&mut half, actions).await;
    if let Some(event) = executor.told_at_once() {
        let actions = half.on(event);
        left.extend(executor.carry_out(&mut half, actions).await);
    }
    let (mut serve, mut serving) = (false, None);
    loop {
        for action in left.drain(..) {
            match action {
                Action::Serve => serve = true,
                Action::Report(outcome) => {
                    (serve, serving) = (false, None);
                    report(&mut executor, outcome);
                }
                _ => {}
            }
        }
        if half.is_over() && !executor.owes_discard() {
            break;
        }
        if serve && serving.is_none() {
            serving = begin_to_serve(&executor);
        }
        if serve && serving.is_none() && matches!(executor.vmm, Vmm::Ended) {
            serve = false;
            executor
                .blame("the VMM that had the guest's memory is gone, and part of it had not been fetched");
            let actions = half.on(Event::Abandoned);
            left = executor.carry_out(&mut half, actions).await;
            continue;
        }
        executor.ticket.abandonable.set(half.can_abandon());
        executor.show_doubt(&half);
        let mut abandoned = executor.ticket.abandoned.subscribe();
        let patience_ends = executor.patience_ends();
        let Arrivals { words, returns, resolutions, .. } = &mut executor.arrivals;
        let event = tokio::select! {
            Some(word) = words.recv() => {
                executor.reply = Some(word.reply);
                Some(Event::Message(word.message))
            }
            Some(resolution) = resolutions.recv() => Some(executor.note_resolution(resolution)),
            news = vmm_news(&executor.vmm, returns) => executor.note_vmm(news).await,
            Ok(_) = abandoned.wait_for(|abandoned| *abandoned), if half.can_abandon() => {
                executor.blame("abandoned by the operator: the destination is gone for good");
                Some(Event::Abandoned)
            }
            () = until(patience_ends) => executor.lose_patience(),
            () = tokio::time::sleep(TICK) => Some(executor.tick(&half)),
        };
        if let Some(event) = event {
            let actions = half.on(event);
            left = executor.carry_out(&mut half, actions).await;
        }
    }
    executor.release();
    executor.reason.take()
}

/// Serves a guest that runs at the destination without all of its memory, as soon as the VMM that
/// has that memory is here.
fn begin_to_serve(executor: &Executor) -> Option<Serving> {
    let guest = executor.guest()?;
    let (context, ticket) = (executor.context.clone(), executor.ticket.clone());
    ticket.update(|progress| {
        progress.phase = Phase::Fetching;
        progress.guest_runs_at = Some(ticket.peer.to_string());
    });
    info!(guest = %ticket.guest, "serving a guest that runs at the destination without all of its memory");
    // Whether pages are holes nobody knows any more.
    Some(Serving::again(Server { context, ticket, ram: guest.ram.clone(), sparse: true }))
}

fn report(executor: &mut Executor, outcome: Outcome) {
    let ticket = executor.ticket.clone();
    let (here, there) = (executor.context.name().to_string(), ticket.peer.to_string());
    let role = ticket.progress.borrow().role;
    let runs_here = match (role, outcome) {
        (_, Outcome::VmmGone | Outcome::Lost | Outcome::GivenUp) => None,
        // It is the source's again, which may not have heard of that.
        (Role::Destination, Outcome::TakenBack) => None,
        (Role::Source, Outcome::Completed) => Some(false),
        (Role::Source, _) => Some(true),
        (Role::Destination, Outcome::Completed) => Some(true),
        (Role::Destination, _) => Some(false),
    };
    if runs_here == Some(true)
        && let Some(guest) = executor.guest()
    {
        guest.standing.set(Standing::Running);
        if role == Role::Destination {
            destination::arrived(&executor.context, guest);
        }
        executor.claim = None;
    }
    let reason = executor.reason.take();
    info!(guest = %ticket.guest, %outcome, reason, "a migration in doubt is settled");
    let view = match outcome {
        Outcome::Completed => OutcomeView::Completed,
        Outcome::Lost => OutcomeView::Lost,
        // Its owner was this host.
        Outcome::VmmGone if role == Role::Destination => OutcomeView::Lost,
        _ => OutcomeView::Failed,
    };
    ticket.end(view, reason, runs_here.map(|here_it_is| if here_it_is { here } else { there }));
}
