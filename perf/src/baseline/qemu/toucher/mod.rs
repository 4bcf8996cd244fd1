//! A guest that reads its memory all the time, and notes how long it waits for it.
//!
//! It measures post-copy where it matters, and in the same way for each mover: by its own clock, from before it reads
//! a word until it has it. What of that took less than [`LEAST_WAIT`] was no wait for another host. Its only vCPU waits
//! for one page at a time, and reads the next one at once.

mod program;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use memlane_lab::{HostId, Lab, LabHost, Rig, wait_for};
use serde_json::json;

use super::machine::{QemuSetup, Removed, RunningQemu, compare};
use super::{QemuMethod, QemuMove, QemuPair, files};
use crate::cpu::Meter;

/// The shortest wait that counts. A read that takes less was of memory that was there. A page from another host takes
/// longer, and the host's own scheduler and interrupts mostly do not keep the guest waiting as long.
pub const LEAST_WAIT: Duration = Duration::from_micros(10);

/// Name of the guest.
const NAME: &str = "toucher";
/// Longest wait for firmware and program to start, on a processor that may be emulated.
const BOOT: Duration = Duration::from_secs(60);
/// The time that the guest reads before it is moved.
const WARM_UP: Duration = Duration::from_secs(1);
/// Longest wait for either end to notice that all is over.
const PATIENCE: Duration = Duration::from_secs(60);
/// The time for which the clock of the processor is measured.
const CLOCK: Duration = Duration::from_millis(100);

/// The guest. It is moved from a file on tmpfs that stays, so that it can be moved again.
#[derive(Debug)]
pub struct Toucher {
    memory: PathBuf,
    image: PathBuf,
    bytes: usize,
    /// The number of ticks of the guest's clock in a second. They are those of the processor.
    ticks: f64,
}

/// The program that moves the guest, by post-copy at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PostcopyMover {
    /// The daemons move it.
    Daemons,
    /// QEMU moves it by itself, with a connection of its own for the pages that the guest waits for.
    Qemu,
}

/// The result of a move of the guest.
#[derive(Debug, Clone)]
pub struct Touched {
    /// The figures of the move.
    pub moved: QemuMove,
    /// Each wait of the guest at its destination, until its last page was there.
    pub waits: Vec<Duration>,
}

impl Toucher {
    /// Makes a guest on host A of `lab` with so many bytes of memory, which cannot be compressed.
    ///
    /// # Errors
    ///
    /// If there is not so much memory, or it is more than the guest can have.
    pub fn new(lab: &Lab, bytes: usize) -> Result<Self> {
        ensure!(
            (2 * program::LOW_MEMORY..=program::MOST_MEMORY).contains(&bytes),
            "the guest that times its own reads can have from {} to {} MiB of memory, not {}; choose another --ram",
            (2 * program::LOW_MEMORY) >> 20,
            program::MOST_MEMORY >> 20,
            bytes >> 20
        );
        let host = lab.host(HostId::A);
        let memory = host.memory_directory().join(NAME);
        files::fill(host, &memory, bytes)?;
        let ticks = ticks_per_second();
        let image = host.directory().join("toucher.image");
        let program = program::image(bytes, (LEAST_WAIT.as_secs_f64() * ticks) as u32);
        fs::write(&image, program).with_context(|| format!("writing {}", image.display()))?;
        Ok(Self { memory, image, bytes, ticks })
    }

    /// Starts the guest in the same lab, has it moved to host B, and compares what arrived.
    ///
    /// # Errors
    ///
    /// If the move fails, or the guest's memory is not what it was.
    pub fn migrate(&self, rig: &Rig, shim: &Path, mover: PostcopyMover) -> Result<Touched> {
        let lab = rig.lab();
        let copy = lab.host(HostId::B).memory_directory().join(NAME);
        let _removed = Removed(lab.host(HostId::B), &copy);
        let memory =
            File::options().read(true).write(true).open(&self.memory).context("opening its memory")?;
        program::reset(&memory)?;
        let shim = (mover == PostcopyMover::Daemons).then_some(shim);
        let mut source =
            self.start(lab.host(HostId::A), &self.memory, shim).context("starting the source's QEMU")?;
        wait_for("the guest's program", BOOT, || match program::runs(&memory) {
            Ok(false) => None,
            other => Some(other),
        })??;
        let mut destination =
            self.start(lab.host(HostId::B), &copy, shim).context("starting the destination's QEMU")?;
        std::thread::sleep(WARM_UP);

        if mover == PostcopyMover::Daemons {
            attach(rig, HostId::A, &[])?;
            attach(rig, HostId::B, &["--incoming"])?;
        }
        let meter = Meter::new([source.process.pid(), destination.process.pid()])?;
        let mut migration =
            QemuPair { source: &mut source.monitor, destination: &mut destination.monitor, meter };
        let moved = match mover {
            // How long it stands still is not measured here.
            PostcopyMover::Daemons => {
                let order = ["--postcopy", "now", "--downtime-limit", "5s"];
                migration.by_daemons(rig, NAME, &order)?
            }
            PostcopyMover::Qemu => {
                migration.by_qemu(QemuMethod::Postcopy, lab.host(HostId::B).ports()[0].address)?
            }
        };
        // The source's copy stays as it was when the guest left.
        let left = program::waits(&memory)?;
        let arrived = File::open(&copy).with_context(|| format!("opening {}", copy.display()))?;
        let ticks = program::log(&arrived, left)?;
        let waits =
            ticks.iter().map(|ticks| Duration::from_secs_f64(f64::from(*ticks) / self.ticks)).collect();
        destination.monitor.execute("stop", json!({}))?;
        compare((lab.host(HostId::A), &self.memory), (lab.host(HostId::B), &copy), program::LOW_MEMORY)?;
        destination.process.kill()?;
        source.process.kill()?;
        if mover == PostcopyMover::Daemons {
            for id in [HostId::A, HostId::B] {
                wait_for("the daemon's notice of a QEMU's end", PATIENCE, || {
                    rig.guest(id, NAME).is_ok_and(|guest| guest.is_none()).then_some(())
                })?;
            }
        }
        Ok(Touched { moved, waits })
    }

    fn start(&self, host: &LabHost, memory: &Path, shim: Option<&Path>) -> Result<RunningQemu> {
        let incoming = memory != self.memory;
        let machine = QemuSetup { memory, bytes: self.bytes, prealloc: !incoming, incoming };
        let mut command = machine.command(host);
        command.args([OsStr::new("-kernel"), self.image.as_os_str()]);
        if let Some(shim) = shim {
            let socket = monitor(host);
            // Of one before.
            let _ = fs::remove_file(&socket);
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
            command
                .env("LD_PRELOAD", shim)
                .env("MEMLANE_ATTACH_SOCKET", host.directory().join("attach.sock"));
        }
        RunningQemu::start(host, NAME, command)
    }
}

/// Returns the socket at which the guest's QEMU listens for the daemon.
fn monitor(host: &LabHost) -> PathBuf {
    host.directory().join("toucher.daemon")
}

/// Makes a daemon take the guest's QEMU.
fn attach(rig: &Rig, id: HostId, more: &[&str]) -> Result<()> {
    let socket = monitor(rig.lab().host(id));
    let socket = socket.to_str().context("a path that is no UTF-8")?;
    let answer = rig.ctl(id, &[&["attach", "--name", NAME, "--qmp", socket], more].concat())?;
    ensure!(answer.code == 0, "memlanectl attach: {}", answer.text.trim());
    Ok(())
}

/// Measures how many ticks the processor's clock makes in a second.
fn ticks_per_second() -> f64 {
    // SAFETY: every x86-64 has the instruction, and Linux lets programs use it.
    let now = || unsafe { std::arch::x86_64::_rdtsc() };
    let (start, from) = (Instant::now(), now());
    std::thread::sleep(CLOCK);
    (now() - from) as f64 / start.elapsed().as_secs_f64()
}
