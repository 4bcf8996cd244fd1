//! A QEMU with nothing but a processor and memory, which is a file.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use memlane_lab::linux::Accelerator;
use memlane_lab::qmp::Monitor;
use memlane_lab::{Host, Process, QEMU};

/// Bytes that are compared at once.
const PIECE: usize = 1 << 20;

/// What a QEMU is made of.
pub(super) struct Machine<'a> {
    /// The file that is its memory.
    pub(super) memory: &'a Path,
    /// How large that is.
    pub(super) bytes: usize,
    /// Whether QEMU takes all of it from the system when it starts.
    pub(super) prealloc: bool,
    /// Whether it waits for a guest.
    pub(super) incoming: bool,
}

/// A QEMU that runs.
pub(super) struct End {
    pub(super) process: Process,
    /// The harness's own monitor of it.
    pub(super) monitor: Monitor,
}

/// A file that goes when nobody needs it any more.
pub(super) struct Removed<'a>(pub(super) &'a Path);

impl Machine<'_> {
    /// What starts it on `host`.
    pub(super) fn command(&self, host: &Host) -> Command {
        let (accelerator, _) = Accelerator::choose();
        let prealloc = if self.prealloc { "on" } else { "off" };
        let ram = format!(
            "memory-backend-file,id=ram0,share=on,size={},prealloc={prealloc},mem-path={}",
            self.bytes,
            self.memory.display()
        );
        let size = format!("{}B", self.bytes);
        let mut command = host.command(QEMU);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-name", host.name()]);
        command.args(["-machine", "q35,memory-backend=ram0", "-accel", accelerator.as_str()]);
        command.args(["-m", &size, "-object", &ram]);
        if self.incoming {
            command.args(["-incoming", "defer"]);
        }
        command
    }
}

impl End {
    /// Starts `command` on `host`, with a monitor for the harness.
    ///
    /// # Errors
    ///
    /// If QEMU does not come up; the end of its log is in the error.
    pub(super) fn start(host: &Host, name: &str, mut command: Command) -> Result<Self> {
        let socket = host.directory().join(format!("{name}.harness"));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        let mut process = host.spawn(name, command)?;
        let monitor = Monitor::connect_while(&socket, || process.is_running());
        Ok(Self { monitor: monitor.with_context(|| process.log_tail())?, process })
    }
}

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        // It may never have been made; what is left goes with the lab.
        let _ = fs::remove_file(self.0);
    }
}

/// Compares the memory of both ends, but for the `low` memory that the guest goes on writing.
///
/// # Errors
///
/// If they differ.
pub(super) fn compare(source: &Path, destination: &Path, low: usize) -> Result<()> {
    let open = |path: &Path| File::open(path).with_context(|| format!("opening {}", path.display()));
    let (mut source, mut destination) = (open(source)?, open(destination)?);
    let (mut here, mut there) = (vec![0; PIECE], vec![0; PIECE]);
    for at in (0..).step_by(PIECE) {
        let bytes = fill(&mut source, &mut here)?;
        ensure!(bytes == fill(&mut destination, &mut there)?, "the guest's memory has another size there");
        ensure!(
            at < low || here[..bytes] == there[..bytes],
            "the guest's memory differs at the destination, somewhere in the MiB at {at:#x}"
        );
        if bytes < PIECE {
            break;
        }
    }
    Ok(())
}

/// Reads until `piece` is full or the file ends.
fn fill(file: &mut File, piece: &mut [u8]) -> Result<usize> {
    let mut read = 0;
    while read < piece.len() {
        match file.read(&mut piece[read..]).context("reading a guest's memory")? {
            0 => break,
            bytes => read += bytes,
        }
    }
    Ok(read)
}
