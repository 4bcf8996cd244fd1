//! The judgement of a move: whether what guests, daemons and `memlanectl` say fits what has happened.

use std::collections::BTreeSet;

use serde_json::Value;

use super::trouble::{Side, Trouble};
use super::turmoil::MadeTrouble;
use crate::common::ask::DaemonFacts;

/// All that is known about a move.
#[derive(Clone, Debug, Default)]
pub(crate) struct MoveFacts {
    /// Names of the hosts: where the guest was, and where it was to go.
    pub hosts: [String; 2],
    /// Whether the guest runs there now, by what it and its VMMs say.
    pub runs: [bool; 2],
    /// What the daemons there say. A migration is listed only if it began in this step.
    pub daemons: [DaemonFacts; 2],
    /// The exit code of `memlanectl migrate`; `None` if it did not end.
    pub exit: Option<i32>,
    /// The output of `memlanectl migrate`.
    pub told: String,
    /// Whether the order must be carried out if nothing goes wrong.
    pub must_succeed: bool,
    /// The troubles that came.
    pub troubles: Vec<MadeTrouble>,
    /// What an operator asked meanwhile, with the exit code and the output.
    pub asked: Vec<(Trouble, Option<i32>, String)>,
    /// The number of times that the guest may have been ordered to move.
    pub orders: u32,
    /// What was still under way when the time was up.
    pub unsettled: Option<String>,
    /// What is wrong with the guest.
    pub damage: Option<String>,
    /// Other things that must not happen, as they were seen.
    pub oddities: Vec<String>,
}

/// The place of a guest after a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MoveFate {
    /// It runs where it was.
    Here,
    /// It runs where it was to go.
    There,
    /// It runs nowhere, or on both hosts.
    Wrong,
}

impl MoveFate {
    /// Returns the name of the fate, for people and for JSON.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Here => "here",
            Self::There => "there",
            Self::Wrong => "wrong",
        }
    }
}

impl MoveFacts {
    /// Returns where the guest is.
    pub(crate) fn fate(&self) -> MoveFate {
        match self.runs {
            [true, false] => MoveFate::Here,
            [false, true] => MoveFate::There,
            _ => MoveFate::Wrong,
        }
    }

    /// Returns the faults that were found.
    pub(crate) fn judge(&self) -> Vec<String> {
        let mut faults = self.oddities.clone();
        faults.extend(self.unsettled.iter().map(|what| format!("still not settled: {what}")));
        faults.extend(self.damage.iter().map(|what| format!("the guest is not whole: {what}")));
        if self.fate() == MoveFate::Wrong {
            faults.push(format!("the guest runs at {:?}, and must run on one host", self.places()));
        }
        faults.extend(self.false_words());
        faults.extend(self.wrong_exit());
        faults.extend(
            self.asked.iter().filter_map(|(trouble, exit, told)| self.wrong_answer(trouble, *exit, told)),
        );
        faults
    }

    fn places(&self) -> BTreeSet<&str> {
        let places = self.hosts.iter().zip(self.runs).filter(|(_, runs)| *runs);
        places.map(|(host, _)| host.as_str()).collect()
    }

    /// Finds statements of the daemons that are not true, or do not fit each other's.
    fn false_words(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (at, (daemon, host)) in self.daemons.iter().zip(&self.hosts).enumerate() {
            let listed = daemon.standing.as_deref() == Some("running");
            if self.runs[at] != listed {
                let runs = if self.runs[at] { "runs" } else { "does not run" };
                let standing = daemon.standing.as_deref().unwrap_or("unknown");
                found.push(format!("the guest {runs} at {host}, whose daemon says that it is {standing}"));
            }
            let Some(migration) = &daemon.migration else { continue };
            let (outcome, runs_at) = (&migration["outcome"], &migration["guest_runs_at"]);
            // The one of a second order goes the other way, and is judged by its own words.
            if self.orders > 1 {
                continue;
            }
            let told = || format!("{host} tells of a migration {outcome}, with the guest at {runs_at}");
            let fits = match outcome.as_str() {
                Some("completed") => self.fate() == MoveFate::There,
                Some("failed" | "cancelled" | "refused") => self.fate() == MoveFate::Here,
                _ => false,
            };
            if !fits {
                found.push(format!("{}, but it runs at {:?}", told(), self.places()));
            }
            if runs_at.as_str().is_some_and(|at| !self.places().contains(at)) {
                found.push(format!("{}, where it is not", told()));
            }
            let reason = migration["reason"].as_str().unwrap_or_default();
            if outcome != "completed" && reason.trim().is_empty() {
                found.push(format!("{}, and does not say why", told()));
            }
        }
        let id = |at: usize| self.daemons[at].migration.as_ref().map(|migration| &migration["id"]);
        let completed = |at: usize| {
            self.daemons[at].migration.as_ref().is_some_and(|migration| migration["outcome"] == "completed")
        };
        if id(0).is_some() && id(0) == id(1) && completed(0) != completed(1) {
            found.push("the daemons do not agree whether the migration was completed".into());
        }
        found
    }

    /// Says why the exit code of `memlanectl migrate` does not fit.
    fn wrong_exit(&self) -> Option<String> {
        let Some(code) = self.exit else {
            return Some("memlanectl migrate did not end by itself".into());
        };
        let ended = |why: &str| {
            Some(format!("memlanectl migrate ended with exit code {code}, {why}: {}", self.told.trim()))
        };
        let struck = |side| self.came().any(|trouble| trouble.daemon() == Some(side));
        let cancelled = self.came().any(|trouble| matches!(trouble, Trouble::Cancel))
            // A daemon that is told to end cancels.
            || self.came().any(|trouble| matches!(trouble, Trouble::DaemonRestarted { .. }));
        let place = match code {
            0 => Some(MoveFate::There),
            3..=5 => Some(MoveFate::Here),
            _ => None,
        };
        if self.orders == 1 && place.is_some_and(|place| place != self.fate()) {
            return ended(&format!("but the guest is {}", self.fate().as_str()));
        }
        match code {
            0 => None,
            3 | 4 if !self.may_fail() => ended("though nothing was in its way"),
            5 if !cancelled => ended("though nobody cancelled it"),
            3..=5 if self.told.trim().is_empty() => ended("and does not say why"),
            3..=5 => None,
            6 if struck(Side::Source) => None,
            _ => ended("which does not fit what happened"),
        }
    }

    fn may_fail(&self) -> bool {
        let ports = self.came().filter(|trouble| trouble.port().is_some()).count();
        !self.must_succeed || ports > 1 || self.came().any(|trouble| !trouble.is_harmless())
    }

    /// Says why the answer to an operator does not fit.
    fn wrong_answer(&self, trouble: &Trouble, exit: Option<i32>, told: &str) -> Option<String> {
        let fault = |why: &str| Some(format!("{trouble}: exit code {exit:?}, {why}: {}", told.trim()));
        let struck = |side| self.came().any(|trouble| trouble.daemon() == Some(side));
        match (trouble, exit) {
            (_, None) => fault("which did not end by itself"),
            // What is asked when the migration has ended meanwhile, or has not begun.
            (Trouble::Cancel, Some(0 | 2 | 3)) => None,
            (Trouble::Cancel, Some(6)) if struck(Side::Source) => None,
            // Taken, if the first order had ended meanwhile.
            (Trouble::SecondOrder { .. }, Some(0 | 4 | 5)) => None,
            (Trouble::SecondOrder { .. }, Some(3)) if told.trim().is_empty() => {
                fault("which does not say why")
            }
            (Trouble::SecondOrder { .. }, Some(3)) => None,
            (Trouble::SecondOrder { side }, Some(6)) if struck(*side) => None,
            _ => fault("which does not fit what happened"),
        }
    }

    fn came(&self) -> impl Iterator<Item = &Trouble> {
        self.troubles.iter().map(|made| &made.trouble)
    }
}

/// Returns the number of orders that were taken, out of the answers to those that were given besides the first one.
pub(crate) fn orders_taken(asked: &[(Trouble, Option<i32>, String)]) -> u32 {
    let taken = |(trouble, exit, _): &&(Trouble, Option<i32>, String)| {
        // Of one whose daemon went away nobody knows.
        matches!(trouble, Trouble::SecondOrder { .. }) && !matches!(exit, Some(3))
    };
    1 + asked.iter().filter(taken).count() as u32
}

/// Removes a migration that is in `known`, those of before the step.
pub(crate) fn without_known(mut facts: DaemonFacts, known: &BTreeSet<String>) -> DaemonFacts {
    facts.migration =
        facts.migration.filter(|migration| !id_of(migration).is_some_and(|id| known.contains(id)));
    facts
}

/// Returns the identity of a migration.
pub(crate) fn id_of(migration: &Value) -> Option<&str> {
    migration["id"].as_str()
}

#[cfg(test)]
mod tests;
