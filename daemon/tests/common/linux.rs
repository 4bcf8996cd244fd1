//! A real Linux in stock QEMU, on a network with a client that talks to it all the time.

use std::time::Duration;

use memlane_lab::linux::{Accelerator, Initramfs, Kernel, LinuxGuest};
use memlane_lab::{ClientSession, CtlOutput, GuestCounters, HostId, LabOptions, Requirement, RigOptions};
use rustix::process::Signal;
use serde_json::Value;

use super::{LIMITS, LONG, Stage, Tap, send_signal};

/// The guest boots on an emulated processor.
const BOOT: Duration = Duration::from_secs(180);

/// A Linux guest and its client.
pub(crate) struct Linux {
    /// What it is made of.
    pub guest: LinuxGuest,
    /// The client's connection, since the guest booted last.
    pub session: ClientSession,
    /// The guest's answers when it was looked at last.
    seen: GuestCounters,
}

impl Stage {
    /// As [`Stage::new`], for guests in QEMU.
    pub(crate) fn for_linux(test: &str, lab: LabOptions) -> Option<Self> {
        let lab = LabOptions { switch: true, ..lab };
        let options =
            RigOptions { lab, tables: LIMITS.into(), may_start_guests: true, ..RigOptions::default() };
        Self::with(test, Requirement::LAB_WITH_LINUX, options)
    }

    /// As [`Stage::tapped`], for guests in QEMU.
    pub(crate) fn tapped_for_linux(test: &str) -> Option<(Self, Tap)> {
        let mut stage = Self::for_linux(test, LabOptions::default())?;
        let tap = Tap::install(&mut stage);
        Some((stage, tap))
    }

    /// The parts of a Linux guest, 256 MiB with 32 MiB in use, changed by `change`.
    pub(crate) fn linux_guest(&self, change: impl FnOnce(&mut LinuxGuest)) -> LinuxGuest {
        let kernel = Kernel::obtain().unwrap();
        let directory = self.rig.lab().host(HostId::A).directory();
        let initramfs = Initramfs::build(&directory.join("initramfs"), &kernel).unwrap();
        let console = directory.join("console.log");
        let mut guest = LinuxGuest::new(kernel, initramfs, Accelerator::Tcg, console);
        (guest.ram, guest.working_set) = ("256MiB".parse().unwrap(), "32MiB".parse().unwrap());
        change(&mut guest);
        guest
    }

    /// A [`Stage::linux_guest`] that runs on host A.
    pub(crate) fn linux(&self, change: impl FnOnce(&mut LinuxGuest)) -> Linux {
        let guest = self.linux_guest(change);
        let file = self.rig.prepare_linux(&guest).unwrap();
        self.launch(HostId::A, file.to_str().unwrap());
        let session = ClientSession::open(self.rig.lab().lan(), guest.address, BOOT);
        let session = session.unwrap_or_else(|error| panic!("{error:#}: {}", last_words(&guest)));
        let seen = session.hear(LONG).unwrap();
        Linux { guest, session, seen }
    }

    /// Starts the guest of a guest file.
    pub(crate) fn launch(&self, id: HostId, file: &str) -> CtlOutput {
        let answer = self.rig.ctl(id, &["launch", file]).unwrap();
        assert_eq!(answer.code, 0, "{}", answer.text);
        answer
    }

    /// Orders guest `name` to move from host `from` to the other, and waits for the end.
    pub(crate) fn migrate_from(&self, from: HostId, name: &str, more: &[&str]) -> CtlOutput {
        let to = if from == HostId::A { "host-b" } else { "host-a" };
        let mut words = vec!["migrate", name, to, "--downtime-limit", "60s", "--min-bandwidth", "1mbit"];
        words.extend(more);
        self.rig.ctl(from, &words).unwrap()
    }

    /// The process of a guest's QEMU.
    pub(crate) fn qemu(&self, id: HostId, name: &str) -> u32 {
        let guest = self.rig.guest(id, name).unwrap().unwrap_or_else(|| panic!("{name} is not there"));
        guest["pid"].as_u64().unwrap() as u32
    }

    /// Kills a guest's QEMU, and waits until its daemon has noticed.
    pub(crate) fn kill_qemu(&self, id: HostId, name: &str) {
        send_signal(self.qemu(id, name), Signal::KILL);
        self.wait_for_absence(id, name);
    }

    /// Waits until a host's daemon knows no guest of this name.
    pub(crate) fn wait_for_absence(&self, id: HostId, name: &str) {
        let absent = || self.rig.guest(id, name).unwrap().is_none().then_some(());
        memlane_lab::wait_for("a guest's end", LONG, absent).unwrap();
    }
}

impl Linux {
    /// The guest answers on the connection that it has had all the time, goes on with its work, and has found all
    /// its memory as it ought to be.
    #[track_caller]
    pub(crate) fn assert_runs(&mut self) {
        let now = self.session.hear(LONG).unwrap();
        assert_eq!(now.failures, 0, "the guest found its memory changed: {now:?}");
        assert_eq!(now.boot_id, self.seen.boot_id, "the guest has booted again");
        let goes_on = || {
            let later = self.session.hear(LONG).ok()?;
            (later.passes > now.passes && later.uptime > now.uptime).then_some(later)
        };
        self.seen = memlane_lab::wait_for("the guest to check its memory", LONG, goes_on).unwrap();
        assert_eq!(self.seen.failures, 0, "the guest found its memory changed: {:?}", self.seen);
    }

    /// Has the guest check all of its memory.
    pub(crate) fn assert_whole(&self, stage: &Stage) {
        let checked = GuestCounters::ask(stage.rig.lab().lan(), self.guest.address, "check").unwrap();
        assert_eq!(checked.failures, 0, "{checked:?}");
    }

    /// The guest moves from host `from` to the other, whole.
    #[track_caller]
    pub(crate) fn assert_moves(&mut self, stage: &Stage, from: HostId) -> Value {
        self.assert_moves_with(stage, from, &["--verify"])
    }

    /// The same, as `more` wants it.
    #[track_caller]
    pub(crate) fn assert_moves_with(&mut self, stage: &Stage, from: HostId, more: &[&str]) -> Value {
        let answer = stage.migrate_from(from, &self.guest.name, more);
        assert_eq!(answer.code, 0, "{}", answer.text);
        self.assert_runs();
        stage.wait_for_absence(from, &self.guest.name);
        stage.wait_for_end(&self.guest.name);
        answer.last().unwrap().clone()
    }

    /// The guest has booted again: its client has to connect anew.
    pub(crate) fn assert_booted_again(&mut self, stage: &Stage) {
        let before = self.seen.boot_id.clone();
        let opened = memlane_lab::wait_for("the guest to boot again", BOOT, || {
            let session = ClientSession::open(stage.rig.lab().lan(), self.guest.address, BOOT).ok()?;
            let seen = session.hear(LONG).ok()?;
            (seen.boot_id != before).then_some((session, seen))
        });
        (self.session, self.seen) =
            opened.unwrap_or_else(|error| panic!("{error:#}: {}", last_words(&self.guest)));
        self.assert_runs();
    }
}

/// The end of what a guest has printed.
fn last_words(guest: &LinuxGuest) -> String {
    let printed = std::fs::read(&guest.console).unwrap_or_default();
    let end = &printed[printed.len().saturating_sub(3000)..];
    format!("the guest's console ends with\n{}", String::from_utf8_lossy(end))
}
