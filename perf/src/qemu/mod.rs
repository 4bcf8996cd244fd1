//! Memlane beside QEMU's own migration: the same guest, on the same hosts and links, moved in turn by each.
//!
//! The guest is a Linux under stock QEMU that has filled a part of its memory with what cannot be compressed. Every
//! move is of a guest that has just booted, to a QEMU that was started beforehand. What is compared:
//!
//! - **total**: from the order to the event RESUME of the destination's QEMU;
//! - **downtime**: from the event STOP of the source's QEMU to that RESUME, both by QEMU's own account;
//! - **bytes**: what went over the ports for RAM, by the daemon's count or by QEMU's;
//! - **CPU**: user and system time of both QEMUs, of both daemons for Memlane, and of the kernel's threads for network
//!   packets, less what all of these used in the same time before the order, when the guest did the same.

mod moves;
mod report;
mod way;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use memlane_lab::linux::{Accelerator, Initramfs, Kernel, LinuxGuest};
use memlane_lab::{HostId, LabOptions, Programs, Rate, Rig, RigOptions, Size};

use moves::Outcome;
use report::Results;
pub use report::{Figures, QemuReport, Run, Settings};
use way::Way;

/// Longest wait for anything that is no part of a measurement.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest pause that the guest may see, in every way.
const DOWNTIME_LIMIT: Duration = Duration::from_millis(300);
/// All ways.
const WAYS: [Way; 3] = [Way::Memlane, Way::Plain, Way::Multifd(4)];
/// Moves of QEMU's own that may break the guest, in each way, before all is given up.
///
/// Under TCG they do: QEMUs before 9.0 overlook writes of a guest that goes on writing (QEMU commit 03bfc2188f06,
/// "physmem: Fix migration dirty bitmap coherency with TCG memory access"). Memlane does not ask TCG what was written.
const MOST_BROKEN: usize = 10;
/// Memory of the guest that its kernel needs for itself.
const LEAST_REST: u64 = 128 << 20;

/// What to measure.
#[derive(Args, Debug, Clone)]
pub struct QemuOptions {
    /// Memory of the guest
    #[arg(long, default_value = "1GiB")]
    pub ram: Size,
    /// Memory that the guest fills with what cannot be compressed [default: half of it]
    #[arg(long)]
    pub touched: Option<Size>,
    /// Pages of it that the guest writes anew each second; 0 for an idle guest
    #[arg(long, value_name = "PAGES_PER_S", default_value_t = 0)]
    pub dirty_rate: u64,
    /// Virtual CPUs of the guest
    #[arg(long, default_value_t = 1)]
    pub vcpus: u16,
    /// Ports between the two hosts; Memlane has a lane on each, and QEMU all its connections on the first
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub ports: u8,
    /// What each port carries, such as 1gbit; unlimited if not given
    #[arg(long)]
    pub port_rate: Option<Rate>,
    /// Take all RAM from the system when a QEMU starts, at both ends
    #[arg(long)]
    pub prealloc: bool,
    /// Give the guest anonymous memory, with transparent huge pages where the kernel has them, when QEMU moves it by
    /// itself; otherwise it has shared memory in a file on tmpfs then too, as Memlane needs it
    #[arg(long)]
    pub anonymous: bool,
    /// Moves in each way
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub repetitions: u32,
}

impl QemuOptions {
    fn touched(&self) -> Size {
        self.touched.unwrap_or_else(|| self.ram.part(2))
    }
}

/// Moves a guest in each way as often as `options` say, in turn.
///
/// # Errors
///
/// If a move fails, or the guest finds its memory other than it should be after it: at once if Memlane has moved it, and
/// after several moves by QEMU itself, which are done again and counted.
pub fn measure(programs: &Programs, options: &QemuOptions) -> Result<QemuReport> {
    ensure!(
        options.touched().bytes() + LEAST_REST <= options.ram.bytes(),
        "a guest of {} cannot fill {}: its kernel needs {} MiB; make --touched smaller or --ram larger",
        options.ram,
        options.touched(),
        LEAST_REST >> 20
    );
    let lab = LabOptions {
        ports: usize::from(options.ports),
        port_rate: options.port_rate,
        switch: true,
        ..LabOptions::default()
    };
    // The ports may be slow on purpose.
    let tables = "[limits]\nmin_bandwidth = \"1mbit\"\n".to_owned();
    let mut rig = Rig::new(programs, RigOptions { lab, tables, ..RigOptions::default() })?;
    let guest = guest(&rig, options)?;
    for host in rig.lab().hosts() {
        host.add_tap(&guest.tap)?;
    }
    let daemons = [HostId::A, HostId::B].map(|id| rig.daemon(id).pid());

    let mut results = WAYS.map(|_| Results::default());
    for repetition in 0..options.repetitions {
        for turn in 0..WAYS.len() {
            // Nobody is always the first one, to whom the machine itself may be slower to give memory.
            let index = (turn + repetition as usize) % WAYS.len();
            eprintln!("qemu: repetition {} of {}, {}", repetition + 1, options.repetitions, WAYS[index]);
            repeat(&rig, &guest, WAYS[index], options.anonymous, &daemons, &mut results[index])?;
        }
    }
    let [memlane, plain, multifd] = results;
    let baselines = vec![(WAYS[1], plain), (WAYS[2], multifd)];
    Ok(QemuReport::new(Settings::new(options, &guest), memlane, baselines))
}

/// Moves the guest once; and again if QEMU by itself has broken it, which is not Memlane's to mend.
fn repeat(
    rig: &Rig,
    guest: &LinuxGuest,
    way: Way,
    anonymous: bool,
    daemons: &[u32],
    results: &mut Results,
) -> Result<()> {
    loop {
        let outcome = moves::run(rig, guest, way, anonymous, daemons).with_context(|| {
            let console = std::fs::read_to_string(&guest.console).unwrap_or_default();
            format!("moving the guest with {way}, whose console ends: {}", last_lines(&console))
        })?;
        match outcome {
            Outcome::Whole(run) => {
                results.runs.push(run);
                return Ok(());
            }
            Outcome::Broken(how) => {
                let failed = format!("the guest did not arrive whole with {way}: {how}");
                ensure!(way != Way::Memlane && results.broken.len() < MOST_BROKEN, failed);
                eprintln!("qemu: {failed}; once more");
                results.broken.push(how);
            }
        }
    }
}

fn guest(rig: &Rig, options: &QemuOptions) -> Result<LinuxGuest> {
    let kernel = Kernel::obtain()?;
    let directory = rig.lab().host(HostId::A).directory();
    let initramfs = Initramfs::build(&directory.join("initramfs"), &kernel)?;
    let (accelerator, _) = Accelerator::choose();
    Ok(LinuxGuest {
        vcpus: options.vcpus,
        ram: options.ram,
        prealloc: options.prealloc,
        working_set: options.touched(),
        rate: options.dirty_rate,
        ..LinuxGuest::new(kernel, initramfs, accelerator, directory.join("console"))
    })
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().rev().take(3).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
}
