//! A guest that runs nothing but its firmware.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memlane_lab::linux::Accelerator;
use memlane_lab::qmp::Monitor;
use memlane_lab::{Host, HostId, Lab, Process, QEMU, wait_for};

use super::{Migration, Moved, Way};
use crate::baseline::memory::MemoryState;
use crate::cpu::Meter;

/// Memory in which firmware goes on writing, such as its clock.
const LOW_MEMORY: usize = 1 << 20;
/// Bytes that are compared at once.
const PIECE: usize = 1 << 20;
/// Firmware that keeps a processor busy for less than this waits for nothing but a disk.
const QUIET: f64 = 0.1;
/// How long it is watched for that.
const WATCH: Duration = Duration::from_millis(200);
/// Longest wait for it, on a processor that may be emulated.
const BOOT: Duration = Duration::from_secs(60);

/// A guest whose memory holds what it was given, but for the little that its firmware has written. It is moved from a
/// file on tmpfs that stays, so that it can be moved again.
#[derive(Debug)]
pub struct Firmware {
    memory: PathBuf,
    bytes: usize,
}

/// One QEMU.
struct End {
    process: Process,
    monitor: Monitor,
}

impl Firmware {
    /// A guest on host A of `lab` with `contents` as its memory.
    ///
    /// # Errors
    ///
    /// If there is not so much memory.
    pub fn new(lab: &Lab, contents: &[u8]) -> Result<Self> {
        let memory = lab.host(HostId::A).memory_directory().join("firmware");
        fs::write(&memory, contents).with_context(|| format!("writing {}", memory.display()))?;
        Ok(Self { memory, bytes: contents.len() })
    }

    /// Starts the guest in the same lab, has QEMU move it over the first port to host B, into memory in the state `destination`, and
    /// compares what arrived.
    ///
    /// The memory that it moves from is always there and mapped, as that of a guest which has run.
    ///
    /// # Errors
    ///
    /// If QEMU refuses or fails, or the guest's memory is not what it was.
    pub fn migrate(&self, lab: &Lab, way: Way, destination: MemoryState) -> Result<Moved> {
        let copy = lab.host(HostId::B).memory_directory().join("firmware");
        let _removed = Removed(&copy);
        let mut source =
            self.start(lab, HostId::A, &self.memory, true).context("starting the source's QEMU")?;
        source.await_quiet()?;
        let prealloc = destination == MemoryState::Prepared;
        let mut destination =
            self.start(lab, HostId::B, &copy, prealloc).context("starting the destination's QEMU")?;
        let meter = Meter::new([source.process.pid(), destination.process.pid()])?;
        let migration =
            Migration { source: &mut source.monitor, destination: &mut destination.monitor, meter };
        let moved = migration.by_qemu(way, lab.host(HostId::B).ports()[0].address)?;
        destination.process.kill()?;
        source.process.kill()?;
        // Of low memory a part is empty, or none.
        let least = self.bytes.saturating_sub(2 * LOW_MEMORY) as u64;
        ensure!(moved.ram_bytes >= least, "QEMU has sent {} bytes only", moved.ram_bytes);
        compare(&self.memory, &copy)?;
        Ok(moved)
    }

    fn start(&self, lab: &Lab, id: HostId, memory: &Path, prealloc: bool) -> Result<End> {
        let host = lab.host(id);
        let socket = host.directory().join("firmware.qmp");
        let mut command = host.command(QEMU);
        command.args(self.arguments(host, memory, prealloc, &socket));
        if id == HostId::B {
            command.args(["-incoming", "defer"]);
        }
        let mut process = host.spawn("firmware", command)?;
        let monitor = Monitor::connect_while(&socket, || process.is_running());
        Ok(End { monitor: monitor.with_context(|| process.log_tail())?, process })
    }

    fn arguments(&self, host: &Host, memory: &Path, prealloc: bool, socket: &Path) -> Vec<String> {
        let (accelerator, _) = Accelerator::choose();
        let prealloc = if prealloc { "on" } else { "off" };
        let ram = format!(
            "memory-backend-file,id=ram0,share=on,size={},prealloc={prealloc},mem-path={}",
            self.bytes,
            memory.display()
        );
        let monitor = format!("unix:{},server=on,wait=off", socket.display());
        let (machine, size) = ("q35,memory-backend=ram0", format!("{}B", self.bytes));
        let mut arguments = vec!["-nodefaults", "-no-user-config", "-display", "none", "-machine", machine];
        arguments.extend(["-accel", accelerator.as_str(), "-m", &size, "-object", &ram, "-qmp", &monitor]);
        arguments.extend(["-name", host.name()]);
        arguments.into_iter().map(str::to_owned).collect()
    }
}

impl End {
    /// Waits until the firmware has found that there is nothing to boot.
    fn await_quiet(&mut self) -> Result<()> {
        let mut meter = Meter::new([self.process.pid()])?;
        wait_for("the firmware to wait for a disk", BOOT, || {
            let used = meter.idle(WATCH);
            (used.processes < QUIET * used.elapsed).then_some(())
        })
    }
}

/// A file that goes when nobody needs it any more.
struct Removed<'a>(&'a Path);

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        // It may never have been made; what is left goes with the lab.
        let _ = fs::remove_file(self.0);
    }
}

/// Compares the memory of both ends, but for what firmware goes on writing.
fn compare(source: &Path, destination: &Path) -> Result<()> {
    let open = |path: &Path| File::open(path).with_context(|| format!("opening {}", path.display()));
    let (mut source, mut destination) = (open(source)?, open(destination)?);
    let (mut here, mut there) = (vec![0; PIECE], vec![0; PIECE]);
    for at in (0..).step_by(PIECE) {
        let bytes = fill(&mut source, &mut here)?;
        ensure!(bytes == fill(&mut destination, &mut there)?, "the guest's memory has another size there");
        ensure!(
            at < LOW_MEMORY || here[..bytes] == there[..bytes],
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
