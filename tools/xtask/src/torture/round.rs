//! A round: a guest is ordered to move, strikes are made, and the result is found out.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use memlane_lab::{GuestHistory, HostId, LabProcess, LabVmm, NotedState, Rig, time_now, wait_for};
use rustix::process::Signal;

use super::judge::{RoundFacts, RoundPhase, Struck, VmmFacts};
use super::plan::{Blow, RoundPlan, Strike, StrikeMoment, Victim};
use crate::common::ask::{DaemonFacts, START, ask_daemon, await_attached, examine};
use crate::common::order::MigrateCommand;
use crate::common::record::{self, DaemonLog};
use crate::common::signal::signal;

/// The time from the last strike until everything must be settled. Daemons ask each other every second.
const SETTLE: Duration = Duration::from_secs(60);
/// The time between two looks at the VMMs' histories. It is no shorter than the moments that are to be hit need.
const LOOK: Duration = Duration::from_micros(300);
/// Longest wait for a VMM's answer, and for a guest to do a step.
const ANSWER: Duration = Duration::from_secs(20);
/// The time between two questions to the daemons.
const ASK: Duration = Duration::from_millis(25);

/// A round under way.
pub(crate) struct TortureRound<'a> {
    rig: &'a mut Rig,
    plan: &'a RoundPlan,
    name: String,
    /// The VMMs at the source and at the destination.
    vmms: [LabVmm; 2],
    histories: [PathBuf; 2],
    logs: [DaemonLog; 2],
    order: MigrateCommand,
    /// The times when daemons that were killed are started again.
    restart: [Option<Instant>; 2],
    /// The times when victims that were stopped continue, in the order of [`Victim::ALL`].
    go_on: [Option<Instant>; 4],
    /// The strikes that are still to be made. The first of them is waited for since `since`.
    strikes: Vec<Strike>,
    since: Option<Instant>,
    /// The time of the last strike or of the last repair.
    last: Instant,
    facts: RoundFacts,
}

/// The result of a round.
pub(crate) struct RoundOutcome {
    /// All that is known about the round.
    pub facts: RoundFacts,
    /// The output of `memlanectl migrate`.
    pub told: String,
    /// The files that say more.
    pub files: Vec<PathBuf>,
    /// The logs of the daemons during the round.
    pub logs: [String; 2],
}

impl<'a> TortureRound<'a> {
    /// Starts the VMMs, and gives the order.
    ///
    /// # Errors
    ///
    /// If that fails before anything has gone wrong: it is no fault of what is tortured.
    pub(crate) fn begin(rig: &'a mut Rig, plan: &'a RoundPlan) -> Result<Self> {
        let (name, ids) = (plan.name(), [plan.from, plan.to()]);
        let logs = [0, 1].map(|at| DaemonLog::from_now(rig.daemon(ids[at]).log().to_owned()));
        let histories = ids.map(|id| rig.lab().host(id).directory().join(format!("{name}.history")));
        let mut start = |at: usize| {
            let mut arguments = plan.guest_arguments();
            arguments.extend(["--history".to_owned(), histories[at].display().to_string()]);
            if at == 1 {
                arguments.push("--incoming".to_owned());
            }
            rig.start_vmm_unattended(ids[at], &name, &arguments)
        };
        let mut vmms = [start(0)?, start(1)?];
        for (vmm, id) in vmms.iter_mut().zip(ids) {
            await_attached(rig, id, &name, vmm)?;
        }
        let mut words = vec!["migrate", &name, rig.lab().host(plan.to()).name()];
        words.extend(plan.order_arguments());
        let order = MigrateCommand::give(rig, plan.from, &words)?;
        let facts = RoundFacts {
            postcopy: plan.mode.is_postcopy(),
            hosts: ids.map(|id| rig.lab().host(id).name().to_owned()),
            ..RoundFacts::default()
        };
        Ok(Self {
            rig,
            plan,
            name,
            vmms,
            histories,
            logs,
            last: order.given,
            order,
            restart: [None; 2],
            go_on: [None; 4],
            strikes: plan.strikes.clone(),
            since: None,
            facts,
        })
    }

    /// Lets everything go wrong that is to, until all is settled, and finds out what has become of it.
    ///
    /// # Errors
    ///
    /// If the harness itself fails.
    pub(crate) fn play(mut self) -> Result<RoundOutcome> {
        let mut ask_at = Instant::now();
        loop {
            self.put_right()?;
            let due = self.strike()?;
            let ended = self.order.has_ended()?;
            if Instant::now() >= ask_at && !self.anybody_away() && !due {
                let under_way = match self.under_way() {
                    _ if !ended => Some("memlanectl migrate goes on".to_owned()),
                    found => found,
                };
                if under_way.is_none() {
                    break; // what has not come by now will not come
                }
                if self.last.elapsed() > SETTLE || !self.facts.oddities.is_empty() {
                    self.facts.unsettled = under_way;
                    break;
                }
                ask_at = Instant::now() + ASK;
            }
            std::thread::sleep(LOOK);
        }
        self.find_out()?;
        if self.plan.again && self.facts.judge().faults.is_empty() {
            self.move_again()?;
        }
        let read = |log: &DaemonLog| log.read().unwrap_or_else(|error| format!("{error:#}\n"));
        let vmm_logs = self.vmms.each_mut().map(|vmm| vmm.process().log().to_owned());
        Ok(RoundOutcome {
            told: std::mem::take(&mut self.order.text),
            files: self.histories.iter().chain(&vmm_logs).cloned().collect(),
            logs: [read(&self.logs[0]), read(&self.logs[1])],
            facts: self.facts,
        })
    }

    fn id(&self, at: usize) -> HostId {
        [self.plan.from, self.plan.to()][at]
    }

    fn history(&self, at: usize) -> GuestHistory {
        GuestHistory::read(&self.histories[at])
    }

    /// Returns whether a victim is still to be started again or to continue.
    fn anybody_away(&self) -> bool {
        self.restart.iter().chain(&self.go_on).any(Option::is_some)
    }

    /// Starts and continues who has been away for long enough.
    fn put_right(&mut self) -> Result<()> {
        let now = Instant::now();
        for at in 0..2 {
            if self.restart[at].take_if(|when| *when <= now).is_some() {
                self.rig.start_daemon_unattended(self.id(at))?;
                self.last = now;
            }
        }
        for (at, victim) in Victim::ALL.into_iter().enumerate() {
            if self.go_on[at].take_if(|when| *when <= now).is_some() {
                if let Some(process) = self.process(victim) {
                    signal(process, Signal::CONT);
                }
                self.last = now;
            }
        }
        Ok(())
    }

    /// Makes the next strike if its time has come; says whether one is to come at a time that is known.
    fn strike(&mut self) -> Result<bool> {
        let Some(strike) = self.strikes.first().copied() else { return Ok(false) };
        if self.since.is_none() {
            let come = match strike.moment {
                StrikeMoment::Order => Some(self.order.given),
                StrikeMoment::Strike => Some(self.last).filter(|_| !self.facts.strikes.is_empty()),
                StrikeMoment::Paused => self.seen(0, NotedState::Paused),
                StrikeMoment::Loaded => self.seen(1, NotedState::Loaded),
                StrikeMoment::Running => self.seen(1, NotedState::Running),
            };
            self.since = come;
        }
        let Some(since) = self.since else { return Ok(false) };
        let wait = (since + strike.after).saturating_duration_since(Instant::now());
        if wait > LOOK {
            return Ok(true);
        }
        std::thread::sleep(wait);
        self.strikes.remove(0);
        self.since = None;
        self.make(strike)?;
        Ok(!self.strikes.is_empty())
    }

    fn seen(&self, at: usize, standing: NotedState) -> Option<Instant> {
        self.history(at).since(standing).map(|_| Instant::now())
    }

    fn make(&mut self, strike: Strike) -> Result<()> {
        let Strike { victim, blow, .. } = strike;
        let phase = RoundPhase::of(&self.history(0), &self.history(1), self.facts.postcopy);
        // Who is gone already is struck no more.
        let Some(process) = self.process(victim) else { return Ok(()) };
        let at = time_now();
        let which = usize::from(matches!(victim, Victim::DestinationDaemon | Victim::DestinationVmm));
        let index = Victim::ALL.iter().position(|one| *one == victim).expect("all of them are there");
        match blow {
            Blow::Stop(away) => {
                signal(process, Signal::STOP);
                self.go_on[index] = Some(Instant::now() + away);
            }
            Blow::Kill(away) => {
                process.kill().with_context(|| format!("killing the {}", victim.as_str()))?;
                self.go_on[index] = None;
                if victim.is_daemon() {
                    let id = self.id(which);
                    self.rig.stop_daemon(id)?;
                    self.restart[which] = Some(Instant::now() + away);
                }
            }
        }
        self.facts.strikes.push(Struck { victim, blow, phase, at, done: time_now() });
        self.last = Instant::now();
        Ok(())
    }

    /// A victim, while it lives.
    fn process(&mut self, victim: Victim) -> Option<&mut LabProcess> {
        let process = match victim {
            Victim::SourceVmm => self.vmms[0].process(),
            Victim::DestinationVmm => self.vmms[1].process(),
            Victim::SourceDaemon if self.restart[0].is_none() => self.rig.daemon(self.plan.from),
            Victim::DestinationDaemon if self.restart[1].is_none() => self.rig.daemon(self.plan.from.other()),
            Victim::SourceDaemon | Victim::DestinationDaemon => return None,
        };
        process.is_running().then_some(process)
    }

    /// Says in a few words what is still under way, once no victim is away, and notes what the daemons report.
    fn under_way(&mut self) -> Option<String> {
        for at in 0..2 {
            let host = self.facts.hosts[at].clone();
            let daemon = self.rig.daemon(self.id(at));
            if !daemon.is_running() {
                let text = format!("memlaned at {host} has ended by itself: {}", daemon.log_tail());
                self.facts.oddities.push(text);
                return Some("a daemon is gone".into());
            }
            match ask_daemon(self.rig, self.id(at), &self.name) {
                Ok(daemon) => self.facts.daemons[at] = daemon,
                Err(error) => return Some(format!("the daemon at {host}: {error:#}")),
            }
        }
        for at in 0..2 {
            let DaemonFacts { migration, standing } = &self.facts.daemons[at];
            let host = &self.facts.hosts[at];
            if let Some(migration) = migration
                && migration["outcome"].is_null()
            {
                let (phase, reason) = (&migration["phase"], &migration["reason"]);
                return Some(format!("{host} tells of a migration that is {phase} ({reason})"));
            }
            let stands = GuestHistory::read(&self.histories[at]).last();
            let ended = !self.vmms[at].process().is_running();
            let done = match stands {
                _ if ended => standing.is_none(),
                Some(NotedState::Running) => standing.as_deref() == Some("running"),
                Some(NotedState::Incoming) => true,
                _ => false,
            };
            if !done {
                let stands = if ended { None } else { stands };
                return Some(format!("the VMM at {host} is {stands:?}, and its daemon says {standing:?}"));
            }
        }
        None
    }

    /// Asks the VMMs, and reads what was written down.
    fn find_out(&mut self) -> Result<()> {
        for at in 0..2 {
            let history = self.history(at);
            let vmm = &mut self.vmms[at];
            let ended = !vmm.process().is_running();
            let runs = !ended && history.last() == Some(NotedState::Running);
            let damage =
                if runs { examine(vmm, ANSWER).err().map(|error| format!("{error:#}")) } else { None };
            self.facts.vmms[at] = VmmFacts { history, ended, runs, damage };
        }
        if self.facts.unsettled.is_some() {
            self.order.give_up();
        }
        self.facts.exit = self.order.exit;
        let logs = [self.logs[0].read()?, self.logs[1].read()?];
        self.facts.committed = record::first_action(&logs[0], &self.name, "Send(Commit)");
        self.facts.told_to_run = record::first_action(&logs[1], &self.name, "Resume");
        self.facts.seen_gone = record::seen_gone(&logs[1], &self.name);
        self.facts.whole = record::first_action(&logs[1], &self.name, "Send(Running)");
        if self.order.exit == Some(0) && self.facts.committed.is_none() {
            bail!(
                "a migration was completed, and its source's daemon logged no commit: has the log changed?"
            );
        }
        for log in &logs {
            self.facts.oddities.extend(record::panics(log));
        }
        for vmm in &mut self.vmms {
            let log = std::fs::read_to_string(vmm.process().log()).unwrap_or_default();
            self.facts.oddities.extend(record::panics(&log));
        }
        Ok(())
    }

    /// Checks that an unharmed guest can be moved again, and that what is left of the round does not prevent it.
    fn move_again(&mut self) -> Result<()> {
        let Some(at) = self.facts.vmms.iter().position(|vmm| vmm.runs) else { return Ok(()) };
        let (at, left) = (self.id(at), 1 - at);
        let to = at.other();
        // Fails only if it has ended.
        let _ = self.vmms[left].process().kill();
        let gone = || ask_daemon(self.rig, to, &self.name).ok()?.standing.is_none().then_some(());
        if wait_for("the daemon to forget a VMM", START, gone).is_err() {
            let host = self.rig.lab().host(to).name();
            self.facts.oddities.push(format!("{host} still has the guest's VMM, which has been killed"));
            return Ok(());
        }
        let mut arguments = self.plan.guest_arguments();
        arguments.push("--incoming".to_owned());
        let mut vmm = self.rig.start_vmm_unattended(to, &self.name, &arguments)?;
        await_attached(self.rig, to, &self.name, &mut vmm)?;
        let host = self.rig.lab().host(to).name().to_owned();
        let words = [
            "migrate",
            &self.name,
            &host,
            "--downtime-limit",
            "60s",
            "--min-bandwidth",
            "1mbit",
            "--converge",
            "auto",
        ];
        let mut order = MigrateCommand::give(self.rig, at, &words)?;
        let given = Instant::now();
        while !order.has_ended()? && given.elapsed() < SETTLE {
            std::thread::sleep(ASK);
        }
        order.give_up();
        let done = if order.exit == Some(0) {
            examine(&mut vmm, ANSWER)
        } else {
            Err(anyhow::anyhow!("{}", order.text))
        };
        if let Err(error) = done {
            let code = order.exit;
            self.facts
                .oddities
                .push(format!("the guest cannot be moved again (exit code {code:?}): {error:#}"));
        }
        Ok(())
    }
}
