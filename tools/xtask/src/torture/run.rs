//! Rounds side by side.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use memlane_lab::{DaemonUser, LabOptions, Programs, Rate, Requirement, Rig, RigOptions, why_not};

use super::judge::RoundVerdict;
use super::keep::keep;
use super::options::{TortureOptions, User};
use super::plan::{HostsKind, RoundPlan};
use super::report::TortureReport;
use super::round::{RoundOutcome, TortureRound};

/// The log filter: the steps of the handover are logged, and [`record`](crate::common::record) reads them.
const LOG: &str = "info,memlane_migrate::effects=debug";
/// The rate of a port, in bits a second: a guest's memory takes about half a second.
const PORT_RATE: u64 = 500_000_000;
/// The time that a message takes from one daemon to the other, if the hosts are far from each other.
const FAR: Duration = Duration::from_millis(8);

/// All rounds.
pub(crate) struct TortureRun {
    options: TortureOptions,
    programs: Programs,
    seed: u64,
    kvm: bool,
    logs: PathBuf,
    /// The hosts that are not in use now.
    free: Mutex<Vec<(HostsKind, Rig)>>,
    report: Mutex<TortureReport>,
    next: AtomicU64,
}

impl TortureRun {
    /// Prepares a run; nothing is started yet.
    pub(crate) fn new(options: TortureOptions, programs: Programs) -> Self {
        let (seed, kvm) = (options.run.seed(), why_not(&[Requirement::Kvm]).is_none());
        let logs = options.run.logs("torture", seed);
        let report = Mutex::new(TortureReport::new(options.run.json));
        Self { options, programs, seed, kvm, logs, free: Mutex::default(), report, next: AtomicU64::new(0) }
    }

    /// Does these rounds; true if nothing was found in them that must not be.
    ///
    /// # Errors
    ///
    /// If hosts cannot be made, or VMMs do not start.
    pub(crate) fn rounds(&self, rounds: Range<u64>) -> Result<bool> {
        let kvm = if self.kvm { "" } else { "; no /dev/kvm, so every guest is a process" };
        let count = rounds.end - rounds.start;
        eprintln!("torture: seed {}, {count} rounds from {}{kvm}", self.seed, rounds.start);
        lock(&self.report).begin(count);
        self.next.store(rounds.start, Ordering::Relaxed);
        let work = || -> Result<()> {
            loop {
                let number = self.next.fetch_add(1, Ordering::Relaxed);
                if number >= rounds.end {
                    return Ok(());
                }
                if let Err(error) = self.round(number) {
                    // No more of them: the others would most likely meet with the same.
                    self.next.store(rounds.end, Ordering::Relaxed);
                    return Err(error.context(format!("round {number} of seed {}", self.seed)));
                }
            }
        };
        let ends = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.options.jobs).map(|_| scope.spawn(work)).collect();
            let join = |worker: std::thread::ScopedJoinHandle<'_, _>| {
                worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            workers.into_iter().map(join).collect::<Vec<Result<()>>>()
        });
        lock(&self.free).clear();
        let good = lock(&self.report).end(self.seed, &self.logs);
        ends.into_iter().collect::<Result<()>>()?;
        Ok(good)
    }

    fn round(&self, number: u64) -> Result<()> {
        let mut plan = RoundPlan::new(self.seed, number, self.kvm);
        plan.hosts.unit = match self.options.user {
            User::Root => false,
            User::Unit => true,
            User::Both => plan.hosts.unit,
        };
        let started = Instant::now();
        let mut rig = self.hosts(plan.hosts)?;
        let outcome = TortureRound::begin(&mut rig, &plan)?.play()?;
        let verdict = outcome.facts.judge();
        if verdict.faults.is_empty() {
            lock(&self.free).push((plan.hosts, rig));
        } else {
            // What is left of it could disturb other rounds, so these hosts serve no more.
            self.keep(&plan, &rig, &outcome, &verdict)?;
        }
        lock(&self.report).add(self.seed, &plan, &outcome.facts, &verdict, started.elapsed());
        Ok(())
    }

    /// Hosts of this kind: some that have served before, or new ones.
    fn hosts(&self, kind: HostsKind) -> Result<Rig> {
        let free = {
            let mut free = lock(&self.free);
            free.iter().position(|(of_kind, _)| *of_kind == kind).map(|at| free.swap_remove(at).1)
        };
        if let Some(rig) = free {
            return Ok(rig);
        }
        let lab = LabOptions {
            ports: 2,
            port_rate: Some(Rate::from_bits_per_second(PORT_RATE)),
            control_delay: kind.far.then_some(FAR),
            ..LabOptions::default()
        };
        let options = RigOptions {
            lab,
            // Who hangs is given up soon, since others wait for that.
            tables: "[limits]\nsilence = \"2s\"\n".into(),
            daemon_user: if kind.unit { DaemonUser::Unit } else { DaemonUser::Root },
            environment: vec![("MEMLANE_LOG".to_owned(), LOG.to_owned())],
            ..RigOptions::default()
        };
        Rig::new(&self.programs, options).context("making two hosts")
    }

    fn keep(
        &self,
        plan: &RoundPlan,
        rig: &Rig,
        outcome: &RoundOutcome,
        verdict: &RoundVerdict,
    ) -> Result<()> {
        let folder = self.logs.join(plan.round.to_string());
        keep(&folder, plan, rig, outcome, verdict)
            .with_context(|| format!("keeping logs in {}", folder.display()))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is whole between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
