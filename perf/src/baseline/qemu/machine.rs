//! A QEMU that has only a processor and memory, which is a file.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use memlane_lab::linux::Accelerator;
use memlane_lab::qmp::Monitor;
use memlane_lab::{LabHost, LabProcess};

use super::files;

/// The settings that a QEMU is started with.
pub(super) struct QemuSetup<'a> {
    /// The file that is its memory.
    pub(super) memory: &'a Path,
    /// The size of the memory, in bytes.
    pub(super) bytes: usize,
    /// Whether QEMU takes all of it from the system when it starts.
    pub(super) prealloc: bool,
    /// Whether it waits for a guest.
    pub(super) incoming: bool,
}

/// A QEMU that runs.
pub(super) struct RunningQemu {
    pub(super) process: LabProcess,
    /// The harness's own monitor of the QEMU.
    pub(super) monitor: Monitor,
}

/// A file of a host that is removed when this is dropped.
pub(super) struct Removed<'a>(pub(super) &'a LabHost, pub(super) &'a Path);

impl QemuSetup<'_> {
    /// Returns the command that starts the QEMU on `host`.
    pub(super) fn command(&self, host: &LabHost) -> Command {
        let processor = host.read("/proc/cpuinfo").unwrap_or_default();
        let (accelerator, _) = Accelerator::of(&processor, host.has_kvm());
        let prealloc = if self.prealloc { "on" } else { "off" };
        let ram = format!(
            "memory-backend-file,id=ram0,share=on,size={},prealloc={prealloc},mem-path={}",
            self.bytes,
            self.memory.display()
        );
        let size = format!("{}B", self.bytes);
        let mut command = host.command(host.qemu());
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-name", host.name()]);
        command.args(["-machine", "q35,memory-backend=ram0", "-accel", accelerator.as_str()]);
        command.args(["-m", &size, "-object", &ram]);
        if self.incoming {
            command.args(["-incoming", "defer"]);
        }
        command
    }
}

impl RunningQemu {
    /// Starts `command` on `host`, with a monitor for the harness.
    ///
    /// # Errors
    ///
    /// If QEMU does not come up; the end of its log is in the error.
    pub(super) fn start(host: &LabHost, name: &str, mut command: Command) -> Result<Self> {
        let socket = format!("{name}.harness");
        let path = host.directory().join(&socket);
        // Of one before.
        host.remove(&path);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", path.display()));
        let mut process = host.spawn(name, command)?;
        let monitor = host.monitor(&socket, || process.is_running());
        Ok(Self { monitor: monitor.with_context(|| process.log_tail())?, process })
    }
}

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        self.0.remove(self.1);
    }
}

/// Compares a file of each host, except for the `low` memory that the guest goes on writing.
///
/// # Errors
///
/// If they differ.
pub(super) fn compare(source: (&LabHost, &Path), destination: (&LabHost, &Path), low: usize) -> Result<()> {
    let (here, there) =
        (files::digests_on(source.0, source.1)?, files::digests_on(destination.0, destination.1)?);
    ensure!(here.len() == there.len(), "the guest's memory has another size there");
    let low = low / files::PIECE;
    let differs = here.iter().zip(&there).skip(low).position(|(here, there)| here != there);
    if let Some(piece) = differs {
        let at = (low + piece) * files::PIECE;
        bail!("the guest's memory differs at the destination, somewhere in the MiB at {at:#x}");
    }
    Ok(())
}
