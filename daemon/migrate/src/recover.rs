//! This module takes up migrations that were in doubt when the daemon went away.

use std::convert::Infallible;
use std::future::pending;
use std::marker::PhantomData;
use std::rc::Rc;

use memlane_api::ids;
use memlane_guest::{Guest, Process};
use memlane_net::journal::Entry;
use memlane_net::task;
use memlane_protocol::handover::{Action, Destination, Event, Outcome, Record, Source, WrongRecord};
use memlane_protocol::wire::attach::{Bond, RunState};
use tracing::{error, info, warn};

use crate::context::Context;
use crate::destination;
use crate::drive::{News, Role, Session, drive};
use crate::effects::{Effects, NEVER_WHOLE};
use crate::handle::MigrationHandle;
use crate::machine::Machine;
use crate::progress::{Outcome as OutcomeView, Phase, Role as RoleView};
use crate::source::serve::{PostcopySource, Serving};
use crate::vmm::Vmm;

/// Takes up everything that the journal held when the daemon started.
pub(crate) fn all(context: &Rc<Context>, unfinished: Vec<Entry>) {
    for entry in unfinished {
        let record = entry.record;
        let role = if record.is_of_source() { RoleView::Source } else { RoleView::Destination };
        info!(guest = %entry.guest, peer = %entry.peer, %record, "taking up a migration that was in doubt");
        let vmm = Vmm::Away(Rc::new(Process::remembered(entry.vmm)));
        take_up(context, vmm, entry, Some(record), role);
    }
}

/// Asks the other host about a guest whose VMM has attached, may only run with the daemon's permission, and names a
/// migration that the journal does not know.
pub(crate) async fn unknown(context: Rc<Context>, guest: Rc<Guest>) {
    let bond = guest.bond.borrow().clone();
    let role = if guest.run_state.get() == RunState::Relinquished {
        RoleView::Source
    } else {
        RoleView::Destination
    };
    let Some(bond) = bond else { return unbound(&context, guest, role).await };
    let name = &guest.shape.name;
    let (peer, migration) = (&bond.peer, ids::encode(&bond.migration));
    warn!(
        guest = %name, %peer, migration, ?role,
        "a VMM waits for word of a migration of which the journal knows nothing; the other host is asked"
    );
    let entry =
        entry(&guest, bond, if role == RoleView::Source { Record::Leaving } else { Record::Prepared });
    take_up(&context, Vmm::Attached(guest), entry, None, role);
}

/// Settles what becomes of a QEMU that was paused and not relinquished, or has loaded a guest and not been prepared:
/// nothing was promised about either.
async fn unbound(context: &Rc<Context>, guest: Rc<Guest>, role: RoleView) {
    info!(guest = %guest.shape.name, ?role, "a VMM is back from a migration that came to nothing");
    if role == RoleView::Destination {
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
fn take_up(context: &Rc<Context>, vmm: Vmm, entry: Entry, record: Option<Record>, role: RoleView) {
    let claim = match &vmm {
        Vmm::Attached(guest) => guest.claim(entry.migration),
        _ => None,
    };
    let (handle, arrivals) = MigrationHandle::new(&entry, context.name(), role, context.observer.clone());
    handle.cancellable.set(false);
    handle.update(|progress| {
        progress.status.phase = Phase::Committing;
        // What was known before is not known any more.
        progress.status.guest_runs_at = None;
    });
    context.migrations.add(handle.clone());
    let lacks_pages = record == Some(Record::Prepared) && entry.fetching;
    let mut effects = Effects::new(context.clone(), entry, vmm, claim, (None, (handle.clone(), arrivals)));
    task::spawn("recovery of a migration", async move {
        let reason = match role {
            RoleView::Source => match Source::recover(record) {
                Ok((machine, actions)) => settle(effects, machine, actions).await,
                Err(error) => give_up(&handle, error),
            },
            RoleView::Destination => match Destination::recover(record) {
                Ok((mut machine, _)) if lacks_pages => {
                    // It never ran here, and can never be whole: nothing is left to ask.
                    effects.blame(NEVER_WHOLE);
                    let actions = machine.on(Event::ResumeFailed);
                    settle(effects, machine, actions).await
                }
                Ok((machine, actions)) => settle(effects, machine, actions).await,
                Err(error) => give_up(&handle, error),
            },
        };
        if !handle.is_over() {
            handle.end(OutcomeView::Failed, reason, None);
        }
    });
}

fn give_up(handle: &MigrationHandle, failure: WrongRecord) -> Option<String> {
    error!(guest = %handle.guest, %failure, "cannot take up a migration");
    Some(failure.to_string())
}

/// The role in a migration that was taken up after a restart. There is nothing to copy any more: it only settles which
/// host owns the guest, and serves what is missing elsewhere.
struct RecoveryRole<M> {
    /// If this is true, the guest runs at the destination without all of its memory.
    serve: bool,
    serving: Option<Serving>,
    machine: PhantomData<M>,
}

impl<M: Machine> Role for RecoveryRole<M> {
    type Machine = M;

    async fn next_event(&mut self, session: &mut Session<M>) -> Option<Event> {
        if self.serve && self.serving.is_none() && matches!(session.effects.vmm, Vmm::Ended) {
            self.serve = false;
            session
                .effects
                .blame("the VMM that had the guest's memory is gone, and part of it had not been fetched");
            return Some(Event::Abandoned);
        }
        match session.news(pending::<Infallible>()).await {
            News::Event(event) => event,
            News::Abandoned => {
                session.effects.blame("abandoned by the operator: the destination is gone for good");
                Some(Event::Abandoned)
            }
            News::Moment => Some(session.tick()),
            // It has no connection of its own, and cannot be cancelled.
            News::Message(_) | News::Cancelled => None,
            News::Own(never) => match never {},
        }
    }

    async fn begin(&mut self, session: &mut Session<M>, action: Action) {
        match action {
            Action::Serve => self.serve = true,
            Action::Report(outcome) => {
                (self.serve, self.serving) = (false, None);
                report(&mut session.effects, outcome);
            }
            _ => {}
        }
    }

    fn show(&mut self, session: &mut Session<M>) {
        if self.serve && self.serving.is_none() {
            self.serving = begin_to_serve(&session.effects);
        }
        session.effects.handle.abandonable.set(session.machine.can_abandon());
    }

    fn is_done(&self, session: &Session<M>) -> bool {
        session.machine.is_over() && !session.effects.owes_discard()
    }
}

/// Settles a migration, which begins with `actions`. Returns why it went as it did.
async fn settle<M: Machine>(mut effects: Effects, machine: M, actions: Vec<Action>) -> Option<String> {
    let told = effects.told_at_once();
    let role = RecoveryRole { serve: false, serving: None, machine: PhantomData };
    let mut session = drive(role, Session { machine, effects }, actions, told).await;
    session.effects.reason.take()
}

/// Serves a guest that runs at the destination without all of its memory, as soon as the VMM that
/// has that memory is here.
fn begin_to_serve(effects: &Effects) -> Option<Serving> {
    let guest = effects.guest()?;
    let (context, handle) = (effects.context.clone(), effects.handle.clone());
    handle.update(|progress| {
        progress.status.phase = Phase::Fetching;
        progress.status.guest_runs_at = Some(handle.peer.to_string());
    });
    info!(guest = %handle.guest, "serving a guest that runs at the destination without all of its memory");
    // It is not known any more whether pages are holes.
    Some(Serving::again(PostcopySource { context, handle, ram: guest.ram.clone(), sparse: true }))
}

fn report(effects: &mut Effects, outcome: Outcome) {
    let handle = effects.handle.clone();
    let (here, there) = (effects.context.name().to_string(), handle.peer.to_string());
    let role = handle.progress.borrow().role;
    let runs_here = match (role, outcome) {
        (_, Outcome::VmmGone | Outcome::Lost | Outcome::GivenUp) => None,
        // It is the source's again, which may not have heard of that.
        (RoleView::Destination, Outcome::TakenBack) => None,
        (RoleView::Source, Outcome::Completed) => Some(false),
        (RoleView::Source, _) => Some(true),
        (RoleView::Destination, Outcome::Completed) => Some(true),
        (RoleView::Destination, _) => Some(false),
    };
    if runs_here == Some(true)
        && let Some(guest) = effects.guest()
    {
        guest.run_state.set(RunState::Running);
        if role == RoleView::Destination {
            destination::arrived(&effects.context, guest);
        }
        effects.claim = None;
    }
    let reason = effects.reason.take();
    info!(guest = %handle.guest, %outcome, reason, "a migration in doubt is settled");
    let view = match outcome {
        Outcome::Completed => OutcomeView::Completed,
        Outcome::Lost => OutcomeView::Lost,
        // Its owner was this host.
        Outcome::VmmGone if role == RoleView::Destination => OutcomeView::Lost,
        _ => OutcomeView::Failed,
    };
    handle.end(view, reason, runs_here.map(|here_it_is| if here_it_is { here } else { there }));
}
