//! How the VMMs of the two hosts obey.

use memlane_protocol::handover::{Action, Event};

use super::World;
use super::host::Vmm;
use super::trouble::Fault;

impl World {
    pub(super) fn source_vmm_obeys(&mut self, fails: bool) {
        let command = self.source.commands.remove(0);
        self.fetch.served &= command != Action::Discard;
        if matches!(self.source.vmm, Vmm::Ended | Vmm::Discarded) {
            return self.source.hear(Event::VmmGone);
        }
        if fails {
            self.budget.vmm -= 1;
            return self.source.hear(Event::ResumeFailed);
        }
        match command {
            Action::Pause => self.source.vmm = Vmm::Paused,
            Action::Relinquish if self.source.vmm == Vmm::Paused => {
                if self.fault != Fault::NotRelinquished {
                    self.source.vmm = Vmm::Relinquished;
                }
                self.source.hear(Event::Relinquished);
            }
            Action::Relinquish => self.source.hear(Event::Failed),
            Action::Resume => {
                self.source_runs();
                self.source.hear(Event::Resumed);
            }
            _ => {
                self.source.vmm = Vmm::Discarded;
                self.source.hear(Event::Discarded);
            }
        }
    }

    pub(super) fn source_runs(&mut self) {
        self.source.vmm = Vmm::Running;
        self.source.orphaned = false;
        self.stale |= self.captured;
    }

    pub(super) fn destination_vmm_obeys(&mut self, fails: bool) {
        let (again, for_the_first_time) = (self.resumed(true), self.resumed(false));
        let fault = self.fault;
        let host = &mut self.destination;
        let command = host.commands.remove(0);
        match (command, host.vmm) {
            (_, Vmm::Ended | Vmm::Discarded) => host.hear(Event::VmmGone),
            (Action::Resume, Vmm::Running) => host.hear(again),
            (Action::Resume, Vmm::Loaded) if fails => {
                host.hear(Event::ResumeFailed);
                self.budget.vmm -= 1;
            }
            (Action::Resume, Vmm::Loaded) if for_the_first_time == Event::Abandoned => {
                host.hear(match fault {
                    Fault::LosesWhatNeverRan => Event::Abandoned,
                    _ => Event::ResumeFailed,
                });
            }
            (Action::Resume, Vmm::Loaded) => {
                host.vmm = Vmm::Running;
                host.hear(for_the_first_time);
                self.destination_ran = true;
            }
            (Action::Resume, Vmm::Incoming) => self.ran_unloaded = true,
            (Action::Resume, vmm) => panic!("a VMM that is {vmm:?} was told to run"),
            _ => {
                host.vmm = Vmm::Discarded;
                host.hear(Event::Discarded);
            }
        }
    }
}
