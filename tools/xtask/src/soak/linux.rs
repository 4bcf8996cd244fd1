//! A guest that runs a real Linux in stock QEMU, whose program checks its memory. A client talks to it all the time.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memlane_lab::linux::{Accelerator, Initramfs, Kernel, LinuxGuest};
use memlane_lab::{ClientSession, GuestCounters, HostId, Requirement, Rig, qemu, wait_for, why_not};

use crate::common::ask::{DaemonFacts, START};

/// Longest wait for the guest to boot, on a machine that is busy with other things.
const BOOT: Duration = Duration::from_secs(180);
/// The longest wait for an answer of a guest that has arrived: TCP waits longer and longer before it tries again.
const ANSWER: Duration = Duration::from_secs(60);

/// A Linux guest and its client.
pub(crate) struct SoakLinux {
    guest: LinuxGuest,
    session: ClientSession,
    /// The guest's answers when it was looked at last.
    seen: GuestCounters,
}

/// Gets QEMU and a kernel, unless they are there. Returns why there can be no Linux guest, if there can be none.
pub(crate) fn obtain() -> Option<String> {
    let obtained = qemu::obtain().and_then(|_| Kernel::obtain());
    obtained.err().map(|error| format!("{error:#}")).or_else(|| why_not(Requirement::LAB_WITH_LINUX))
}

impl SoakLinux {
    /// Boots the guest on host A, and waits until it talks.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub(crate) fn start(rig: &Rig, name: &str) -> Result<Self> {
        let kernel = Kernel::obtain()?;
        let directory = rig.lab().host(HostId::A).directory();
        let initramfs = Initramfs::build(&directory.join("initramfs"), &kernel)?;
        let (accelerator, _) = Accelerator::choose();
        let console = directory.join(format!("{name}.console"));
        let guest = LinuxGuest {
            name: name.to_owned(),
            ram: "256MiB".parse()?,
            working_set: "32MiB".parse()?,
            ..LinuxGuest::new(kernel, initramfs, accelerator, console)
        };
        let file = rig.prepare_linux(&guest)?;
        let file = file.to_str().context("the guest file's path is no UTF-8")?;
        let answer = rig.ctl(HostId::A, &["launch", file])?;
        ensure!(answer.code == 0, "{name} cannot be launched: {}", answer.text.trim());
        let session = ClientSession::open(rig.lab().lan(), guest.address, BOOT)
            .with_context(|| format!("{name} does not boot; its console is {}", guest.console.display()))?;
        let seen = session.hear(ANSWER)?;
        Ok(Self { guest, session, seen })
    }

    /// Says why what a daemon says about the guest is not what it is when nothing is under way.
    pub(crate) fn unsettled(&self, daemon: &DaemonFacts) -> Option<String> {
        let standing = daemon.standing.as_deref();
        let settled = standing.is_none_or(|standing| standing == "running");
        (!settled).then(|| format!("its daemon says {standing:?}"))
    }

    /// Says what is wrong with the number of QEMUs of the guest when nothing is under way: there is one, on one host.
    pub(crate) fn two_owners(&self, rig: &Rig) -> Option<String> {
        let mut found = Vec::new();
        // One that was told to end needs a moment.
        let one = wait_for("a QEMU to end", START, || {
            found = rig
                .lab()
                .hosts()
                .iter()
                .flat_map(|host| qemus(host.memory_directory(), &self.guest.name))
                .collect();
            (found.len() == 1).then_some(())
        });
        one.err().map(|_| format!("it has {} QEMUs: processes {found:?}", found.len()))
    }

    /// Checks that the guest still answers on the connection that it has had all the time, goes on with its work, and finds
    /// all of its memory as it must be.
    ///
    /// # Errors
    ///
    /// If that is not so.
    pub(crate) fn examine(&mut self, rig: &Rig) -> Result<()> {
        let now = self.session.hear(ANSWER)?;
        ensure!(now.failures == 0, "it found its memory changed: {now:?}");
        ensure!(now.boot_id == self.seen.boot_id, "it has booted again");
        let checked = GuestCounters::ask(rig.lab().lan(), self.guest.address, "check")?;
        ensure!(checked.failures == 0, "it found its memory changed: {checked:?}");
        ensure!(checked.passes > now.passes, "it has checked nothing: {checked:?} after {now:?}");
        self.seen = checked;
        Ok(())
    }

    /// Returns the files that say more about the guest.
    pub(crate) fn files(&self, rig: &Rig) -> Vec<PathBuf> {
        let log = |id| rig.lab().host(id).directory().join("guests").join(&self.guest.name).join("qemu.log");
        vec![self.guest.console.clone(), log(HostId::A), log(HostId::B)]
    }
}

/// Returns the processes that have a guest's memory file, in this directory, open.
fn qemus(memory: &std::path::Path, name: &str) -> Vec<u32> {
    let file = memory.join(format!("{name}.ram"));
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| is_qemu_of(*pid, &file)).collect()
}

fn is_qemu_of(pid: u32, file: &std::path::Path) -> bool {
    // The daemon has the file too, so the program counts.
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let is_qemu = program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("qemu-system"));
    let maps = || std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    is_qemu && maps().lines().any(|line| file.to_str().is_some_and(|file| line.contains(file)))
}
