//! This module deals with guests that were being fetched when the daemon ended, and with their VMMs. What is missing is
//! found in memory, if the VMM has kept its userfaultfd; otherwise the guest can never be whole.

use std::rc::Rc;
use std::time::{Duration, Instant};

use memlane_guest::{DriverError, Farewell, Guest, KillError};
use memlane_net::task;
use memlane_protocol::handover::{Action, Event, Record};
use memlane_protocol::wire::attach::RunState;
use tracing::{debug, error, info, warn};

use super::Effects;
use crate::fetch::{FetchError, Fetching};
use crate::progress::Role;
use crate::vmm::Vmm;

/// A VMM that lives may take this long to attach again, before it is ended by force.
const RETURN: Duration = Duration::from_secs(10);
/// This is the reason for which a guest that was prepared to fetch is given back.
pub(super) const NEVER_WHOLE: &str = "the daemon ended before the guest was started here, and which of its pages are missing \
     is not known any more; it was given back";

/// The VMM of a guest that can never be whole could not be ended.
#[derive(Debug, thiserror::Error)]
enum EndError {
    /// The VMM's process runs other guests, which must not end.
    #[error("its VMM (process {0}) runs other guests too, and was left alone")]
    Shared(u32),
    /// The process could not be killed.
    #[error(transparent)]
    Kill(#[from] KillError),
}

impl Effects {
    /// Goes on with what an earlier daemon was fetching, if one was, through the userfaultfd that the VMM has kept.
    pub(super) async fn reopen(&mut self, guest: &Rc<Guest>) {
        let arrives = self.handle.progress.borrow().role == Role::Destination;
        if !arrives || !self.entry.fetching || self.placing.is_some() {
            return;
        }
        let name = self.entry.guest.clone();
        let reopened = match guest.driver.reopen_memory().await {
            Ok(memory) => Fetching::again(self.context.clone(), name, memory).await,
            Err(error) => Err(error.into()),
        };
        match reopened {
            Ok(fetching) => {
                self.take_up(fetching);
            }
            // It is asked again when it is back.
            Err(FetchError::Memory(
                error @ (DriverError::Gone | DriverError::Unheard | DriverError::Slow { .. }),
            )) => {
                warn!(guest = %self.entry.guest, %error, "cannot go on yet to fetch what an earlier daemon was fetching");
                guest.driver.hang_up();
            }
            Err(error) => {
                warn!(guest = %self.entry.guest, %error, "cannot go on to fetch what an earlier daemon was fetching");
                self.unknown_pages = true;
            }
        }
    }

    /// Does the same for a QEMU whose monitor does not answer: its main loop may wait for a page that is missing, and would
    /// wait for ever if its answer was waited for.
    pub(crate) async fn reopen_without_monitor(&mut self) {
        let Vmm::Away(process) = &self.vmm else { return };
        if !self.entry.fetching || self.placing.is_some() {
            return;
        }
        let name = self.entry.guest.clone();
        let found = self.context.qemu.kept_memory(&name, process.identity()).await;
        let Some(memory) = found else { return };
        match Fetching::again(self.context.clone(), name, memory).await {
            Ok(fetching) => self.take_up(fetching),
            Err(error) => {
                debug!(guest = %self.entry.guest, %error, "cannot fetch for a QEMU that does not answer")
            }
        }
    }

    /// Tells whether the VMM was to let the guest run, and does not answer, perhaps because it waits for pages. They can
    /// come, since its memory was found.
    pub(crate) fn awaits_memory(&self) -> bool {
        let away = matches!(self.vmm, Vmm::Away(_));
        away && self.unanswered == Some(Action::Resume) && self.entry.fetching && self.placing.is_some()
    }

    fn take_up(&mut self, fetching: Fetching) {
        let pages = fetching.placing().remaining();
        info!(guest = %self.entry.guest, pages, "going on to fetch what an earlier daemon was fetching");
        self.placing = Some(fetching.placing().clone());
        (self.reopened, self.unknown_pages) = (Some(fetching), false);
    }

    /// Tells whether the guest lacks pages, and only a daemon that is no more knew which.
    pub(super) fn cannot_be_whole(&self) -> bool {
        self.entry.fetching && self.placing.is_none() && self.unknown_pages
    }

    /// Deals with a guest that was perhaps told to run, and can never be whole: it would go on until it waits
    /// for a missing page for ever.
    pub(super) fn give_back_or_end(&mut self) -> Option<Event> {
        match &self.vmm {
            // How it stands only it can tell; not for long, as it may hang.
            Vmm::Away(_) => self.leave_unanswered(Action::Resume),
            // QEMU's state does not tell whether its guest has run.
            Vmm::Attached(guest)
                if guest.run_state.get() == RunState::Loaded && guest.driver.qemu().is_none() =>
            {
                self.blame(NEVER_WHOLE);
                Some(Event::ResumeFailed)
            }
            _ => Some(self.end_lost()),
        }
    }

    fn end_lost(&mut self) -> Event {
        let ended = match self.end_by_force() {
            Ok(()) => "its VMM was ended".to_owned(),
            Err(failure) => failure.to_string(),
        };
        // That it was to be given back does not hold any more.
        self.reason = None;
        self.blame(format!(
            "the daemon ended while the guest ran here without all of its memory, and what was missing is not \
             known any more; {ended}"
        ));
        Event::Abandoned
    }

    /// Kills the VMM, whose guest can never be whole. Where that fails, logs it, and notes that this is no guest that
    /// runs.
    fn end_by_force(&mut self) -> Result<(), EndError> {
        let process = match &self.vmm {
            Vmm::Attached(guest) => guest.process.clone(),
            Vmm::Away(process) => process.clone(),
            Vmm::Ended | Vmm::Released => return Ok(()),
        };
        let identity = process.identity();
        let shared = self.context.guests.all().into_iter().any(|other| {
            other.process.identity() == identity && other.shape.name != self.entry.guest && !other.lost.get()
        });
        let killed = match shared {
            true => Err(EndError::Shared(identity.pid)),
            false => process.kill().map_err(EndError::from),
        };
        if let Err(failure) = &killed {
            error!(guest = %self.entry.guest, %failure, "a guest that can never be whole hangs");
            self.context.guests.note_lost(&self.entry.guest, identity);
            self.lost = Some(process);
        }
        killed
    }

    /// Forgets the migration once the VMM has ended: a daemon that starts while it lives must know what it is.
    pub(super) fn forget_when_ended(&self) {
        let (context, entry, lost) = (self.context.clone(), self.entry.clone(), self.lost.clone());
        task::spawn("forgetting a lost guest", async move {
            if let Some(process) = lost {
                process.ended().await;
            }
            if let Err(failure) = context.journal.forget(&entry).await {
                warn!(guest = %entry.guest, %failure, "cannot tidy up the journal");
            }
        });
    }

    /// Tells whether a VMM that lives must be told to end.
    pub(crate) fn owes_discard(&self) -> bool {
        self.unanswered == Some(Action::Discard) && matches!(self.vmm, Vmm::Away(_)) && self.entry.fetching
    }

    /// Returns when the wait for a VMM that hangs ends.
    pub(crate) fn patience_ends(&self) -> Option<Instant> {
        // One that was prepared to fetch, and has not run, is given back rather than waited for, and so is one that is not
        // needed any more. One that was told to run has the only copy, and waits for the pages that it touches.
        let prepared = self.entry.record == Record::Prepared && !self.told_to_run;
        let asked = self.unanswered == Some(Action::Discard) || prepared;
        let away = matches!(self.vmm, Vmm::Away(_));
        let waits = self.lost.is_none() && self.entry.fetching && away && asked;
        waits.then(|| self.unanswered_since + RETURN)
    }

    /// Does to a VMM that does not come back what it cannot be told.
    pub(crate) fn lose_patience(&mut self) -> Option<Event> {
        // By the journal it never ran, and this side is done with it. Should it come back after all, it is told to end.
        let ended = self.end_by_force();
        self.unanswered_since = Instant::now();
        // A VMM that hangs and cannot be ended is as good as gone: its guest must not wait for it.
        (ended.is_err() && self.unanswered.is_none()).then_some(Event::VmmGone)
    }

    /// Tells whether the memory that the guest would have here is known not to be right, which then is the reason.
    pub(super) fn is_broken(&mut self) -> bool {
        let broken = self.placing.as_ref().and_then(|placing| placing.broken().map(str::to_owned));
        broken.is_some_and(|reason| {
            self.blame(reason);
            true
        })
    }

    /// Deals with a guest whose memory here is known not to be right, and which is to run.
    pub(super) fn give_back_broken(&mut self) -> Option<Event> {
        match &self.vmm {
            _ if self.has_never_run(self.told_to_run) => Some(Event::ResumeFailed),
            Vmm::Away(_) => self.leave_unanswered(Action::Resume),
            Vmm::Ended => Some(self.ended()),
            Vmm::Attached(_) | Vmm::Released => Some(Event::Abandoned),
        }
    }

    /// Tells whether the guest has certainly not run here: its VMM was not `told` to run it, or says so itself (which
    /// the state of a QEMU does not tell).
    pub(super) fn has_never_run(&self, told: bool) -> bool {
        !told
            || matches!(&self.vmm, Vmm::Attached(guest)
                if guest.run_state.get() == RunState::Loaded && guest.driver.qemu().is_none())
    }

    /// Returns what it means that the VMM's process has ended. A guest that was to run here, and whose VMM did not hear
    /// of that, has never run.
    pub(super) fn ended(&self) -> Event {
        match self.entry.record {
            Record::Running if !self.told_to_run => Event::ResumeFailed,
            _ if matches!(self.farewell, Some(Farewell::PoweredOff(_))) => Event::PoweredOff,
            _ => Event::VmmGone,
        }
    }
}
