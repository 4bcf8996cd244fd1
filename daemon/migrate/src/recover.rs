//! This module takes up migrations that were in doubt when the daemon went away.

use std::future::pending;
use std::marker::PhantomData;
use std::rc::Rc;

use memlane_api::ids;
use memlane_guest::{Guest, Process};
use memlane_net::journal::Entry;
use memlane_net::task;
use memlane_protocol::handover::{
    Action, Destination, Event, Outcome, Phase as HandoverPhase, Record, Source, WrongRecord,
};
use memlane_protocol::wire::attach::{Bond, RunState};
use tracing::{error, info, warn};

use crate::context::Context;
use crate::destination;
use crate::destination::{Postcopy, PostcopyNews};
use crate::drive::{News, Role, Session, drive};
use crate::effects::Effects;
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
        take_up(context, (vmm, entry), (Some(record), role), true);
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
    take_up(&context, (Vmm::Attached(guest), entry), (None, role), false);
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
    let entry = entry(&guest, bond, record);
    take_up(context, (Vmm::Attached(guest), entry), (Some(record), role), false);
}

fn entry(guest: &Guest, bond: Bond, record: Record) -> Entry {
    let Bond { migration, peer, fetching } = bond;
    let (name, vmm, shape) = (guest.shape.name.clone(), guest.process.identity(), guest.digest());
    Entry { migration, guest: name, peer, vmm, shape, record, fetching }
}

/// Makes the migration known at once, and works on it in a task of its own. `journalled` says that it was in the journal
/// when the daemon started.
fn take_up(
    context: &Rc<Context>,
    (vmm, entry): (Vmm, Entry),
    (record, role): (Option<Record>, RoleView),
    journalled: bool,
) {
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
    let mut effects = Effects::new(context.clone(), entry, vmm, claim, (None, (handle.clone(), arrivals)));
    effects.taken_up = journalled;
    task::spawn("recovery of a migration", async move {
        let reason = match role {
            RoleView::Source => match Source::recover(record) {
                Ok((machine, actions)) => settle(effects, machine, actions).await,
                Err(error) => give_up(&handle, error),
            },
            RoleView::Destination => match Destination::recover(record) {
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
/// host owns the guest, serves what is missing elsewhere, and fetches what is missing here.
struct RecoveryRole<M> {
    /// This is present at a destination.
    postcopy: Option<Postcopy>,
    /// If this is true, the destination needs the guest's memory that is here.
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
        match (session.news(next(&mut self.postcopy)).await, &mut self.postcopy) {
            (News::Event(event), _) => event,
            (News::Own(PostcopyNews::Link(link)), Some(postcopy)) => {
                postcopy.served(&mut session.effects, link).await;
                None
            }
            (News::Own(PostcopyNews::Fetched(Ok(()))), Some(postcopy)) => {
                postcopy.complete(&mut session.effects).await
            }
            (News::Own(PostcopyNews::Fetched(Err(error))), _) if session.machine.can_abandon() => {
                session.effects.blame(error);
                Some(Event::Abandoned)
            }
            (News::Abandoned, Some(postcopy)) => postcopy.abandoned(&mut session.effects).await,
            (News::Abandoned, None) => {
                session.effects.blame("abandoned by the operator: the destination is gone for good");
                Some(Event::Abandoned)
            }
            (News::Moment, postcopy) => {
                if postcopy.is_some() {
                    session.effects.reopen_without_monitor().await;
                }
                Some(match session.tick() {
                    Event::Tick if session.effects.awaits_memory() => Event::MemoryFound,
                    event => event,
                })
            }
            // It has no connection of its own, and cannot be cancelled.
            (News::Message(_) | News::Cancelled | News::Own(_), _) => None,
        }
    }

    fn decided(&mut self, session: &mut Session<M>) {
        if session.machine.phase() == HandoverPhase::Returning {
            // The guest has never run there, and is about to run here.
            (self.serve, self.serving) = (false, None);
        }
    }

    async fn begin(&mut self, session: &mut Session<M>, action: Action) {
        match action {
            Action::Serve => self.serve = true,
            Action::Report(outcome) => {
                (self.serve, self.serving) = (false, None);
                if let (Outcome::Lost, Some(postcopy)) = (outcome, &mut self.postcopy) {
                    postcopy.poison(&session.effects).await;
                }
                report(&mut session.effects, outcome);
            }
            _ => {}
        }
    }

    fn show(&mut self, session: &mut Session<M>) {
        self.show_source(session);
        session.effects.handle.abandonable.set(session.machine.can_abandon());
        let Some(postcopy) = &mut self.postcopy else { return };
        postcopy.take_up(&mut session.effects);
        if session.machine.phase() == HandoverPhase::Fetching {
            let here = session.effects.context.name().to_string();
            session.effects.handle.update(|progress| {
                if progress.status.outcome.is_none() {
                    progress.status.phase = Phase::Fetching;
                    progress.status.guest_runs_at = Some(here);
                    postcopy.show(progress);
                    postcopy.show_lanes(progress, |_| ());
                }
            });
        }
    }

    fn is_done(&self, session: &Session<M>) -> bool {
        session.machine.is_over() && !session.effects.owes_discard()
    }
}

impl<M: Machine> RecoveryRole<M> {
    /// Serves while the destination needs that, and shows that the guest runs there from when it says so.
    fn show_source(&mut self, session: &Session<M>) {
        let phase = session.machine.phase();
        if self.serve && self.serving.is_none() {
            self.serving = begin_to_serve(&session.effects);
        }
        let handle = &session.effects.handle;
        let shown = handle.progress.borrow().status.phase;
        if self.serving.is_some() && phase == HandoverPhase::Fetching && shown != Phase::Fetching {
            handle.update(|progress| {
                progress.status.phase = Phase::Fetching;
                progress.status.guest_runs_at = Some(handle.peer.to_string());
            });
        }
    }
}

/// Returns the next event of post-copy at a destination.
async fn next(postcopy: &mut Option<Postcopy>) -> PostcopyNews {
    match postcopy {
        Some(postcopy) => postcopy.next().await,
        None => pending().await,
    }
}

/// Settles a migration, which begins with `actions`. Returns why it went as it did.
async fn settle<M: Machine>(mut effects: Effects, machine: M, actions: Vec<Action>) -> Option<String> {
    let told = effects.told_at_once().await;
    let arrives = effects.handle.progress.borrow().role == RoleView::Destination;
    let postcopy = effects.arrivals.links.take().filter(|_| arrives).map(Postcopy::new);
    let role = RecoveryRole { postcopy, serve: false, serving: None, machine: PhantomData };
    let session = drive(role, Session::new(machine, effects), actions, told).await;
    session.effects.why()
}

/// Serves memory that the destination does not have all of, as soon as the VMM that has it is here.
fn begin_to_serve(effects: &Effects) -> Option<Serving> {
    let guest = effects.guest()?;
    let (context, handle) = (effects.context.clone(), effects.handle.clone());
    info!(guest = %handle.guest, "serving a guest of which the destination does not have all memory");
    // It is not known any more whether pages are holes.
    Some(Serving::again(PostcopySource { context, handle, ram: guest.ram.clone(), sparse: true }))
}

fn report(effects: &mut Effects, outcome: Outcome) {
    let handle = effects.handle.clone();
    let (here, there) = (effects.context.name().to_string(), handle.peer.to_string());
    let role = handle.progress.borrow().role;
    let runs_here = match (role, outcome) {
        (_, Outcome::VmmGone | Outcome::PoweredOff | Outcome::Lost | Outcome::GivenUp) => None,
        (_, Outcome::Completed) if effects.powered_off => None,
        (RoleView::Source, Outcome::Completed) => Some(false),
        (RoleView::Source, _) => Some(true),
        (RoleView::Destination, Outcome::Completed) => Some(true),
        // It is the source's, which alone knows whether it still has it.
        (RoleView::Destination, _) => None,
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
    let reason = if outcome == Outcome::Completed { effects.reason.take() } else { effects.why() };
    info!(guest = %handle.guest, %outcome, reason, "a migration in doubt is settled");
    let view = match outcome {
        Outcome::PoweredOff => OutcomeView::PoweredOff,
        Outcome::Completed if effects.powered_off => OutcomeView::PoweredOff,
        Outcome::Completed => OutcomeView::Completed,
        Outcome::Lost => OutcomeView::Lost,
        // Its owner was this host.
        Outcome::VmmGone if role == RoleView::Destination => OutcomeView::Lost,
        _ => OutcomeView::Failed,
    };
    handle.update(|progress| {
        if let Some(postcopy) = &mut progress.postcopy {
            postcopy.end(matches!(outcome, Outcome::Completed | Outcome::PoweredOff));
        }
    });
    handle.end(view, reason, runs_here.map(|here_it_is| if here_it_is { here } else { there }));
}
