//! Two hosts and a network, as far as a handover can tell.

use memlane_protocol::handover::{Phase, Source};

mod effects;
mod host;
mod memory;
mod recovery;
mod steps;
mod trouble;
mod vmms;

use host::{Host, Role, Vmm};
use memory::{Fetch, Memory};
pub(crate) use steps::Step;
pub(crate) use trouble::{Budget, Fault};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// A state of everything.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct World {
    source: Host,
    destination: Host,
    budget: Budget,
    fault: Fault,
    offered: bool,
    captured: bool,
    /// The destination's VMM was told to load the state.
    loading: bool,
    /// The destination's VMM was told to run what it had not loaded.
    ran_unloaded: bool,
    /// The guest ran on at the source after its state was captured.
    stale: bool,
    destination_ran: bool,
    /// `Running` was durable at the destination once.
    running_recorded: bool,
    /// A journal has lost something,
    damaged: bool,
    /// and the destination's that the guest ran there.
    forgot_running: bool,
    /// An operator has had it run: what became of it elsewhere was accepted.
    run_by_order: bool,
    /// An operator has given up what was at one host.
    given_up: bool,
    fetch: Fetch,
    /// The destination's VMM answers only once it can have the pages that it lacks.
    hangs: bool,
}

impl World {
    /// A guest at the source, an incoming VMM at the destination, and an order to move.
    pub(crate) fn new(budget: Budget, fault: Fault) -> Self {
        let mut world = Self {
            source: Host::new(Vmm::Running),
            destination: Host::new(Vmm::Incoming),
            budget,
            fault,
            offered: false,
            captured: false,
            loading: false,
            ran_unloaded: false,
            stale: false,
            destination_ran: false,
            running_recorded: false,
            damaged: false,
            forgot_running: false,
            run_by_order: false,
            given_up: false,
            fetch: Fetch::new(),
            hangs: false,
        };
        let (source, actions) = Source::new();
        world.source.role = Some(Role::Source(source));
        world.apply(Side::Source, actions);
        world
    }

    /// What must never be.
    pub(crate) fn violation(&self) -> Option<String> {
        let (source, destination) = (self.source.vmm, self.destination.vmm);
        let wrong = match (source, destination) {
            _ if self.ran_unloaded => "the destination runs what it has not loaded",
            (Vmm::Running, Vmm::Running) => "both hosts run the guest",
            (Vmm::Paused, Vmm::Running) => "the source may resume by itself what the destination runs",
            _ if self.run_by_order => self.memory_violation()?,
            (Vmm::Running, Vmm::Ended | Vmm::Discarded) if self.forgot_running => self.memory_violation()?,
            (Vmm::Running, _) if self.destination_ran => "the source runs what the destination has run",
            (_, Vmm::Running) if self.stale => "the destination runs what the source ran on with",
            _ => self.memory_violation()?,
        };
        Some(wrong.to_owned())
    }

    /// If everything has come to rest well: where the guest runs, or nowhere because its VMM
    /// ended while it had the guest, or runs what is no guest any more.
    pub(crate) fn good_end(&self) -> Option<Option<Side>> {
        if self.source.burned || self.destination.burned {
            return self.end_of_survivor();
        }
        if self.damaged && self.source.is_quiet() && self.source.phase() == Some(Phase::Fetching) {
            // One of them does not know any more who fetches: an operator sees it, and abandons that.
            let over = self.destination.role.is_none_or(|role| role.is_over());
            return (over && self.destination.is_quiet()).then_some(None);
        }
        if !self.source.at_rest() || !self.destination.at_rest() {
            return None;
        }
        match (self.source.vmm, self.destination.vmm) {
            (Vmm::Running, Vmm::Incoming | Vmm::Discarded | Vmm::Ended) => Some(Some(Side::Source)),
            (Vmm::Discarded | Vmm::Ended, Vmm::Running) => match self.fetch.memory {
                Memory::Whole => Some(Some(Side::Destination)),
                Memory::Hopeless => Some(None),
                Memory::Missing => {
                    let given_up = self.given_up || self.run_by_order || self.fetch.given_up_at_source;
                    (given_up && self.destination.role.is_none()).then_some(None)
                }
            },
            (Vmm::Ended, Vmm::Incoming | Vmm::Discarded | Vmm::Ended) => Some(None),
            (Vmm::Discarded, Vmm::Ended) if self.running_recorded => Some(None),
            (Vmm::Discarded, Vmm::Incoming | Vmm::Discarded | Vmm::Ended) if self.given_up => Some(None),
            // A VMM that would hang for ever is ended.
            (Vmm::Discarded, Vmm::Discarded) if self.hangs && self.fetch.lost_at_destination => Some(None),
            _ => None,
        }
    }

    /// The other host has burned: this one goes on saying what nobody hears.
    fn end_of_survivor(&self) -> Option<Option<Side>> {
        let side = if self.source.burned { Side::Destination } else { Side::Source };
        let host = self.host(side);
        if host.burned {
            return Some(None);
        }
        if !host.is_quiet() || host.role.is_some_and(|role| role.can_resolve()) {
            return None;
        }
        let whole = side == Side::Source || self.fetch.memory == Memory::Whole;
        let waits = host.phase() == Some(Phase::Fetching);
        match host.vmm {
            Vmm::Running if whole => Some(Some(side)),
            Vmm::Running | Vmm::Incoming | Vmm::Discarded | Vmm::Ended => Some(None),
            // An operator abandons what nobody fetches any more.
            Vmm::Relinquished if waits => Some(None),
            Vmm::Relinquished | Vmm::Loaded | Vmm::Paused => None,
        }
    }

    fn host(&self, side: Side) -> &Host {
        match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        }
    }

    fn host_mut(&mut self, side: Side) -> &mut Host {
        match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        }
    }
}

fn other(side: Side) -> Side {
    match side {
        Side::Source => Side::Destination,
        Side::Destination => Side::Source,
    }
}
