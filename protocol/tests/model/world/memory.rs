//! What post-copy adds: memory that is not yet where the guest is.

use memlane_protocol::handover::{Event, Outcome, Phase};

use super::host::Vmm;
use super::trouble::Fault;
use super::{Side, World};

/// What the destination's VMM has of the guest's memory, which it knows without its daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Memory {
    Whole,
    /// Part of it is at the source.
    Missing,
    /// Part of it was never had and will not come, or nobody knows which part.
    Hopeless,
}

/// Where the guest's memory is, and what was said about that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Fetch {
    pub memory: Memory,
    /// The source's daemon lets the destination fetch.
    pub served: bool,
    /// The source's VMM and its daemon both went away, and the memory with them.
    pub dropped: bool,
    /// Somebody at this host decided that there is nothing to be had from the other.
    pub given_up_at_source: bool,
    pub given_up_at_destination: bool,
    pub completed_at_source: bool,
    pub lost_at_destination: bool,
    /// A report that is not true.
    pub false_report: Option<Outcome>,
}

impl Fetch {
    pub(super) fn new() -> Self {
        Self {
            memory: Memory::Whole,
            served: false,
            dropped: false,
            given_up_at_source: false,
            given_up_at_destination: false,
            completed_at_source: false,
            lost_at_destination: false,
            false_report: None,
        }
    }
}

impl World {
    /// What must never be, about memory.
    pub(crate) fn memory_violation(&self) -> Option<&'static str> {
        let Fetch { memory, given_up_at_source, completed_at_source, lost_at_destination, .. } = self.fetch;
        let needed = self.destination.vmm == Vmm::Running && memory == Memory::Missing && !given_up_at_source;
        match self.fetch.false_report {
            Some(Outcome::Completed) => Some("a migration is reported as completed without all memory"),
            Some(_) => Some("a guest is reported as lost that is not"),
            None if needed && self.source.vmm == Vmm::Discarded => {
                Some("the source discards what the destination still fetches")
            }
            None if lost_at_destination && completed_at_source => {
                Some("the source has completed what the destination has lost")
            }
            None => None,
        }
    }

    pub(crate) fn lacks_pages(&self) -> bool {
        self.fetch.memory == Memory::Missing
    }

    /// Whether the destination's daemon knows that the guest can never be whole there.
    pub(crate) fn is_hopeless(&self) -> bool {
        self.fetch.memory == Memory::Hopeless
    }

    /// Whether the destination's VMM waits for pages, and answers nothing until they can come.
    pub(crate) fn waits_for_pages(&self) -> bool {
        let lives = matches!(self.destination.vmm, Vmm::Loaded | Vmm::Running);
        self.hangs && lives && self.lacks_pages() && !(self.fetch.served && self.source.up)
    }

    /// Whether the destination can get the last page now.
    pub(crate) fn can_fetch(&self) -> bool {
        self.fetch.served
            && self.source.up
            && self.destination.phase() == Some(Phase::Fetching)
            && (self.destination.vmm, self.fetch.memory) == (Vmm::Running, Memory::Missing)
    }

    pub(crate) fn fetch_the_rest(&mut self) {
        if self.fault != Fault::CompleteTooEarly {
            self.fetch.memory = Memory::Whole;
        }
        self.destination.hear(Event::Complete);
    }

    /// The source's daemon is told to serve.
    pub(crate) fn serve(&mut self) {
        match self.fault {
            Fault::ServesNotAfterCrash if self.budget.crashes == 0 => {}
            Fault::ServesWhatIsDropped if self.fetch.dropped => {}
            _ if self.fetch.dropped => {
                self.fetch.given_up_at_source = true;
                self.source.hear(Event::Abandoned);
            }
            _ => self.fetch.served = true,
        }
    }

    /// The source's VMM or daemon is gone: while one of them is there, so is the memory.
    pub(crate) fn lose_memory(&mut self) {
        self.fetch.served &= self.source.up;
        self.fetch.dropped |= !self.source.up && self.source.vmm == Vmm::Ended;
    }

    /// An operator no longer waits for the other host.
    pub(crate) fn give_up(&mut self, at: Side) {
        self.budget.abandon = false;
        match at {
            Side::Source => self.fetch.given_up_at_source = true,
            Side::Destination => self.give_up_missing(),
        }
        self.tell(at, Event::Abandoned);
    }

    /// From here on whoever touches what is missing fails, with or without a daemon.
    pub(crate) fn give_up_missing(&mut self) {
        self.fetch.given_up_at_destination = true;
        if self.fetch.memory == Memory::Missing && self.fault != Fault::GivesUpWithoutTrace {
            self.fetch.memory = Memory::Hopeless;
        }
    }

    /// What the destination's daemon says of a guest that runs, or ran before: `again`.
    pub(crate) fn resumed(&self, again: bool) -> Event {
        match (self.fetch.memory, self.fault) {
            (Memory::Whole, Fault::ForgetsComplete) if again => Event::Abandoned,
            (Memory::Missing, Fault::ForgetsMissing) if again => Event::Resumed,
            (Memory::Hopeless, Fault::RunsWithHoles) => Event::Resumed,
            (Memory::Whole, _) => Event::Resumed,
            (Memory::Missing, _) => Event::ResumedIncomplete,
            (Memory::Hopeless, _) => Event::Abandoned,
        }
    }

    pub(crate) fn report(&mut self, at: Side, outcome: Outcome) {
        // An operator or a damaged journal let the guest run after the source's VMM, or its claim on it, was gone.
        let nothing_to_fetch = (self.run_by_order || self.damaged) && self.source.has_nothing();
        let fetch = &mut self.fetch;
        let given_up = fetch.given_up_at_source || fetch.given_up_at_destination;
        let really_lost = self.destination.vmm == Vmm::Ended || given_up || nothing_to_fetch;
        let is_true = match outcome {
            Outcome::Completed => fetch.memory == Memory::Whole,
            // What has never run there can be given back; but an operator may give up a guest whose VMM does not say so.
            Outcome::Lost => really_lost && (at == Side::Source || self.destination_ran || self.hangs),
            _ => true,
        };
        if !is_true {
            fetch.false_report = Some(outcome);
        }
        match (at, outcome) {
            (Side::Source, Outcome::Completed) => fetch.completed_at_source = true,
            (Side::Destination, Outcome::Lost) => {
                fetch.lost_at_destination = true;
                self.give_up_missing();
            }
            _ => {}
        }
    }
}
