//! What the end-to-end tests share: two hosts with daemons, guests that move between them, and
//! the proof that a guest has come to no harm.

#![allow(dead_code, unused_imports, reason = "every test binary uses its own part of it")]

mod activate;
pub(crate) mod boot_sector;
mod linux;
mod peer;
pub(crate) mod qemu;
pub(crate) mod secure;
mod tap;
pub(crate) mod wrapped;

use std::process::{Child, Output, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use memlane_api::client::Client;
use memlane_api::types::Migration;
use memlane_lab::{
    CtlOutput, HostId, LabOptions, LabProcess, LabVmm, Programs, Requirement, Rig, RigOptions, skip, wait_for,
};
use rustix::process::{Pid, Signal, kill_process};

pub(crate) use activate::activate;
pub(crate) use linux::Linux;
pub(crate) use peer::{
    Lane, Peer, announce, captured, connect, greet, hello, host_a, lane, lane_address, offered, ours, welcome,
};
pub(crate) use tap::Tap;

/// What most guests are made of: small, and busy enough to dirty pages in every round.
pub(crate) const GUEST: &str = "--ram 64MiB --working-set 8MiB --rate 2000 --vcpus 1";
/// Longest wait for anything, on a machine that is busy with other things.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// A peer that says nothing for so long is gone: short, since several tests wait for it.
pub(crate) const LIMITS: &str = "[limits]\nsilence = \"3s\"\npatience = \"3s\"\n";

/// What a daemon logs whose control thread was kept from its work (`memlane_net::task`).
const STOOD_STILL: &str = "the control thread stood still";

/// Two hosts with a daemon each. Only one test has its stage at a time, unless it has many.
pub(crate) struct Stage {
    pub rig: Rig,
    _alone: Option<MutexGuard<'static, ()>>,
}

/// `memlanectl` at work.
pub(crate) struct Order(Child);

impl Stage {
    /// `None`, with a line that says why, where something that it needs is missing.
    pub(crate) fn new(test: &str, lab: LabOptions) -> Option<Self> {
        let options = RigOptions { lab, tables: LIMITS.into(), ..RigOptions::default() };
        Self::with(test, Requirement::LAB_WITH_KVM, options)
    }

    /// As [`Stage::new`], and nothing is encrypted: for tests that speak for a daemon themselves.
    pub(crate) fn insecure(test: &str, lab: LabOptions) -> Option<Self> {
        let options = RigOptions { lab, tables: LIMITS.into(), insecure: true, ..RigOptions::default() };
        Self::with(test, Requirement::LAB_WITH_KVM, options)
    }

    /// `None`, with a line that says why, where something of `requirements` is missing.
    pub(crate) fn with(test: &str, requirements: &[Requirement], options: RigOptions) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        if skip(test, requirements) {
            return None;
        }
        // A test that failed leaves nothing behind that could disturb the next one.
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Self { rig: Rig::new(programs(), options).unwrap(), _alone: Some(alone) })
    }

    /// Returns one of many stages of the same test, whose daemons have their default limits.
    pub(crate) fn beside_others(lab: LabOptions) -> Self {
        let options = RigOptions { lab, insecure: true, ..RigOptions::default() };
        Self { rig: Rig::new(programs(), options).unwrap(), _alone: None }
    }

    /// As [`Stage::new`] with one port, and with a tap on the control connections.
    pub(crate) fn tapped(test: &str, lab: LabOptions) -> Option<(Self, Tap)> {
        let mut stage = Self::new(test, lab)?;
        let tap = Tap::install(&mut stage);
        Some((stage, tap))
    }

    /// A guest that runs on host A.
    pub(crate) fn guest(&mut self, name: &str) -> LabVmm {
        self.rig.start_vmm(HostId::A, name, &words(GUEST)).unwrap()
    }

    /// A VMM on host B that waits for a guest like [`Stage::guest`].
    pub(crate) fn receiver(&mut self, name: &str) -> LabVmm {
        self.rig.start_vmm(HostId::B, name, &words(&format!("{GUEST} --incoming"))).unwrap()
    }

    /// Orders guest `name` to move to host B, and waits for the end.
    pub(crate) fn migrate(&self, name: &str, more: &[&str]) -> CtlOutput {
        self.rig.ctl(HostId::A, &order(name, more)).unwrap()
    }

    /// Orders guest `name` to move to host B.
    pub(crate) fn begin(&self, name: &str, more: &[&str]) -> Order {
        let mut command = self.rig.ctl_command(HostId::A, &["--json"]);
        command.args(order(name, more)).stdin(Stdio::null());
        Order(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// Waits until a daemon's latest migration of guest `name` is as wanted.
    pub(crate) fn wait_until(
        &self,
        id: HostId,
        name: &str,
        what: &str,
        is: impl Fn(&Migration) -> bool,
    ) -> Migration {
        let latest = || self.migrations(id)?.into_iter().rfind(|migration| migration.guest == name);
        let found = wait_for(what, LONG, || latest().filter(|migration| is(migration)));
        found.unwrap_or_else(|error| panic!("{error}: {:#?}", latest()))
    }

    /// Waits until the latest migration of guest `name` has ended on both hosts.
    pub(crate) fn wait_for_end(&self, name: &str) {
        for id in [HostId::A, HostId::B] {
            self.wait_until(id, name, "the end of a migration", |migration| migration.outcome.is_some());
        }
    }

    /// Returns the migrations that a daemon knows, if it answers.
    pub(crate) fn migrations(&self, id: HostId) -> Option<Vec<Migration>> {
        let client = Client::new(self.rig.api_socket(id));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(client.migrations()).ok()
    }

    /// Waits until a daemon says that guest `name` is `standing`.
    pub(crate) fn wait_for_standing(&self, id: HostId, name: &str, standing: &str) {
        let guests = || self.rig.ctl(id, &["guests"]).ok().map(|answer| answer.text).unwrap_or_default();
        let found = wait_for("a guest's standing", LONG, || {
            let guests: serde_json::Value = serde_json::from_str(guests().lines().next()?).ok()?;
            let guest = guests.as_array()?.iter().find(|guest| guest["name"] == name)?.clone();
            (guest["standing"] == standing).then_some(())
        });
        found.unwrap_or_else(|error| panic!("{name} is not {standing}: {error}: {}", guests()));
    }

    /// The guest does its work on host A as if nothing had happened.
    pub(crate) fn assert_runs_on(&self, name: &str, vmm: &mut LabVmm) {
        self.wait_for_standing(HostId::A, name, "running");
        assert_runs(vmm);
    }

    /// Guest `name` moves to the VMM that waits for it, whole. Where an attempt has failed before,
    /// this shows too that its memory is tracked no more: a VMM that tracks refuses to begin to.
    pub(crate) fn assert_moves(&self, name: &str, there: &mut LabVmm) {
        self.wait_for_standing(HostId::A, name, "running");
        self.wait_for_standing(HostId::B, name, "incoming");
        let answer = self.migrate(name, &["--verify"]);
        assert_eq!(answer.code, 0, "{}", answer.text);
        assert_runs(there);
        self.wait_for_end(name);
    }

    /// Both a dry run and an order are refused, and both say `why`.
    pub(crate) fn assert_refused(&self, name: &str, more: &[&str], why: &[&str]) {
        for command in ["check", "migrate"] {
            let mut words = order(name, more);
            words[0] = command;
            let answer = self.rig.ctl(HostId::A, &words).unwrap();
            assert_eq!(answer.code, 3, "{command}: {}", answer.text);
            for why in why {
                assert!(answer.text.contains(why), "{command} does not say {why:?}: {}", answer.text);
            }
        }
    }

    /// Changes a host's configuration, and starts its daemon with it.
    pub(crate) fn reconfigure(&mut self, id: HostId, change: impl FnOnce(String) -> String) {
        let file = self.rig.config_file(id);
        let before = std::fs::read_to_string(&file).unwrap();
        let after = change(before.clone());
        assert_ne!(before, after, "the change found nothing to change");
        std::fs::write(&file, after).unwrap();
        self.rig.start_daemon(id).unwrap();
    }

    /// Everything that a host's daemon has logged.
    pub(crate) fn log(&mut self, id: HostId) -> String {
        std::fs::read_to_string(self.rig.daemon(id).log()).unwrap()
    }

    /// Waits until a host's daemon has logged `text`.
    pub(crate) fn wait_for_log(&mut self, id: HostId, text: &str) {
        let found = wait_for("a line in the log", LONG, || self.log(id).contains(text).then_some(()));
        found.unwrap_or_else(|error| panic!("{error}: {text:?} is not in {}", self.log(id)));
    }
}

impl Drop for Stage {
    /// Whatever a test is about, the daemons' control threads have never stood still.
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        for host in self.rig.lab().hosts() {
            let log = std::fs::read_to_string(host.directory().join("memlaned.log")).unwrap_or_default();
            let still: Vec<_> = log.lines().filter(|line| line.contains(STOOD_STILL)).collect();
            assert!(still.is_empty(), "on {}:\n{}", host.name(), still.join("\n"));
        }
    }
}

impl Order {
    /// Waits for its end, which comes within `limit`.
    pub(crate) fn end_within(self, limit: Duration) -> CtlOutput {
        let pid = self.0.id();
        // It is read meanwhile: it would wait for a reader of much that it says.
        let (done, ended) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            let output = self.0.wait_with_output().unwrap();
            let _ = done.send(());
            output
        });
        let late = ended.recv_timeout(limit).is_err();
        if late {
            send_signal(pid, Signal::KILL);
        }
        let output = reader.join().unwrap();
        assert!(
            !late,
            "an order has not ended within {limit:?}: {}",
            String::from_utf8_lossy(&output.stdout)
        );
        Self::said(output)
    }

    /// Waits for its end.
    pub(crate) fn end(self) -> CtlOutput {
        Self::said(self.0.wait_with_output().unwrap())
    }

    fn said(output: Output) -> CtlOutput {
        let stdout = String::from_utf8_lossy(&output.stdout);
        let json = stdout.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let text = format!("{stdout}{}", String::from_utf8_lossy(&output.stderr));
        CtlOutput { code: output.status.code().unwrap(), json, text }
    }

    /// Ends it with exit code `code`; what it says has all of `why`.
    pub(crate) fn expect(self, code: i32, why: &[&str]) -> CtlOutput {
        let answer = self.end();
        assert_eq!(answer.code, code, "{}", answer.text);
        for why in why {
            assert!(answer.text.contains(why), "{why:?} is not said: {}", answer.text);
        }
        answer
    }

    /// Sends a signal to `memlanectl`.
    pub(crate) fn signal(&self, signal: Signal) {
        send_signal(self.0.id(), signal);
    }
}

fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(|| Programs::build(false).unwrap())
}

/// The guest makes progress, and its memory is what it ought to be.
pub(crate) fn assert_runs(vmm: &mut LabVmm) {
    let before = vmm.stats().unwrap();
    assert_eq!(before["standing"], "running", "{before}");
    wait_for("the guest to go on", LONG, || (vmm.stats().unwrap()["steps"] != before["steps"]).then_some(()))
        .unwrap();
    let report = vmm.verify().unwrap();
    assert_eq!(report["equal"], true, "{report}");
}

/// Waits until a process has ended by itself.
pub(crate) fn wait_for_exit(process: &mut LabProcess) {
    let ended = process.wait_timeout(LONG).unwrap();
    assert!(ended.is_some(), "{} has not ended: {}", process.name(), process.log_tail());
}

/// Sends a signal to a process of the rig; one that is to stop has stopped when this returns.
pub(crate) fn signal(process: &LabProcess, signal: Signal) {
    send_signal(process.pid(), signal);
    if signal == Signal::STOP {
        wait_for("a process to stop", LONG, || has_stopped(process.pid()).then_some(())).unwrap();
    }
}

/// Whether none of a process's threads runs any more (state T in `proc(5)`).
fn has_stopped(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("stat"))).all(|stat| {
        // A thread that has ended meanwhile does not run either.
        stat.map_or(true, |stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
    })
}

fn send_signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).expect("no process has the number 0");
    kill_process(pid, signal).unwrap();
}

/// Arguments from a line.
pub(crate) fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// Limits that noise cannot break, unless `more` names others.
fn order<'a>(name: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut words = vec!["migrate", name, "host-b"];
    for (flag, value) in [("--downtime-limit", "60s"), ("--min-bandwidth", "1mbit")] {
        if !more.contains(&flag) {
            words.extend([flag, value]);
        }
    }
    words.extend(more);
    words
}
