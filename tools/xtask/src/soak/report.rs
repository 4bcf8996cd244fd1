//! The output of a soak: a line for each move, and at the end or at a fault the counts of all of them.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::growth::DaemonLives;
use super::judge::MoveFate;
use super::policy::MoveWay;
use super::step::MoveOutcome;
use super::trouble::KINDS;
use crate::torture::judge::RoundVerdict;

/// The time between two lines that say how far it is.
const PROGRESS: Duration = Duration::from_secs(60);

/// The results of all steps so far.
pub(crate) struct SoakReport {
    json: bool,
    seed: u64,
    began: Instant,
    said: Instant,
    moves: u64,
    /// Counts by way, and by trouble; of moves without any trouble under no name.
    ways: BTreeMap<&'static str, Counts>,
    troubles: BTreeMap<Option<usize>, Counts>,
    guests: BTreeMap<String, Counts>,
    victims: BTreeMap<&'static str, u32>,
    /// Steps that failed, and what was found.
    faults: Vec<(u64, String)>,
    kept: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    there: u32,
    here: u32,
    wrong: u32,
}

/// What is known besides the moves, at the end.
pub(crate) struct SoakEnd<'a> {
    /// The steps that were done.
    pub steps: u64,
    /// Whether somebody interrupted it.
    pub interrupted: bool,
    /// Why there are fewer kinds of guests than wanted.
    pub missing: &'a [String],
    /// What daemons took of the machine.
    pub lives: &'a DaemonLives,
    /// The errors that were logged, and how often.
    pub errors: &'a BTreeMap<String, u32>,
}

impl SoakReport {
    /// Makes an empty report, which is printed as JSON or for people.
    pub(crate) fn new(seed: u64, json: bool) -> Self {
        let now = Instant::now();
        Self {
            json,
            seed,
            began: now,
            said: now,
            moves: 0,
            ways: BTreeMap::new(),
            troubles: BTreeMap::new(),
            guests: BTreeMap::new(),
            victims: BTreeMap::new(),
            faults: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// Prints the result of a move.
    pub(crate) fn add(&mut self, step: u64, outcome: &MoveOutcome) {
        self.moves += 1;
        let fate = outcome.facts.fate();
        self.ways.entry(outcome.policy.way.as_str()).or_default().add(fate);
        self.guests.entry(outcome.guest.clone()).or_default().add(fate);
        if outcome.facts.troubles.is_empty() {
            self.troubles.entry(None).or_default().add(fate);
        }
        for made in &outcome.facts.troubles {
            self.troubles.entry(Some(made.trouble.kind())).or_default().add(fate);
        }
        match self.json {
            true => print(&move_json(self.seed, step, outcome).to_string()),
            false => print(&move_text(step, outcome)),
        }
        for fault in &outcome.faults {
            self.fault(step, format!("{}: {fault}", outcome.guest));
        }
    }

    /// Prints the result of a step in which a guest's VMM was struck.
    pub(crate) fn add_victim(&mut self, step: u64, plan: &str, verdict: &RoundVerdict, took: Duration) {
        *self.victims.entry(verdict.fate.as_str()).or_default() += 1;
        match self.json {
            true => print(
                &json!({
                    "seed": self.seed, "step": step, "victim": plan, "fate": verdict.fate.as_str(),
                    "faults": verdict.faults, "seconds": took.as_secs_f64(),
                })
                .to_string(),
            ),
            false => {
                print(&format!("{step:4} a victim: {plan}: {} ({:.1} s)", verdict.fate, took.as_secs_f64()))
            }
        }
        for fault in &verdict.faults {
            self.fault(step, fault.clone());
        }
    }

    /// Prints and counts a fault.
    pub(crate) fn fault(&mut self, step: u64, fault: String) {
        eprintln!("soak: FAULT: seed {}, step {step}: {fault}", self.seed);
        self.faults.push((step, fault));
    }

    /// Notes where logs were kept.
    pub(crate) fn kept(&mut self, folder: PathBuf) {
        self.kept.push(folder);
    }

    /// Returns whether nothing was found.
    pub(crate) fn is_good(&self) -> bool {
        self.faults.is_empty()
    }

    /// Returns the number of faults so far.
    pub(crate) fn faults(&self) -> usize {
        self.faults.len()
    }

    /// Returns the time since it began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Says how far it is, now and then. `of` is what is to come in all.
    pub(crate) fn progress(&mut self, of: &str) {
        if self.said.elapsed() > PROGRESS {
            self.said = Instant::now();
            let minutes = self.began.elapsed().as_secs_f64() / 60.0;
            let (moves, faults) = (self.moves, self.faults.len());
            eprintln!("soak: {minutes:.1} min of {of}, {moves} moves, {faults} faults");
        }
    }

    /// Prints the results of all steps.
    pub(crate) fn end(&self, end: &SoakEnd<'_>) {
        if self.json {
            return print(&self.json(end).to_string());
        }
        let head = ["there", "here", "wrong"];
        let title = |name: &str| format!("\n{name:24}{:>8}{:>8}{:>8}", head[0], head[1], head[2]);
        let row = |name: &str, Counts { there, here, wrong }: &Counts| {
            format!("{name:24}{there:8}{here:8}{wrong:8}")
        };
        let mut lines = vec![title("policy")];
        let ways = MoveWay::ALL.map(MoveWay::as_str);
        lines.extend(ways.iter().filter_map(|way| Some(row(way, self.ways.get(way)?))));
        lines.push(title("trouble"));
        let name = |kind: &Option<usize>| kind.map_or("none", |kind| KINDS[kind]);
        lines.extend(self.troubles.iter().map(|(kind, counts)| row(name(kind), counts)));
        lines.push(title("guest"));
        lines.extend(self.guests.iter().map(|(guest, counts)| row(guest, counts)));
        lines.push(
            "there: it runs, whole, where it was to go; here: the order failed, was refused or cancelled, and it runs on, \
             whole, where it was\n"
                .into(),
        );
        let victims: Vec<String> =
            self.victims.iter().map(|(fate, count)| format!("{count} {fate}")).collect();
        if !victims.is_empty() {
            lines.push(format!("guests whose VMM was killed or stopped: {}", victims.join(", ")));
        }
        lines.push(format!(
            "{} daemons lived; those that lived longest, after a warm-up and at their end:",
            end.lives.count()
        ));
        lines.extend(end.lives.text());
        for (error, count) in end.errors {
            lines.push(format!("logged as an error, {count} times: {error}"));
        }
        lines.extend(end.missing.iter().map(|why| format!("missing: {why}")));
        let interrupted = if end.interrupted { "; interrupted" } else { "" };
        let verdict = match self.faults.len() {
            0 => "nothing was lost, and nothing was found that must not be".to_owned(),
            count => format!("{count} FAULTS"),
        };
        lines.push(format!(
            "seed {}: {} steps, {} moves in {:.1} min{interrupted}: {verdict}",
            self.seed,
            end.steps,
            self.moves,
            self.began.elapsed().as_secs_f64() / 60.0,
        ));
        lines.extend(self.faults.iter().map(|(step, fault)| format!("step {step}: {fault}")));
        lines.extend(self.kept.iter().map(|folder| format!("logs: {}", folder.display())));
        print(&lines.join("\n"));
    }

    fn json(&self, end: &SoakEnd<'_>) -> Value {
        let rows = |rows: Vec<(&str, &Counts)>| -> Value {
            let row = |(name, Counts { there, here, wrong }): (&str, &Counts)| json!({ "name": name, "there": there, "here": here, "wrong": wrong });
            rows.into_iter().map(row).collect()
        };
        let troubles = self.troubles.iter();
        let troubles =
            troubles.map(|(kind, counts)| (kind.map_or("none", |kind| KINDS[kind]), counts)).collect();
        let faults: Vec<Value> =
            self.faults.iter().map(|(step, fault)| json!({ "step": step, "fault": fault })).collect();
        let kept: Vec<String> = self.kept.iter().map(|folder| folder.display().to_string()).collect();
        json!({
            "seed": self.seed, "steps": end.steps, "moves": self.moves, "seconds": self.began.elapsed().as_secs_f64(),
            "interrupted": end.interrupted, "encrypted": true,
            "policies": rows(self.ways.iter().map(|(way, counts)| (*way, counts)).collect()),
            "troubles": rows(troubles),
            "guests": rows(self.guests.iter().map(|(guest, counts)| (guest.as_str(), counts)).collect()),
            "victims": self.victims, "daemons": end.lives.count(), "growth": end.lives.json(),
            "errors_logged": end.errors, "missing": end.missing, "faults": faults, "logs": kept,
        })
    }
}

impl Counts {
    fn add(&mut self, fate: MoveFate) {
        match fate {
            MoveFate::There => self.there += 1,
            MoveFate::Here => self.here += 1,
            MoveFate::Wrong => self.wrong += 1,
        }
    }
}

fn move_text(step: u64, outcome: &MoveOutcome) -> String {
    let MoveOutcome { guest, policy, facts, faults, took, .. } = outcome;
    let mut troubles: Vec<String> = facts
        .troubles
        .iter()
        .map(|made| format!("{}{}", made.trouble, if made.under_way { "" } else { " afterwards" }))
        .collect();
    if troubles.is_empty() {
        troubles.push("no trouble".into());
    }
    let fate = match faults.len() {
        0 => format!("runs {}", facts.fate().as_str()),
        _ => format!("FAILED ({})", facts.fate().as_str()),
    };
    let code = facts.exit.map_or("none".to_owned(), |code| code.to_string());
    let [moved, all] = took.map(|took| took.as_secs_f64());
    format!(
        "{step:4} {guest:7} to {} ({policy}): {}: {fate}, exit code {code} ({moved:.1} s, {all:.1} s in all)",
        facts.hosts[1],
        troubles.join(", "),
    )
}

fn move_json(seed: u64, step: u64, outcome: &MoveOutcome) -> Value {
    let MoveOutcome { guest, kind, policy, facts, faults, took } = outcome;
    let troubles: Vec<Value> = facts
        .troubles
        .iter()
        .map(|made| {
            let kind = KINDS[made.trouble.kind()];
            json!({ "kind": kind, "text": made.trouble.to_string(), "under_way": made.under_way })
        })
        .collect();
    json!({
        "seed": seed, "step": step, "guest": guest, "kind": kind, "from": facts.hosts[0], "to": facts.hosts[1],
        "policy": policy.way.as_str(), "order": policy.words().join(" "), "troubles": troubles,
        "fate": facts.fate().as_str(), "exit_code": facts.exit, "faults": faults,
        "order_seconds": took[0].as_secs_f64(), "seconds": took[1].as_secs_f64(),
    })
}

fn print(line: &str) {
    // Whoever reads may be gone; the run goes on.
    let _ = writeln!(std::io::stdout(), "{line}");
}
