//! A daemon that starts again, and a daemon that cheats when it loses its peer.

use memlane_protocol::handover::{Destination, Event, Phase, Record, Source};

use super::host::{Role, Vmm};
use super::trouble::Fault;
use super::{Side, World};

impl World {
    pub(super) fn restart(&mut self, at: Side) {
        self.host_mut(at).up = true;
        if let record @ Some(_) = self.host(at).journal {
            self.take_up(at, record);
        }
    }

    /// Takes up what the journal holds; without a record, what a VMM says.
    pub(super) fn take_up(&mut self, at: Side, record: Option<Record>) {
        let vmm = self.host(at).vmm;
        if at == Side::Destination && self.budget.hangs && matches!(vmm, Vmm::Loaded | Vmm::Running) {
            self.hangs = true;
        }
        let guesses = self.fault == Fault::ResumesOnAGuess && record != Some(Record::Committed);
        let (role, actions, news) = match at {
            Side::Source => {
                let found = if guesses && record.is_none() { Some(Record::Leaving) } else { record };
                let (role, actions) = Source::recover(found).expect("the source wrote it");
                let news = match vmm {
                    Vmm::Relinquished if guesses => Some(Event::Owned),
                    Vmm::Relinquished => Some(Event::Waits),
                    // Of a VMM that was committed, only that it runs shows that it was taken back.
                    Vmm::Paused if record == Some(Record::Committed) => None,
                    _ => Some(Event::Owned),
                };
                (Role::Source(role), actions, news)
            }
            Side::Destination => {
                let (role, actions) = Destination::recover(record).expect("the destination wrote it");
                let runs = vmm == Vmm::Running && self.fault != Fault::TakesRunningForLoaded;
                let news = if runs { Event::Owned } else { Event::Waits };
                (Role::Destination(role), actions, Some(news))
            }
        };
        let host = self.host_mut(at);
        host.role = Some(role);
        if matches!(vmm, Vmm::Ended | Vmm::Discarded) {
            host.hear(Event::VmmGone);
        } else if let Some(news) = news {
            host.hear(news);
        }
        self.apply(at, actions);
        let prepared = at == Side::Destination && record == Some(Record::Prepared);
        if prepared && vmm == Vmm::Incoming && self.fault != Fault::TakesLoadingForLoaded {
            self.tell(at, Event::ResumeFailed);
        }
        if prepared && self.is_hopeless() && self.fault != Fault::LosesWhatNeverRan {
            self.tell(at, Event::ResumeFailed);
        }
    }

    pub(super) fn cheat_on_peer_lost(&mut self, at: Side) {
        match (self.fault, at) {
            (Fault::ResumeOnPeerLost, Side::Source) if self.source.journal == Some(Record::Committed) => {
                self.source_runs();
            }
            (Fault::FreesOnPeerLost, Side::Source) if self.source.phase() == Some(Phase::Fetching) => {
                self.source.vmm = Vmm::Discarded;
            }
            (Fault::GiveUpInDoubt, Side::Destination)
                if self.destination.journal == Some(Record::Prepared) =>
            {
                (self.destination.journal, self.destination.role) = (None, None);
                self.destination.vmm = Vmm::Discarded;
            }
            _ => {}
        }
    }
}
