//! What all rounds came to: for each victim, and for each phase in which it was struck, where guests were afterwards.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::judge::{Fate, RoundPhase};
use super::plan::Victim;

/// Counts of fates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    here: u32,
    there: u32,
    lost: u32,
    wrong: u32,
}

/// The counts for each victim and phase. A round counts once, by its first strike.
#[derive(Clone, Debug, Default)]
pub(crate) struct FateTable(BTreeMap<(usize, RoundPhase), Counts>);

impl FateTable {
    /// Adds a round.
    pub(crate) fn add(&mut self, victim: Victim, phase: RoundPhase, fate: &Fate) {
        let row = Victim::ALL.iter().position(|one| *one == victim).expect("all of them are there");
        let counts = self.0.entry((row, phase)).or_default();
        match fate {
            Fate::Here => counts.here += 1,
            Fate::There => counts.there += 1,
            Fate::Lost(_) => counts.lost += 1,
            Fate::Wrong => counts.wrong += 1,
        }
    }

    /// Returns the table as text for people.
    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "{:20}{:10}{:>8}{:>8}{:>8}{:>8}\n",
            "first victim", "phase", "here", "there", "lost", "wrong"
        );
        for ((row, phase), Counts { here, there, lost, wrong }) in &self.0 {
            let (victim, phase) = (Victim::ALL[*row].as_str(), phase.as_str());
            text += &format!("{victim:20}{phase:10}{here:8}{there:8}{lost:8}{wrong:8}\n");
        }
        text + "here, there: runs whole at its source, at its destination; lost: as docs/orders.md and docs/limits.md say"
    }

    /// Returns the table as JSON for programs.
    pub(crate) fn json(&self) -> Value {
        let row = |((row, phase), Counts { here, there, lost, wrong }): (&(usize, RoundPhase), &Counts)| {
            json!({
                "victim": Victim::ALL[*row].as_str(), "phase": phase.as_str(),
                "here": here, "there": there, "lost": lost, "wrong": wrong,
            })
        };
        self.0.iter().map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_counted_by_victim_and_phase() {
        let mut table = FateTable::default();
        table.add(Victim::SourceVmm, RoundPhase::Copying, &Fate::Lost("so it is"));
        table.add(Victim::SourceVmm, RoundPhase::Copying, &Fate::Lost("so it is"));
        table.add(Victim::SourceDaemon, RoundPhase::Arrived, &Fate::There);
        let text = table.text();
        let line = |start: &str| {
            let line = text.lines().find(|line| line.starts_with(start)).unwrap_or_default();
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(line("source VMM"), "source VMM copying 0 0 2 0");
        assert_eq!(line("source daemon"), "source daemon arrived 0 1 0 0");
        assert_eq!(table.json()[0]["there"], 1);
    }
}
