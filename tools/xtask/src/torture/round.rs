//! Carrying out a round: a guest is ordered to move, things go wrong, and what comes of it is found out.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use memlane_lab::{HostId, Process, Rig, Vmm, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::api;
use super::judge::{DaemonFacts, Facts, Phase, Struck, VmmFacts};
use super::plan::{Blow, Moment, Plan, Strike, Victim, other};
use super::record::{self, History, Log, Standing};

/// Longest wait for a VMM to attach, on a machine that is busy with other things.
const START: Duration = Duration::from_secs(60);
/// From the last that went wrong until everything must be settled. Daemons ask each other every second.
const SETTLE: Duration = Duration::from_secs(60);
/// Longest wait for a VMM's answer, and for a guest to do a step.
const ANSWER: Duration = Duration::from_secs(20);
/// How often VMMs' histories are looked at: no oftener than what is to be hit needs.
const LOOK: Duration = Duration::from_micros(300);
/// How often daemons are asked.
const ASK: Duration = Duration::from_millis(25);

/// A round under way.
pub struct Round<'a> {
    rig: &'a mut Rig,
    plan: &'a Plan,
    name: String,
    /// At the source, and at the destination.
    vmms: [Vmm; 2],
    histories: [PathBuf; 2],
    logs: [Log; 2],
    order: Order,
    /// When a daemon that was killed is started again.
    restart: [Option<Instant>; 2],
    /// When a victim that was stopped goes on, as [`Victim::ALL`] has them.
    go_on: [Option<Instant>; 4],
    /// Strikes yet to be made, and since when the first of them may be waited for.
    strikes: Vec<Strike>,
    since: Option<Instant>,
    /// When something went wrong last, or was put right.
    last: Instant,
    facts: Facts,
}

/// `memlanectl migrate`.
struct Order {
    child: Option<Child>,
    given: Instant,
    exit: Option<i32>,
    text: String,
}

/// What came of a round.
pub struct Outcome {
    /// All that is known.
    pub facts: Facts,
    /// What `memlanectl migrate` printed.
    pub told: String,
    /// Files that tell more.
    pub files: Vec<PathBuf>,
    /// What the daemons logged meanwhile.
    pub logs: [String; 2],
}

impl<'a> Round<'a> {
    /// Starts the VMMs, and gives the order.
    ///
    /// # Errors
    ///
    /// If that fails before anything has gone wrong: it is no fault of what is tortured.
    pub fn begin(rig: &'a mut Rig, plan: &'a Plan) -> Result<Self> {
        let (name, ids) = (plan.name(), [plan.from, plan.to()]);
        let logs = [0, 1].map(|at| Log::from_now(rig.daemon(ids[at]).log().to_owned()));
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
        let order = Order::give(rig, plan.from, &words)?;
        let facts = Facts {
            postcopy: plan.mode.is_postcopy(),
            hosts: ids.map(|id| rig.lab().host(id).name().to_owned()),
            ..Facts::default()
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
    pub fn play(mut self) -> Result<Outcome> {
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
        let read = |log: &Log| log.read().unwrap_or_else(|error| format!("{error:#}\n"));
        let vmm_logs = self.vmms.each_mut().map(|vmm| vmm.process().log().to_owned());
        Ok(Outcome {
            told: std::mem::take(&mut self.order.text),
            files: self.histories.iter().chain(&vmm_logs).cloned().collect(),
            logs: [read(&self.logs[0]), read(&self.logs[1])],
            facts: self.facts,
        })
    }

    fn id(&self, at: usize) -> HostId {
        [self.plan.from, self.plan.to()][at]
    }

    fn history(&self, at: usize) -> History {
        History::read(&self.histories[at])
    }

    /// Whether somebody is to come back by himself, or to be struck at a time that is known.
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
                Moment::Order => Some(self.order.given),
                Moment::Strike => Some(self.last).filter(|_| !self.facts.strikes.is_empty()),
                Moment::Paused => self.seen(0, Standing::Paused),
                Moment::Loaded => self.seen(1, Standing::Loaded),
                Moment::Running => self.seen(1, Standing::Running),
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

    fn seen(&self, at: usize, standing: Standing) -> Option<Instant> {
        self.history(at).since(standing).map(|_| Instant::now())
    }

    fn make(&mut self, strike: Strike) -> Result<()> {
        let Strike { victim, blow, .. } = strike;
        let phase = Phase::of(&self.history(0), &self.history(1), self.facts.postcopy);
        // Who is gone already is struck no more.
        let Some(process) = self.process(victim) else { return Ok(()) };
        let at = record::now();
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
        self.facts.strikes.push(Struck { victim, blow, phase, at, done: record::now() });
        self.last = Instant::now();
        Ok(())
    }

    /// A victim, while it lives.
    fn process(&mut self, victim: Victim) -> Option<&mut Process> {
        let process = match victim {
            Victim::SourceVmm => self.vmms[0].process(),
            Victim::DestinationVmm => self.vmms[1].process(),
            Victim::SourceDaemon if self.restart[0].is_none() => self.rig.daemon(self.plan.from),
            Victim::DestinationDaemon if self.restart[1].is_none() => self.rig.daemon(other(self.plan.from)),
            Victim::SourceDaemon | Victim::DestinationDaemon => return None,
        };
        process.is_running().then_some(process)
    }

    /// What is still under way, in a word, once nobody is away. Notes how the daemons see it.
    fn under_way(&mut self) -> Option<String> {
        for at in 0..2 {
            let host = self.facts.hosts[at].clone();
            let daemon = self.rig.daemon(self.id(at));
            if !daemon.is_running() {
                let text = format!("memlaned at {host} has ended by itself: {}", daemon.log_tail());
                self.facts.oddities.push(text);
                return Some("a daemon is gone".into());
            }
            match ask(self.rig, self.id(at), &self.name) {
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
            let stands = History::read(&self.histories[at]).last();
            let ended = !self.vmms[at].process().is_running();
            let done = match stands {
                _ if ended => standing.is_none(),
                Some(Standing::Running) => standing.as_deref() == Some("running"),
                Some(Standing::Incoming) => true,
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
            let runs = !ended && history.last() == Some(Standing::Running);
            let damage = if runs { examine(vmm).err().map(|error| format!("{error:#}")) } else { None };
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

    /// A guest that has come to no harm moves as well as ever, and what is left of the round is in nobody's way.
    fn move_again(&mut self) -> Result<()> {
        let Some(at) = self.facts.vmms.iter().position(|vmm| vmm.runs) else { return Ok(()) };
        let (at, left) = (self.id(at), 1 - at);
        let to = other(at);
        // Fails only if it has ended.
        let _ = self.vmms[left].process().kill();
        let gone = || ask(self.rig, to, &self.name).ok()?.standing.is_none().then_some(());
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
        let mut order = Order::give(self.rig, at, &words)?;
        let given = Instant::now();
        while !order.has_ended()? && given.elapsed() < SETTLE {
            std::thread::sleep(ASK);
        }
        order.give_up();
        let done =
            if order.exit == Some(0) { examine(&mut vmm) } else { Err(anyhow::anyhow!("{}", order.text)) };
        if let Err(error) = done {
            let code = order.exit;
            self.facts
                .oddities
                .push(format!("the guest cannot be moved again (exit code {code:?}): {error:#}"));
        }
        Ok(())
    }
}

impl Order {
    fn give(rig: &Rig, at: HostId, words: &[&str]) -> Result<Self> {
        let mut command = rig.ctl_command(at, &["--json"]);
        command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().context("running memlanectl")?;
        Ok(Self { child: Some(child), given: Instant::now(), exit: None, text: String::new() })
    }

    /// What it says is less than a pipe holds, so nobody need read it before.
    fn has_ended(&mut self) -> Result<bool> {
        let Some(child) = &mut self.child else { return Ok(true) };
        if child.try_wait().context("waiting for memlanectl")?.is_none() {
            return Ok(false);
        }
        let output = self.child.take().expect("it was there").wait_with_output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        self.text = text(&output.stdout) + &text(&output.stderr);
        self.exit = output.status.code();
        Ok(true)
    }

    /// Ends it, if it goes on.
    fn give_up(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Fails only if it has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Order {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// What a daemon says about guest `name`.
fn ask(rig: &Rig, id: HostId, name: &str) -> Result<DaemonFacts> {
    let socket = rig.api_socket(id);
    let list = |path: &str| match api::get(&socket, path)? {
        Value::Array(list) => Ok(list),
        other => bail!("{other} is no list"),
    };
    let migration = list("/v1/migrations")?.into_iter().rfind(|migration| migration["guest"] == name);
    let guest = list("/v1/guests")?.into_iter().find(|guest| guest["name"] == name);
    let standing = guest.and_then(|guest| guest["standing"].as_str().map(str::to_owned));
    Ok(DaemonFacts { migration, standing })
}

fn await_attached(rig: &Rig, id: HostId, name: &str, vmm: &mut Vmm) -> Result<()> {
    let attached = wait_for("a VMM to attach", START, || {
        let known = ask(rig, id, name).is_ok_and(|daemon| daemon.standing.is_some());
        (known || !vmm.process().is_running()).then_some(())
    });
    attached.with_context(|| vmm.process().log_tail())?;
    if !vmm.process().is_running() {
        bail!("memlane-vmm has ended: {}", vmm.process().log_tail());
    }
    Ok(())
}

/// The guest goes on, and its memory is what it must be.
fn examine(vmm: &mut Vmm) -> Result<()> {
    let mut session = vmm.session()?;
    session.set_patience(ANSWER)?;
    let before = session.stats().context("its VMM does not answer")?;
    let goes_on = || session.stats().ok().filter(|now| now["steps"] != before["steps"]);
    wait_for("the guest to do a step", ANSWER, goes_on)?;
    let report = session.verify().context("its VMM does not compare its memory")?;
    if report["equal"] != true {
        bail!("its memory is not what it must be: {report}");
    }
    Ok(())
}

fn signal(process: &Process, signal: Signal) {
    if let Some(pid) = Pid::from_raw(process.pid() as i32) {
        // Fails only if it has ended.
        let _ = kill_process(pid, signal);
    }
}
