//! The judgement of a round: its result, and whether that is allowed. It follows from what the VMMs themselves say and
//! wrote down. What the daemons say must agree with it.

use std::fmt;

use memlane_lab::{GuestHistory, NotedState, Time};

use super::plan::{Blow, Victim};
use crate::common::ask::DaemonFacts;

/// The time in which a VMM may still do what it was told, in nanoseconds: its daemon may have told it just before it
/// was killed.
const IN_FLIGHT: Time = 50_000_000;

/// All that is known about a round.
#[derive(Clone, Debug, Default)]
pub(crate) struct RoundFacts {
    /// Whether the guest may run at its destination without all of its memory.
    pub postcopy: bool,
    /// Names of the hosts: where the guest was at first, and where it was to go.
    pub hosts: [String; 2],
    /// The VMMs on these hosts.
    pub vmms: [VmmFacts; 2],
    /// The reports of the daemons of these hosts.
    pub daemons: [DaemonFacts; 2],
    /// The strikes that were made.
    pub strikes: Vec<Struck>,
    /// The time when the source's daemon first said that the guest is the destination's.
    pub committed: Option<Time>,
    /// The time when the destination's daemon first set out to tell its VMM to run the guest.
    pub told_to_run: Option<Time>,
    /// The time when the destination's daemon first saw that its VMM was gone.
    pub seen_gone: Option<Time>,
    /// The time when the destination's daemon first said that the guest runs and is whole.
    pub whole: Option<Time>,
    /// The exit code of `memlanectl migrate`; `None` if it did not end.
    pub exit: Option<i32>,
    /// The thing that was still under way when the time was up.
    pub unsettled: Option<String>,
    /// Other things that must not happen, as they were seen.
    pub oddities: Vec<String>,
}

/// The state of a VMM at the end of a round.
#[derive(Clone, Debug, Default)]
pub(crate) struct VmmFacts {
    /// The history that the VMM wrote.
    pub history: GuestHistory,
    /// Whether its process has ended.
    pub ended: bool,
    /// Whether the guest runs in the VMM: its vCPUs do their work.
    pub runs: bool,
    /// The error in the guest's memory, if the memory could be examined and has one.
    pub damage: Option<String>,
}

/// A strike that was made.
#[derive(Clone, Debug)]
pub(crate) struct Struck {
    /// The victim of the strike.
    pub victim: Victim,
    /// The blow that hit it.
    pub blow: Blow,
    /// The phase that the migration was in.
    pub phase: RoundPhase,
    /// The time just before the strike.
    pub at: Time,
    /// The time just after the strike. A victim that was killed had ended by then.
    pub done: Time,
}

/// The phase of a migration, as it follows from what the VMMs do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum RoundPhase {
    /// The guest runs at its source.
    Copying,
    /// The guest is paused at its source.
    Paused,
    /// The guest is paused at its source, and the destination has its state too.
    HandingOver,
    /// The guest runs at the destination, and may lack memory.
    Fetching,
    /// The guest runs at the destination, and the source has not let go of it.
    Arrived,
    /// The guest is gone from the source, or from both hosts.
    Over,
}

/// The place of the guest at the end of a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The guest runs where it was.
    Here,
    /// The guest runs where it was to go.
    There,
    /// The guest runs nowhere, and the documents say that this may happen.
    Lost(&'static str),
    /// The guest runs nowhere, at both hosts, or damaged.
    Wrong,
}

/// The judgement of a round.
#[derive(Clone, Debug)]
pub(crate) struct RoundVerdict {
    /// The place of the guest.
    pub fate: Fate,
    /// The faults that were found.
    pub faults: Vec<String>,
}

impl RoundPhase {
    /// Returns the phase that follows from what the VMMs at the source and at the destination wrote.
    pub(crate) fn of(source: &GuestHistory, destination: &GuestHistory, postcopy: bool) -> Self {
        match (source.last(), destination.last()) {
            (Some(NotedState::Discarded), _) => Self::Over,
            (_, Some(NotedState::Running)) if postcopy => Self::Fetching,
            (_, Some(NotedState::Running)) => Self::Arrived,
            (Some(NotedState::Paused), Some(NotedState::Loaded)) => Self::HandingOver,
            (Some(NotedState::Paused), _) => Self::Paused,
            _ => Self::Copying,
        }
    }

    /// Returns the name of the phase, for people and for JSON.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Copying => "copying",
            Self::Paused => "pause",
            Self::HandingOver => "handover",
            Self::Fetching => "fetching",
            Self::Arrived => "arrived",
            Self::Over => "over",
        }
    }
}

impl RoundFacts {
    /// Judges the round.
    pub(crate) fn judge(&self) -> RoundVerdict {
        let mut faults = self.oddities.clone();
        faults.extend(self.unsettled.iter().map(|what| format!("still not settled: {what}")));
        faults.extend(self.two_owners());
        faults.extend(self.leftovers());
        for (vmm, host) in self.vmms.iter().zip(&self.hosts).filter(|(vmm, _)| vmm.runs) {
            faults.extend(
                vmm.damage.iter().map(|damage| format!("the guest at {host} is not whole: {damage}")),
            );
        }
        let fate = match [self.vmms[0].runs, self.vmms[1].runs] {
            [true, true] => Fate::Wrong,
            [true, false] => Fate::Here,
            [false, true] => Fate::There,
            [false, false] => match self.may_be_lost() {
                Some(why) => Fate::Lost(why),
                None => {
                    faults.push("the guest runs nowhere, and the documents do not allow that".into());
                    Fate::Wrong
                }
            },
        };
        faults.extend(self.false_words());
        RoundVerdict { fate, faults }
    }

    /// Checks that the guest never ran at its source once it may have run at its destination.
    fn two_owners(&self) -> Option<String> {
        let since = self.ran_there()?;
        let until = self.vmms[0].history.ran().into_iter().map(|(start, end)| match end {
            Some(end) => end,
            // Noted as running to its end: that was it, or it is running now.
            None => self.killed(Victim::SourceVmm).map_or(Time::MAX, |killed| killed.done).max(start),
        });
        let until = until.max().filter(|until| *until > since)?;
        let text = match until {
            Time::MAX => "and still does".to_owned(),
            until => format!("for {} µs more", (until - since) / 1000),
        };
        Some(format!("two owners: the guest ran at its destination, and at its source after that, {text}"))
    }

    /// Checks that each VMM whose guest does not run has ended, unless it waits for a guest as it did before.
    fn leftovers(&self) -> Vec<String> {
        let left = |(vmm, _): &(&VmmFacts, &String)| {
            !vmm.ended && !vmm.runs && vmm.history.last() != Some(NotedState::Incoming)
        };
        let told = |(vmm, host): (&VmmFacts, &String)| {
            format!("a VMM at {host} holds a guest that does not run there: {:?}", vmm.history.last())
        };
        self.vmms.iter().zip(&self.hosts).filter(left).map(told).collect()
    }

    /// Returns why the documents allow that the guest is lost; `None` if they do not allow it.
    fn may_be_lost(&self) -> Option<&'static str> {
        let source = self.killed(Victim::SourceVmm);
        let destination = self.killed(Victim::DestinationVmm);
        if source.is_some() && self.committed.is_none() {
            return Some("its VMM was killed before it was handed over");
        }
        if source.is_some() && destination.is_some() {
            return Some("both VMMs were killed");
        }
        // What is told to a VMM that is gone does not reach it, and it has provably never run.
        let told = |ended: Time| {
            self.told_to_run
                .is_some_and(|told| told <= ended && self.seen_gone.is_none_or(|gone| told <= gone))
        };
        if destination.is_some_and(|killed| self.ran_there().is_some() || told(killed.done)) {
            return Some("its VMM was killed where it ran");
        }
        if !self.postcopy {
            return None;
        }
        let incomplete = |at: &Time| self.whole.is_none_or(|whole| *at <= whole + IN_FLIGHT);
        let while_fetching = |victim| self.kills(victim).any(|killed| incomplete(&killed.at));
        let all_of_source = while_fetching(Victim::SourceVmm) && while_fetching(Victim::SourceDaemon);
        (self.ran_there().is_some() && all_of_source)
            .then_some("all of the source was killed while the guest fetched")
    }

    /// Finds statements of the daemons and of memlanectl that are not true.
    fn false_words(&self) -> Vec<String> {
        let ([source, destination], ran_there) = (&self.vmms, self.ran_there().is_some());
        let here = source.runs || self.killed(Victim::SourceVmm).is_some();
        let nowhere = !source.runs && !destination.runs;
        let fits = |outcome: &str| match outcome {
            "completed" => ran_there,
            "failed" | "cancelled" | "refused" => !ran_there && here,
            "lost" => nowhere,
            _ => false,
        };
        let mut found = Vec::new();
        for (at, (daemon, host)) in self.daemons.iter().zip(&self.hosts).enumerate() {
            let listed_as_running = daemon.standing.as_deref() == Some("running");
            if self.vmms[at].runs != listed_as_running {
                let standing = daemon.standing.as_deref().unwrap_or("unknown");
                let runs = if self.vmms[at].runs { "runs" } else { "does not run" };
                found.push(format!("the guest {runs} at {host}, whose daemon says that it is {standing}"));
            }
            let Some(migration) = &daemon.migration else { continue };
            let (outcome, runs_at) = (&migration["outcome"], &migration["guest_runs_at"]);
            let told = || format!("{host} tells of a migration {outcome}, with the guest at {runs_at}");
            if outcome.as_str().is_some_and(|outcome| !fits(outcome)) {
                found.push(format!("{}, which is not so", told()));
            }
            // What has ended since is no lie.
            let elsewhere = (runs_at == &*self.hosts[0] && destination.runs)
                || (runs_at == &*self.hosts[1] && (source.runs || !ran_there));
            if elsewhere {
                found.push(format!("{}, where it is not", told()));
            }
            if runs_at.is_null() && outcome == "failed" && at == 0 && source.runs {
                found.push(format!("{}, though it runs at its own", told()));
            }
        }
        let told = match self.exit {
            Some(0) => fits("completed"),
            Some(3..=5) => fits("failed"),
            Some(6) => self.strikes.iter().any(|struck| struck.victim == Victim::SourceDaemon),
            Some(7) => fits("lost"),
            _ => false,
        };
        if !told {
            let code = self.exit.map_or("nothing".to_owned(), |code| format!("exit code {code}"));
            found.push(format!("memlanectl migrate ended with {code}, which is not so"));
        }
        found
    }

    /// Returns since when the guest ran at its destination.
    fn ran_there(&self) -> Option<Time> {
        self.vmms[1].history.ran().first().map(|(start, _)| *start)
    }

    fn kills(&self, victim: Victim) -> impl Iterator<Item = &Struck> {
        let killed = move |struck: &&Struck| struck.victim == victim && matches!(struck.blow, Blow::Kill(_));
        self.strikes.iter().filter(killed)
    }

    fn killed(&self, victim: Victim) -> Option<&Struck> {
        self.kills(victim).next()
    }
}

impl Fate {
    /// Returns the name of the fate, for people and for JSON.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::Here => "here",
            Self::There => "there",
            Self::Lost(_) => "lost",
            Self::Wrong => "wrong",
        }
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here => f.write_str("runs here"),
            Self::There => f.write_str("runs there"),
            Self::Lost(why) => write!(f, "lost: {why}"),
            Self::Wrong => f.write_str("wrong"),
        }
    }
}

#[cfg(test)]
mod tests;
