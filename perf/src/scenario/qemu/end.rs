//! A QEMU with the Linux guest at one end of a move.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memlane_guest::qemu::definition::{BACKEND, Definition, Given};
use memlane_lab::linux::LinuxGuest;
use memlane_lab::qmp::Monitor;
use memlane_lab::{HostId, LabHost, LabProcess, Rig, wait_for};
use serde_json::json;

use super::mover::{Mover, PATIENCE};
use crate::cpu;

/// The time for which a QEMU is watched whose guest does not answer.
const WATCH: Duration = Duration::from_secs(2);

/// One end of a move: a QEMU that runs the guest or waits for it.
pub(super) struct QemuEnd {
    /// The process ID of the QEMU.
    pub(super) pid: u32,
    /// The harness's own monitor of the QEMU.
    pub(super) monitor: Monitor,
    /// The process, if the harness has started it and not a daemon. The harness kills it then.
    process: Option<LabProcess>,
}

impl QemuEnd {
    /// Starts a QEMU. The command line is the same for both movers, except for paths. A daemon starts it, or the
    /// harness for QEMU's own migration, and then maybe with `anonymous` memory. On host B it waits for the guest.
    pub(super) fn start(
        mover: Mover,
        rig: &Rig,
        guest: &LinuxGuest,
        anonymous: bool,
        id: HostId,
    ) -> Result<Self> {
        let host = rig.lab().host(id);
        let socket = host.open_directory().join("harness.qmp");
        // Of a QEMU before this one, which may have been another user's.
        remove(&socket)?;
        let monitor = format!("unix:{},server=on,wait=off", socket.display());
        let mut guest = guest.clone();
        guest.arguments.extend(["-qmp".to_owned(), monitor]);
        let incoming = id == HostId::B;
        let (pid, process) = match mover {
            Mover::Daemons => (launch(rig, &guest, id, incoming)?, None),
            Mover::Qemu(_) => {
                let process = spawn(host, &guest, anonymous, incoming)?;
                (process.pid(), Some(process))
            }
        };
        let monitor = Monitor::connect(&socket).with_context(|| match &process {
            Some(process) => process.log_tail(),
            None => format!("a QEMU that the daemon of {} has started", host.name()),
        })?;
        Ok(Self { pid, monitor, process })
    }

    /// Describes what the QEMU says that it does, and whether the guest's processor is busy.
    pub(super) fn doing(&mut self) -> Result<String> {
        let used = cpu::of_process(self.pid)?;
        std::thread::sleep(WATCH);
        let cpus = (cpu::of_process(self.pid)? - used) / WATCH.as_secs_f64();
        let status = self.monitor.execute("query-status", json!({}))?;
        Ok(format!("its QEMU says {} and keeps {cpus:.1} processors busy", status["status"]))
    }

    /// Ends the QEMU if it still runs, and waits until it and its memory are gone.
    pub(super) fn quit(mut self, rig: &Rig, guest: &LinuxGuest, id: HostId) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.kill()?;
            return remove(&memory(rig.lab().host(id), guest));
        }
        // Says nothing where the QEMU of a guest that has left is gone already.
        let _ = self.monitor.execute("quit", json!({}));
        wait_for("QEMU's end", PATIENCE, || cpu::of_process(self.pid).is_err().then_some(()))?;
        wait_for("the daemon's notice of it", PATIENCE, || {
            rig.guest(id, &guest.name).is_ok_and(|guest| guest.is_none()).then_some(())
        })
    }
}

/// Makes the daemon start a QEMU; returns its process ID.
fn launch(rig: &Rig, guest: &LinuxGuest, id: HostId, incoming: bool) -> Result<u32> {
    let file = rig.lab().host(id).directory().join(format!("{}.toml", guest.name));
    fs::write(&file, guest.file()).with_context(|| format!("writing {}", file.display()))?;
    let mut order = vec!["launch", file.to_str().context("a path that is no UTF-8")?];
    order.extend(incoming.then_some("--incoming"));
    let answer = rig.ctl(id, &order)?;
    ensure!(answer.code == 0, "the guest cannot be launched: {}", answer.text.trim());
    let pid = answer.last()?["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    pid.with_context(|| format!("no process of QEMU in {}", answer.text.trim()))
}

/// Starts a QEMU as a daemon would, without the shim.
fn spawn(host: &LabHost, guest: &LinuxGuest, anonymous: bool, incoming: bool) -> Result<LabProcess> {
    let memory = memory(host, guest);
    remove(&memory)?;
    let given = Given {
        memory: memory.display().to_string(),
        monitor: format!("path={}", host.directory().join("qmp").display()),
        taps: vec![format!("ifname={},script=no,downscript=no", guest.tap)],
    };
    let definition = Definition::parse(Path::new("the guest file"), &guest.file())?;
    let mut command = host.command(host.qemu());
    for argument in definition.command_line(&given, incoming) {
        let is_memory = argument.starts_with("memory-backend-file,");
        command.arg(if anonymous && is_memory { anonymous_memory(guest) } else { argument });
    }
    host.spawn("qemu", command)
}

/// Returns QEMU's option for memory that no other process can see.
fn anonymous_memory(guest: &LinuxGuest) -> String {
    let prealloc = if guest.prealloc { "on" } else { "off" };
    format!("memory-backend-ram,id={BACKEND},size={},prealloc={prealloc}", guest.ram.bytes())
}

fn memory(host: &LabHost, guest: &LinuxGuest) -> PathBuf {
    host.memory_directory().join(format!("{}.baseline", guest.name))
}

fn remove(file: &Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", file.display()))
        }
        _ => Ok(()),
    }
}
