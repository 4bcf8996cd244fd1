//! The output of the rounds.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::judge::{Fate, RoundFacts, RoundVerdict};
use super::plan::RoundPlan;
use super::table::FateTable;

/// The time between two estimates of how long the rest will take.
const PROGRESS: Duration = Duration::from_secs(20);

/// The results of all rounds so far.
pub(crate) struct TortureReport {
    json: bool,
    table: FateTable,
    began: Instant,
    of: u64,
    done: u64,
    /// The number of rounds without a strike, because the migration was over too early.
    unharmed: u64,
    failed: Vec<u64>,
    said: Instant,
}

impl TortureReport {
    /// Makes an empty report, which is printed as JSON or for people.
    pub(crate) fn new(json: bool) -> Self {
        let now = Instant::now();
        Self {
            json,
            table: FateTable::default(),
            began: now,
            of: 0,
            done: 0,
            unharmed: 0,
            failed: Vec::new(),
            said: now,
        }
    }

    /// Notes that so many rounds are to come.
    pub(crate) fn begin(&mut self, of: u64) {
        (self.of, self.began, self.said) = (of, Instant::now(), Instant::now());
    }

    /// Prints the result of a round.
    pub(crate) fn add(
        &mut self,
        seed: u64,
        plan: &RoundPlan,
        facts: &RoundFacts,
        verdict: &RoundVerdict,
        took: Duration,
    ) {
        self.done += 1;
        match facts.strikes.first() {
            Some(struck) => self.table.add(struck.victim, struck.phase, &verdict.fate),
            None => self.unharmed += 1,
        }
        if !verdict.faults.is_empty() {
            self.failed.push(plan.round);
        }
        match self.json {
            true => print(&round_json(seed, plan, facts, verdict, took).to_string()),
            false => {
                print(&format!("{:4}/{} {}", self.done, self.of, round_text(plan, facts, verdict, took)))
            }
        }
        for fault in &verdict.faults {
            eprintln!("torture: seed {seed}, round {}: {fault}", plan.round);
        }
        if self.said.elapsed() > PROGRESS && self.done < self.of {
            self.said = Instant::now();
            let left = self.began.elapsed().div_f64(self.done as f64).mul_f64((self.of - self.done) as f64);
            let (done, of, failed) = (self.done, self.of, self.failed.len());
            eprintln!("torture: {done} of {of} rounds, {failed} failed; {} s to go", left.as_secs());
        }
    }

    /// Prints the results of all rounds; returns true if none has failed.
    pub(crate) fn end(&mut self, seed: u64, logs: &Path) -> bool {
        self.failed.sort_unstable();
        let (good, seconds) = (self.failed.is_empty(), self.began.elapsed().as_secs_f64());
        let kept = (!good).then(|| logs.display().to_string());
        if self.json {
            let all = json!({
                "seed": seed, "rounds": self.done, "unharmed": self.unharmed, "seconds": seconds,
                "table": self.table.json(), "failed_rounds": self.failed, "logs": kept,
            });
            print(&all.to_string());
            return good;
        }
        print(&format!("\n{}", self.table.text()));
        let (done, failed, unharmed) = (self.done, self.failed.len(), self.unharmed);
        print(&format!(
            "{done} rounds of seed {seed} in {seconds:.0} s, {failed} failed; in {unharmed} no process was struck, because the moment for it did not come"
        ));
        for round in &self.failed {
            print(&format!("again: cargo xtask torture --seed {seed} --only {round}"));
        }
        if let Some(kept) = kept {
            print(&format!("logs: {kept}"));
        }
        good
    }
}

fn round_text(plan: &RoundPlan, facts: &RoundFacts, verdict: &RoundVerdict, took: Duration) -> String {
    let strikes = facts
        .strikes
        .iter()
        .map(|struck| format!("{} {} in {}", struck.victim.as_str(), struck.blow, struck.phase.as_str()));
    let mut strikes: Vec<String> = strikes.collect();
    if strikes.is_empty() {
        strikes.push("no process was struck".into());
    }
    let verdict_text = match verdict.faults.len() {
        0 => verdict.fate.to_string(),
        _ => format!("FAILED ({})", verdict.fate.as_str()),
    };
    format!(
        "round {:<4} {plan}: {}: {verdict_text} ({:.1} s)",
        plan.round,
        strikes.join(", "),
        took.as_secs_f64()
    )
}

fn round_json(
    seed: u64,
    plan: &RoundPlan,
    facts: &RoundFacts,
    verdict: &RoundVerdict,
    took: Duration,
) -> Value {
    let strikes: Vec<Value> = facts
        .strikes
        .iter()
        .map(|struck| {
            json!({
                "victim": struck.victim.as_str(), "blow": struck.blow.to_string(),
                "phase": struck.phase.as_str(), "at_ns": struck.at,
            })
        })
        .collect();
    let why = match verdict.fate {
        Fate::Lost(why) => Some(why),
        _ => None,
    };
    json!({
        "seed": seed, "round": plan.round, "mode": plan.mode.as_str(),
        "guest": format!("{:?}", plan.guest).to_lowercase(), "vcpus": plan.vcpus, "verify": plan.verify,
        "user": if plan.hosts.unit { "unit" } else { "root" }, "far": plan.hosts.far,
        "strikes": strikes, "fate": verdict.fate.as_str(), "lost_because": why,
        "exit_code": facts.exit, "faults": verdict.faults, "seconds": took.as_secs_f64(),
    })
}

fn print(line: &str) {
    // Whoever reads may be gone; the rounds go on.
    let _ = writeln!(std::io::stdout(), "{line}");
}
