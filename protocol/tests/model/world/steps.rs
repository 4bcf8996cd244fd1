//! What can happen next.

use memlane_protocol::handover::{Action, Event, Message, Phase, Record, Resolution};

use super::host::{MESSAGES, Vmm, record_bit};
use super::trouble::Fault;
use super::{Side, World, other};

/// One thing that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    /// A message arrives, and may arrive again.
    Deliver {
        to: Side,
        message: Message,
    },
    /// Whatever is on its way is lost.
    LoseAll,
    /// The journal gets to the next write.
    Write {
        at: Side,
        fails: bool,
    },
    /// The VMM gets to the next command.
    Obey {
        at: Side,
        fails: bool,
    },
    /// The daemon hears from its journal or VMM.
    Hear {
        at: Side,
        event: Event,
    },
    /// The daemon notices something, or decides, by itself.
    Local {
        at: Side,
        event: Event,
    },
    /// The source has sent the last pages and the state.
    Capture,
    /// The destination's VMM loads them.
    Load {
        fails: bool,
    },
    /// The destination gets the last page that it lacks.
    Fetch,
    Crash(Side),
    Restart {
        at: Side,
        /// It does not know any more which pages are missing.
        forgetful: bool,
        /// The journal was damaged: it holds this instead, which it held before.
        damaged: Option<Option<Record>>,
    },
    /// A VMM that may run only with the daemon's permission attaches, and the journal knows nothing of it.
    Attach(Side),
    /// The host burns, with its daemon, its journal and its VMM.
    Burn(Side),
    /// The operator decides what is in doubt. `obvious` where the guest is known to run at the other host.
    Resolve {
        at: Side,
        resolution: Resolution,
        obvious: bool,
    },
    /// Another VMM names the migration, and answers for the one that was told.
    Stranger(Side),
    VmmEnds(Side),
    /// The source's VMM loses its connection to a daemon that lives.
    VmmDisconnects,
    /// A paused VMM whose daemon went away resumes.
    VmmResumesByItself,
}

impl Step {
    /// Whether it needs no further trouble to happen.
    pub(crate) fn is_fair(self) -> bool {
        match self {
            Self::LoseAll
            | Self::Crash(_)
            | Self::VmmEnds(_)
            | Self::VmmDisconnects
            | Self::Burn(_)
            | Self::Stranger(_) => false,
            Self::Write { fails, .. } | Self::Obey { fails, .. } | Self::Load { fails } => !fails,
            Self::Local { event, .. } => !matches!(event, Event::Cancel | Event::Abandoned),
            Self::Restart { forgetful, damaged, .. } => !forgetful && damaged.is_none(),
            Self::Resolve { resolution, obvious, .. } => resolution == Resolution::RunHere || obvious,
            _ => true,
        }
    }
}

impl World {
    /// Everything that can happen next, and what comes of it.
    pub(crate) fn steps(&self) -> Vec<(Step, Self)> {
        let mut steps = Vec::new();
        for side in [Side::Source, Side::Destination] {
            self.host_steps(side, &mut steps);
        }
        self.guest_steps(&mut steps);
        let mut after = Vec::with_capacity(steps.len());
        for step in steps {
            let mut world = self.clone();
            world.take(step);
            after.push((step, world));
        }
        after
    }

    fn host_steps(&self, at: Side, steps: &mut Vec<Step>) {
        let host = self.host(at);
        for (bit, message) in MESSAGES.into_iter().enumerate() {
            if host.up && host.arriving >> bit & 1 == 1 {
                steps.push(Step::Deliver { to: at, message });
            }
        }
        if let Some(write) = host.writes.first() {
            steps.push(Step::Write { at, fails: false });
            if self.budget.journal > 0 && *write != Action::Forget {
                steps.push(Step::Write { at, fails: true });
            }
        }
        // A VMM that is not needed any more is ended if it hangs.
        let hangs = |command: &Action| {
            *command == Action::Resume && at == Side::Destination && self.waits_for_pages()
        };
        if host.commands.first().is_some_and(hangs) {
            steps.push(Step::Local { at, event: Event::MemoryFound });
        } else if let Some(command) = host.commands.first() {
            steps.push(Step::Obey { at, fails: false });
            let stands = matches!(host.vmm, Vmm::Loaded | Vmm::Paused | Vmm::Relinquished);
            if self.budget.vmm > 0 && *command == Action::Resume && stands {
                steps.push(Step::Obey { at, fails: true });
            }
            if self.fault == Fault::BelievesStrangers && *command != Action::Pause {
                steps.push(Step::Stranger(at));
            }
        }
        steps.extend(host.inbox.iter().map(|&event| Step::Hear { at, event }));
        if host.role.is_some_and(|role| !role.is_over()) {
            if self.fault != Fault::NeverRepeat {
                steps.push(Step::Local { at, event: Event::Tick });
            }
            steps.push(Step::Local { at, event: Event::PeerLost });
        }
        if host.burned {
            return;
        }
        if self.budget.burn > 0 {
            steps.push(Step::Burn(at));
        }
        self.resolutions(at, steps);
        if !host.up {
            self.restarts(at, steps);
        } else if host.role.is_none() && matches!(host.vmm, Vmm::Relinquished | Vmm::Loaded) {
            steps.push(Step::Attach(at));
            if self.budget.crashes > 0 {
                steps.push(Step::Crash(at));
            }
        } else if self.budget.crashes > 0 {
            steps.push(Step::Crash(at));
        }
        if !matches!(host.vmm, Vmm::Discarded | Vmm::Ended) && self.budget.vmm > 0 {
            steps.push(Step::VmmEnds(at));
        }
    }

    /// How a daemon may find its journal, and what it may know of missing pages, when it starts again.
    fn restarts(&self, at: Side, steps: &mut Vec<Step>) {
        let host = self.host(at);
        let mut found = vec![None];
        if self.budget.damage > 0 && !self.promised(at) {
            found.extend(host.damages().map(Some));
        }
        let lacks_pages = matches!(host.vmm, Vmm::Loaded | Vmm::Running) && self.lacks_pages();
        for damaged in found {
            steps.push(Step::Restart { at, forgetful: false, damaged });
            if at == Side::Destination && lacks_pages {
                steps.push(Step::Restart { at, forgetful: true, damaged });
            }
        }
    }

    /// What an operator may decide at this host, who says of the other one only what is true.
    fn resolutions(&self, at: Side, steps: &mut Vec<Step>) {
        if !self.budget.resolve || !self.host(at).role.is_some_and(|role| role.can_resolve()) {
            return;
        }
        let other = self.host(other(at));
        let (run_here, discard) = (Resolution::RunHere, Resolution::Discard);
        if other.has_nothing() || self.fault == Fault::PromisesWhatIsNotTrue {
            steps.push(Step::Resolve { at, resolution: run_here, obvious: false });
        }
        // Without its journal the destination does not know that anything is missing.
        let ended = !self.lacks_pages() || other.role.is_none();
        let obvious = at == Side::Source && other.vmm == Vmm::Running && ended;
        if !obvious && !self.budget.discard {
            return;
        }
        steps.push(Step::Resolve { at, resolution: discard, obvious });
    }

    /// The destination has promised not to run what its VMM still could, or what its journal said before
    /// that it runs: the one promise that must not be lost (see the documentation of `handover`).
    fn promised(&self, at: Side) -> bool {
        let host = self.host(at);
        let has = |record| host.past & record_bit(record) != 0;
        has(Record::Declined) && (host.vmm == Vmm::Loaded || has(Record::Running))
    }

    fn guest_steps(&self, steps: &mut Vec<Step>) {
        let (source, destination) = (&self.source, &self.destination);
        if source.arriving | destination.arriving != 0 {
            steps.push(Step::LoseAll);
        }
        if self.budget.cancel && source.role.is_some() {
            steps.push(Step::Local { at: Side::Source, event: Event::Cancel });
        }
        match source.phase() {
            Some(Phase::Copying) => {
                steps.push(Step::Local { at: Side::Source, event: Event::SwitchOver });
            }
            Some(Phase::SwitchingOver) => {
                let ready = source.vmm == Vmm::Paused
                    || self.fault == Fault::SentBeforePause && source.vmm == Vmm::Running;
                if ready && !self.captured {
                    steps.push(Step::Capture);
                }
            }
            _ => {}
        }
        match destination.phase() {
            Some(Phase::Offering) => {
                steps.push(Step::Local { at: Side::Destination, event: Event::Accepted });
                steps.push(Step::Local { at: Side::Destination, event: Event::Refused });
            }
            Some(Phase::Copying) if !self.loading => {
                steps.push(Step::Local { at: Side::Destination, event: Event::Loading });
            }
            Some(Phase::Copying) if self.captured && destination.vmm == Vmm::Incoming => {
                steps.push(Step::Load { fails: false });
                if self.budget.vmm > 0 {
                    steps.push(Step::Load { fails: true });
                }
            }
            _ => {}
        }
        if self.can_fetch() {
            steps.push(Step::Fetch);
        }
        for at in [Side::Source, Side::Destination] {
            // The destination's daemon knows when an order comes too late.
            let in_time = at == Side::Source || self.lacks_pages();
            let can_abandon = self.host(at).role.is_some_and(|role| role.can_abandon());
            if self.budget.abandon && in_time && can_abandon {
                steps.push(Step::Local { at, event: Event::Abandoned });
            }
        }
        if source.vmm == Vmm::Paused {
            if source.orphaned {
                steps.push(Step::VmmResumesByItself);
            } else if source.up && self.budget.vmm > 0 {
                steps.push(Step::VmmDisconnects);
            }
        }
    }
}
