//! A guest that runs nothing but its firmware.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memlane_lab::{HostId, Lab, wait_for};

use super::machine::{QemuSetup, Removed, RunningQemu, compare};
use super::{QemuMethod, QemuMove, QemuPair, files, tls};
use crate::baseline::memory::{MemoryState, warm_up};
use crate::cpu::Meter;

/// The size of the memory in which firmware goes on writing, such as its clock, in bytes.
const LOW_MEMORY: usize = 1 << 20;
/// The share of a processor below which firmware is idle, and waits only for a disk.
const QUIET: f64 = 0.1;
/// The time for which the firmware's use of the processor is measured.
const WATCH: Duration = Duration::from_millis(200);
/// The longest wait for the firmware to become idle, on a processor that may be emulated.
const BOOT: Duration = Duration::from_secs(60);

/// A guest whose memory has the contents that it was given, except for the little that its firmware has written. It is
/// moved from a file on tmpfs that stays, so that it can be moved again.
#[derive(Debug)]
pub struct Firmware {
    memory: PathBuf,
    bytes: usize,
}

impl Firmware {
    /// Makes a guest on host A of `lab` with so many bytes of memory, which cannot be compressed.
    ///
    /// # Errors
    ///
    /// If there is not so much memory.
    pub fn new(lab: &Lab, bytes: usize) -> Result<Self> {
        let host = lab.host(HostId::A);
        let memory = host.memory_directory().join("firmware");
        files::fill(host, &memory, bytes)?;
        tls::write_keys(lab)?;
        Ok(Self { memory, bytes })
    }

    /// Starts the guest in the same lab, has QEMU move it over the first port to host B, into memory in the state `destination`, and
    /// compares what arrived.
    ///
    /// The memory that it moves from is always there and mapped, as that of a guest which has run.
    ///
    /// # Errors
    ///
    /// If QEMU refuses or fails, or the guest's memory is not what it was.
    pub fn migrate(&self, lab: &Lab, way: QemuMethod, destination: MemoryState) -> Result<QemuMove> {
        let copy = lab.host(HostId::B).memory_directory().join("firmware");
        let _removed = Removed(lab.host(HostId::B), &copy);
        let machine = |id, memory, prealloc| {
            let host = lab.host(id);
            let machine = QemuSetup { memory, bytes: self.bytes, prealloc, incoming: id == HostId::B };
            let mut command = machine.command(host);
            if let QemuMethod::MultifdTls(_) = way {
                command.args(["-object", &tls::object(host, id == HostId::B)]);
            }
            RunningQemu::start(host, "firmware", command)
        };
        let mut source = machine(HostId::A, &self.memory, true).context("starting the source's QEMU")?;
        await_quiet(lab, &source)?;
        let prealloc = destination == MemoryState::Prepared;
        let mut destination =
            machine(HostId::B, &copy, prealloc).context("starting the destination's QEMU")?;
        let processes = [(HostId::A, source.process.pid()), (HostId::B, destination.process.pid())];
        let meter = Meter::on(lab, processes)?;
        let migration =
            QemuPair { source: &mut source.monitor, destination: &mut destination.monitor, meter };
        if !prealloc && !lab.is_remote() {
            warm_up(self.bytes as u64)?;
        }
        let moved = migration.by_qemu(way, lab.host(HostId::B).ports()[0].address)?;
        destination.process.kill()?;
        source.process.kill()?;
        // Of low memory a part is empty, or none.
        let least = self.bytes.saturating_sub(2 * LOW_MEMORY) as u64;
        ensure!(moved.ram_bytes >= least, "QEMU has sent {} bytes only", moved.ram_bytes);
        compare((lab.host(HostId::A), &self.memory), (lab.host(HostId::B), &copy), LOW_MEMORY)?;
        Ok(moved)
    }
}

/// Waits until the firmware has found that there is nothing to boot.
fn await_quiet(lab: &Lab, source: &RunningQemu) -> Result<()> {
    let mut meter = Meter::on(lab, [(HostId::A, source.process.pid())])?;
    wait_for("the firmware to wait for a disk", BOOT, || {
        let used = meter.idle(WATCH);
        (used.processes < QUIET * used.elapsed).then_some(())
    })
}
