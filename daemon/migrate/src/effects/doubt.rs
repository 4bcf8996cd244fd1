//! This module settles what is in doubt after a crash, with what the VMM or the operator says of it.

use memlane_guest::Guest;
use memlane_net::journal::Entry;
use memlane_protocol::handover::{Event, Record, Resolution};
use memlane_protocol::wire::attach::{Bond, RunState};

use super::Effects;
use super::lost::NEVER_WHOLE;
use crate::handle::unix_seconds;
use crate::machine::Machine;
use crate::vmm::Vmm;

/// This is the reason for which a migration fails in which the daemon ended while the state was loaded.
const NEVER_LOADED: &str =
    "the daemon ended while the guest's state was loaded here; what there is of the guest is discarded";

impl Effects {
    /// Returns what a VMM that has attached says about the owner of the guest.
    pub(super) fn told_by(&mut self, guest: &Guest) -> Option<Event> {
        // It was told to, even if the journal says otherwise.
        self.told_to_run |= guest.run_state.get() == RunState::Running;
        match guest.run_state.get() {
            RunState::Running => Some(Event::Owned),
            // It knows nothing of daemons, and was paused, but it was not noted that it was given up.
            RunState::Relinquished
                if guest.driver.qemu().is_some()
                    && guest.bond.borrow().is_none()
                    && self.entry.record == Record::Leaving =>
            {
                Some(Event::Owned)
            }
            // Only prepared, and never whole: that comes first.
            RunState::Loaded if self.unknown_pages && self.entry.record == Record::Prepared => {
                self.blame(NEVER_WHOLE);
                self.next = Some(Event::Waits);
                Some(Event::ResumeFailed)
            }
            RunState::Incoming if self.entry.record == Record::Prepared => {
                self.blame(NEVER_LOADED);
                self.next = Some(Event::Waits);
                Some(Event::ResumeFailed)
            }
            RunState::Relinquished | RunState::Loaded => Some(Event::Waits),
            RunState::Incoming => None,
        }
    }

    /// Does the same for a VMM that had attached before its migration was taken up.
    pub(crate) async fn told_at_once(&mut self) -> Option<Event> {
        let guest = self.guest()?.clone();
        self.reopen(&guest).await;
        self.told_by(&guest)
    }

    /// Notes what the operator has decided.
    pub(crate) fn note_resolution(&mut self, resolution: Resolution) -> Event {
        self.reason = None;
        self.blame(match resolution {
            Resolution::RunHere => "the operator had the guest run here",
            Resolution::Discard => "the operator gave up what was here of the guest",
        });
        Event::Resolved(resolution)
    }

    /// Returns what the VMM is to remember of this migration.
    pub(crate) fn bond(&self) -> Bond {
        let Entry { migration, peer, fetching, .. } = &self.entry;
        Bond { migration: *migration, peer: peer.clone(), fetching: *fetching }
    }

    /// Shows whether the guest is in doubt, and what is waited for.
    pub(crate) fn show_doubt(&self, machine: &impl Machine) {
        let in_doubt = machine.can_resolve() && self.link.is_none();
        self.handle.resolvable.set(in_doubt);
        let waits_for = match &self.vmm {
            Vmm::Away(process) if in_doubt || self.link.is_none() && !machine.is_over() => {
                Some(format!("the guest's VMM, process {}, to attach again", process.identity().pid))
            }
            _ if in_doubt => Some(self.silence.words(&self.entry)),
            _ => self.waits_for_peer().or_else(|| self.guest()?.driver.waits_for()),
        };
        let seen = self.handle.progress.borrow();
        let status = &seen.status;
        let same = status.waits_for == waits_for && status.in_doubt_since_unix_seconds.is_some() == in_doubt;
        if same || status.outcome.is_some() {
            return;
        }
        drop(seen);
        self.handle.update(|progress| {
            let since = progress.status.in_doubt_since_unix_seconds.unwrap_or_else(unix_seconds);
            progress.status.in_doubt_since_unix_seconds = in_doubt.then_some(since);
            progress.status.waits_for = waits_for;
            if in_doubt {
                progress.status.guest_runs_at = None;
            }
        });
    }
}
