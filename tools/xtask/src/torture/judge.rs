//! What a round came to, and whether that is allowed. Judged by what the VMMs themselves say and wrote down; what the
//! daemons say must agree with it.

use std::fmt;

use serde_json::Value;

use super::plan::{Blow, Victim};
use super::record::{History, Standing, Time};

/// A daemon may have told its VMM something just before it was killed, and the VMM does it a little later.
const IN_FLIGHT: Time = 50_000_000;

/// All that is known about a round.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Whether the guest may run at its destination without all of its memory.
    pub postcopy: bool,
    /// Names of the hosts: where the guest was at first, and where it was to go.
    pub hosts: [String; 2],
    /// The VMMs on these hosts.
    pub vmms: [VmmFacts; 2],
    /// What the daemons of these hosts say.
    pub daemons: [DaemonFacts; 2],
    /// The strikes that were made.
    pub strikes: Vec<Struck>,
    /// When the source's daemon first said that the guest is the destination's.
    pub committed: Option<Time>,
    /// When the destination's daemon first set out to tell its VMM to run the guest.
    pub told_to_run: Option<Time>,
    /// When the destination's daemon first saw that its VMM was gone.
    pub seen_gone: Option<Time>,
    /// When the destination's daemon first said that the guest runs and is whole.
    pub whole: Option<Time>,
    /// How `memlanectl migrate` ended; `None` if it did not.
    pub exit: Option<i32>,
    /// What was still under way when the time was up.
    pub unsettled: Option<String>,
    /// What else should not be, as it was seen.
    pub oddities: Vec<String>,
}

/// A VMM in the end.
#[derive(Clone, Debug, Default)]
pub struct VmmFacts {
    /// What it noted.
    pub history: History,
    /// Whether its process has ended.
    pub ended: bool,
    /// Whether the guest runs in it: its vCPUs do their work.
    pub runs: bool,
    /// What is wrong with the guest's memory, if that could be looked at.
    pub damage: Option<String>,
}

/// A daemon in the end.
#[derive(Clone, Debug, Default)]
pub struct DaemonFacts {
    /// The guest's latest migration.
    pub migration: Option<Value>,
    /// How it says that the guest stands.
    pub standing: Option<String>,
}

/// A strike that was made.
#[derive(Clone, Debug)]
pub struct Struck {
    /// With whom.
    pub victim: Victim,
    /// What.
    pub blow: Blow,
    /// How far the migration was.
    pub phase: Phase,
    /// Just before it.
    pub at: Time,
    /// When it had been made: whoever was killed had ended.
    pub done: Time,
}

/// How far a migration is, by what the VMMs do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The guest runs at its source.
    Copying,
    /// It stands still there.
    Paused,
    /// The destination has its state too.
    HandingOver,
    /// It runs at the destination, and may lack memory.
    Fetching,
    /// It runs at the destination, and the source has not let go of it.
    Arrived,
    /// It is gone from the source, or from everywhere.
    Over,
}

/// Where the guest is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It runs where it was.
    Here,
    /// It runs where it was to go.
    There,
    /// It runs nowhere, and the documents say that this may be.
    Lost(&'static str),
    /// It runs nowhere, at both hosts, or damaged.
    Wrong,
}

/// The judgement.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Where the guest is.
    pub fate: Fate,
    /// What must not be.
    pub faults: Vec<String>,
}

impl Phase {
    /// How far it is, by what the VMMs at the source and at the destination noted.
    pub fn of(source: &History, destination: &History, postcopy: bool) -> Self {
        match (source.last(), destination.last()) {
            (Some(Standing::Discarded), _) => Self::Over,
            (_, Some(Standing::Running)) if postcopy => Self::Fetching,
            (_, Some(Standing::Running)) => Self::Arrived,
            (Some(Standing::Paused), Some(Standing::Loaded)) => Self::HandingOver,
            (Some(Standing::Paused), _) => Self::Paused,
            _ => Self::Copying,
        }
    }

    /// For people and for JSON.
    pub fn as_str(self) -> &'static str {
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

impl Facts {
    /// Judges the round.
    pub fn judge(&self) -> Verdict {
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
                    faults
                        .push("the guest runs nowhere, and nothing in the documents says that it may".into());
                    Fate::Wrong
                }
            },
        };
        faults.extend(self.false_words());
        Verdict { fate, faults }
    }

    /// The guest must never run at its source once it may have run at its destination.
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

    /// A VMM whose guest does not run ends, unless it waits for one as it did before.
    fn leftovers(&self) -> Vec<String> {
        let left = |(vmm, _): &(&VmmFacts, &String)| {
            !vmm.ended && !vmm.runs && vmm.history.last() != Some(Standing::Incoming)
        };
        let told = |(vmm, host): (&VmmFacts, &String)| {
            format!("a VMM at {host} holds a guest that does not run there: {:?}", vmm.history.last())
        };
        self.vmms.iter().zip(&self.hosts).filter(left).map(told).collect()
    }

    /// Why the documents allow that the guest is lost.
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
        // A VMM that hangs hears what it was told when it goes on, and its daemon may be gone by then.
        let may_run = |killed: &Struck, since: Time| {
            killed.at + IN_FLIGHT >= since || self.told_to_run.is_some_and(|told| told <= killed.done)
        };
        if let Some(since) = self.ran_there()
            && self
                .kills(Victim::DestinationDaemon)
                .any(|killed| may_run(killed, since) && incomplete(&killed.at))
        {
            return Some("the destination's daemon was killed while the guest fetched");
        }
        if self.ran_there().is_some()
            && while_fetching(Victim::SourceVmm)
            && while_fetching(Victim::SourceDaemon)
        {
            return Some("all of the source was killed while the guest fetched");
        }
        (source.is_some() && while_fetching(Victim::DestinationDaemon))
            .then_some("the source's VMM was killed, and the destination's daemon before the guest was whole")
    }

    /// What the daemons and memlanectl say that is not so.
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

    /// Since when the guest ran at its destination.
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
    /// For people and for JSON.
    pub fn as_str(&self) -> &'static str {
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
