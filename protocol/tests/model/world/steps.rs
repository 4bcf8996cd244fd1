//! What can happen next.

use memlane_protocol::handover::{Action, Event, Message, Phase};

use super::host::{MESSAGES, Vmm};
use super::{Fault, Side, World};

/// One thing that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
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
    },
    VmmEnds(Side),
    /// The source's VMM loses its connection to a daemon that lives.
    VmmDisconnects,
    /// A paused VMM whose daemon went away resumes.
    VmmResumesByItself,
}

impl Step {
    /// Whether it needs no further trouble to happen.
    pub fn is_fair(self) -> bool {
        match self {
            Self::LoseAll | Self::Crash(_) | Self::VmmEnds(_) | Self::VmmDisconnects => false,
            Self::Write { fails, .. } | Self::Obey { fails, .. } | Self::Load { fails } => !fails,
            Self::Local { event, .. } => !matches!(event, Event::Cancel | Event::Abandoned),
            Self::Restart { forgetful, .. } => !forgetful,
            _ => true,
        }
    }
}

impl World {
    /// Everything that can happen next, and what comes of it.
    pub fn steps(&self) -> Vec<(Step, Self)> {
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
        if let Some(command) = host.commands.first() {
            steps.push(Step::Obey { at, fails: false });
            let stands = matches!(host.vmm, Vmm::Loaded | Vmm::Paused | Vmm::Relinquished);
            if self.budget.vmm > 0 && *command == Action::Resume && stands {
                steps.push(Step::Obey { at, fails: true });
            }
        }
        steps.extend(host.inbox.iter().map(|&event| Step::Hear { at, event }));
        if host.half.is_some_and(|half| !half.is_over()) {
            if self.fault != Fault::NeverRepeat {
                steps.push(Step::Local { at, event: Event::Tick });
            }
            steps.push(Step::Local { at, event: Event::PeerLost });
        }
        if !host.up {
            steps.push(Step::Restart { at, forgetful: false });
            let lacks_pages = matches!(host.vmm, Vmm::Loaded | Vmm::Running) && self.lacks_pages();
            if at == Side::Destination && lacks_pages {
                steps.push(Step::Restart { at, forgetful: true });
            }
        } else if self.budget.crashes > 0 {
            steps.push(Step::Crash(at));
        }
        if !matches!(host.vmm, Vmm::Discarded | Vmm::Ended) && self.budget.vmm > 0 {
            steps.push(Step::VmmEnds(at));
        }
    }

    fn guest_steps(&self, steps: &mut Vec<Step>) {
        let (source, destination) = (&self.source, &self.destination);
        if source.arriving | destination.arriving != 0 {
            steps.push(Step::LoseAll);
        }
        if self.budget.cancel && source.half.is_some() {
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
            if self.budget.abandon && in_time && self.host(at).phase() == Some(Phase::Fetching) {
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
