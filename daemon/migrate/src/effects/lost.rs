//! This module deals with guests whose missing pages were known only to a daemon that is no more, and with their VMMs.

use std::time::{Duration, Instant};

use memlane_guest::KillError;
use memlane_net::task;
use memlane_protocol::handover::{Action, Event, Record};
use memlane_protocol::wire::attach::RunState;
use tracing::{error, warn};

use super::Effects;
use crate::vmm::Vmm;

/// A VMM that lives may take this long to attach again, before it is ended by force.
const RETURN: Duration = Duration::from_secs(10);
/// This is the reason for which a guest that was prepared to fetch is given back.
pub(crate) const NEVER_WHOLE: &str = "the daemon ended before the guest was started here, and which of its pages are missing \
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
    /// Tells whether the guest lacks pages, and only a daemon that is no more knew which.
    pub(super) fn cannot_be_whole(&self) -> bool {
        self.entry.fetching && self.placing.is_none()
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
        // One that was prepared to fetch is not told anything: it is to say how it stands.
        let prepared = self.entry.record == Record::Prepared && !self.told_to_run;
        let asked = self.unanswered.is_some() || prepared;
        let waits =
            self.lost.is_none() && self.cannot_be_whole() && matches!(self.vmm, Vmm::Away(_)) && asked;
        waits.then(|| self.unanswered_since + RETURN)
    }

    /// Does to a VMM that does not come back what it cannot be told.
    pub(crate) fn lose_patience(&mut self) -> Option<Event> {
        if self.unanswered == Some(Action::Resume) {
            self.unanswered = None;
            return Some(self.end_lost());
        }
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
            _ => Event::VmmGone,
        }
    }
}
