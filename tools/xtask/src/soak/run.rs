//! Steps, one after the other, until the time is up.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use memlane_lab::{HostId, Programs, Requirement, why_not};

use super::fleet::{Fleet, FleetKinds};
use super::growth::DaemonLives;
use super::keep::keep;
use super::linux;
use super::logs::LogWatch;
use super::options::{SoakGuests, SoakOptions};
use super::plan::{StepKind, StepPlan};
use super::report::{SoakEnd, SoakReport};
use super::step::SoakStep;
use crate::torture::round::TortureRound;

/// After so many steps, if they went well, all guests are asked whether they are whole, also those that were not moved.
const ASK_ALL: u64 = 10;

/// A whole run.
pub(crate) struct SoakRun {
    options: SoakOptions,
    programs: Programs,
    interrupted: Arc<AtomicBool>,
    seed: u64,
    kinds: FleetKinds,
    /// Why there are fewer kinds of guests than wanted.
    missing: Vec<String>,
    logs: PathBuf,
    report: SoakReport,
    lives: DaemonLives,
    watch: LogWatch,
    /// The number of the next step.
    next: u64,
}

impl SoakRun {
    /// Prepares a run; nothing is started yet. It ends early once `interrupted` is true.
    ///
    /// # Errors
    ///
    /// If no guest of the kinds that are wanted can be had.
    pub(crate) fn new(
        options: SoakOptions,
        programs: Programs,
        interrupted: Arc<AtomicBool>,
    ) -> Result<Self> {
        let seed = options.run.seed();
        let mut missing = Vec::new();
        let no_kvm = why_not(&[Requirement::Kvm]);
        missing.extend(
            no_kvm.iter().map(|why| format!("every guest of memlane-vmm is a process, without KVM: {why}")),
        );
        let mut kinds = FleetKinds {
            linked: options.guests != SoakGuests::Qemu,
            linux: options.guests != SoakGuests::Linked,
            kvm: no_kvm.is_none(),
        };
        if let Some(why) = kinds.linux.then(linux::obtain).flatten() {
            kinds.linux = false;
            missing.push(format!("no Linux guest in QEMU: {why}"));
        }
        anyhow::ensure!(kinds.guests() > 0, "there is no guest to move: {}", missing.join("; "));
        let logs = options.run.logs("soak", seed);
        let report = SoakReport::new(seed, options.run.json);
        let next = options.first;
        Ok(Self {
            options,
            programs,
            interrupted,
            seed,
            kinds,
            missing,
            logs,
            report,
            lives: DaemonLives::default(),
            watch: LogWatch::default(),
            next,
        })
    }

    /// Does the steps; true if nothing was found in them that must not be, and nobody interrupted them.
    ///
    /// # Errors
    ///
    /// If the hosts or the guests cannot be made.
    pub(crate) fn go(mut self) -> Result<bool> {
        let (guests, of) = (self.kinds.guests(), self.of());
        eprintln!("soak: seed {}, {of}, {guests} guests, encrypted", self.seed);
        for why in &self.missing {
            eprintln!("soak: missing: {why}");
        }
        while !self.is_over() {
            eprintln!("soak: starting two hosts and {guests} guests");
            let mut fleet = Fleet::start(&self.programs, self.kinds, self.seed)?;
            let good = self.soak(&mut fleet)?;
            if !good && !self.options.go_on {
                break;
            }
        }
        let end = SoakEnd {
            steps: self.next - self.options.first,
            interrupted: self.is_interrupted(),
            missing: &self.missing,
            lives: &self.lives,
            errors: self.watch.errors(),
        };
        self.report.end(&end);
        Ok(self.report.is_good() && !end.interrupted)
    }

    /// Does steps with a fleet until the time is up or one has failed; returns whether none has.
    fn soak(&mut self, fleet: &mut Fleet) -> Result<bool> {
        while !self.is_over() {
            let (step, of) = (self.next, self.of());
            self.next += 1;
            let plan = StepPlan::new(self.seed, step, self.kinds.guests(), self.kinds.kvm);
            let faults = self.report.faults();
            let told = match self.step(fleet, &plan) {
                Ok(told) => told,
                // It may well be the fault of what is tested: a VMM that is not taken, a daemon that does not answer.
                Err(error) => {
                    self.report.fault(step, format!("the step cannot be done: {error:#}"));
                    String::new()
                }
            };
            if self.is_interrupted() {
                break;
            }
            let well = self.report.faults() == faults;
            self.look(fleet, step, well && step % ASK_ALL == ASK_ALL - 1);
            if self.is_over() && self.report.faults() == faults {
                self.look_at_the_end(fleet, step);
            }
            if self.report.faults() != faults {
                self.keep(fleet, &format!("step-{step}"), &format!("{plan:#?}\n\n{told}"));
                return Ok(false);
            }
            self.report.progress(&of);
        }
        if self.options.run.logs.is_some() {
            self.keep(fleet, "end", "the whole run");
        }
        Ok(true)
    }

    /// Does a step; returns what is known about it, for people who look for a fault.
    fn step(&mut self, fleet: &mut Fleet, plan: &StepPlan) -> Result<String> {
        match &plan.kind {
            StepKind::Moves { moves, troubles } => {
                let step = SoakStep::begin(fleet, &self.interrupted, moves, troubles)?;
                let Some(outcomes) = step.play()? else { return Ok(String::new()) };
                for outcome in &outcomes {
                    self.report.add(plan.step, outcome);
                }
                Ok(format!("{outcomes:#?}"))
            }
            StepKind::Victim(round) => {
                let began = Instant::now();
                let outcome = TortureRound::begin(&mut fleet.rig, round)?.play()?;
                let verdict = outcome.facts.judge();
                self.report.add_victim(plan.step, &round.to_string(), &verdict, began.elapsed());
                Ok(format!("{verdict:#?}\n\n{:#?}\n\nmemlanectl:\n{}", outcome.facts, outcome.told))
            }
        }
    }

    /// Looks at logs and daemons, and at all guests if `ask_all` is true.
    fn look(&mut self, fleet: &mut Fleet, step: u64, ask_all: bool) {
        let found = self.try_to_look(fleet, ask_all);
        for fault in found.unwrap_or_else(|error| vec![format!("{error:#}")]) {
            self.report.fault(step, fault);
        }
    }

    fn try_to_look(&mut self, fleet: &mut Fleet, ask_all: bool) -> Result<Vec<String>> {
        let mut faults = self.watch.look(fleet)?;
        let views = fleet.ask()?;
        for (id, view) in [HostId::A, HostId::B].into_iter().zip(&views) {
            let pid = fleet.rig.daemon(id).pid();
            self.lives.look(fleet.host(id), pid, view.guests.len())?;
        }
        if ask_all {
            faults.extend(damaged(fleet));
        }
        Ok(faults)
    }

    fn look_at_the_end(&mut self, fleet: &mut Fleet, step: u64) {
        for fault in damaged(fleet).into_iter().chain(self.lives.faults()) {
            self.report.fault(step, fault);
        }
    }

    fn keep(&mut self, fleet: &mut Fleet, name: &str, text: &str) {
        let folder = self.logs.join(name);
        match keep(&folder, fleet, text).context("keeping logs") {
            Ok(()) => self.report.kept(folder),
            Err(error) => eprintln!("soak: {error:#}"),
        }
    }

    fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn is_over(&self) -> bool {
        let done = match self.options.steps {
            Some(steps) => self.next - self.options.first >= steps,
            None => self.report.elapsed() >= Duration::from_secs(60 * self.options.minutes),
        };
        done || self.is_interrupted()
    }

    /// Says how long it goes on.
    fn of(&self) -> String {
        match self.options.steps {
            Some(steps) => format!("{steps} steps"),
            None => format!("{} min", self.options.minutes),
        }
    }
}

/// Asks all guests whether they are whole, and says which are not.
fn damaged(fleet: &mut Fleet) -> Vec<String> {
    let all = 0..fleet.guests.len();
    all.filter_map(|guest| {
        let error = fleet.examine(guest).err()?;
        Some(format!("{} is not whole: {error:#}", fleet.guests[guest].name))
    })
    .collect()
}
