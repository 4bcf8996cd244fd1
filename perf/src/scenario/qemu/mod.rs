//! `qemu`: Memlane beside QEMU's own migration: one Linux guest, on the same hosts and links, moved in turn by each.
//!
//! The guest is a Linux under stock QEMU that has filled a part of its memory with what cannot be compressed. Every
//! move is of a guest that has just booted, to a QEMU that was started beforehand. What is compared:
//!
//! - **total**: from the order to the event RESUME of the destination's QEMU;
//! - **downtime**: from the event STOP of the source's QEMU to that RESUME, both by QEMU's own account (`downtime_ms`); of
//!   Memlane's also how much of it QEMU took to save and to load its state (`qemu_state_ms`);
//! - **bytes**: what went over the ports for RAM, by the daemon's count or by QEMU's;
//! - **CPU**: user and system time of both QEMUs, of both daemons for Memlane, and of the kernel's threads, less what
//!   all of these used in the same time before the order, when the guest did the same.
//!
//! `vs_*` is how many times faster Memlane was; `downtime_vs_*`, `bytes_vs_*` and `cpu_vs_*` (of the whole move) are
//! Memlane's part of what QEMU took. `*_qemu` is against the faster of QEMU's ways.

mod end;
mod mover;
mod moves;

use anyhow::{Context, Result, ensure};
use clap::Args;
use memlane_lab::linux::{Accelerator, Initramfs, Kernel, LinuxGuest};
use memlane_lab::{HostId, LabOptions, Rate, Requirement, Rig, RigOptions, Size};
use serde_json::json;

use super::{Bench, CaseResult, Scenario};
use crate::baseline::qemu::{DOWNTIME_LIMIT, QemuMethod};
use crate::report::{CaseRuns, ScenarioReport};
use mover::Mover;
use moves::MoveOutcome;

/// The methods of QEMU that are measured.
const WAYS: [QemuMethod; 2] = [QemuMethod::Plain, QemuMethod::Multifd(4)];
/// The number of moves by QEMU that may break the guest, with each method, before the scenario is given up.
///
/// Under TCG they do: QEMUs before 9.0 overlook writes of a guest that goes on writing (QEMU commit 03bfc2188f06,
/// "physmem: Fix migration dirty bitmap coherency with TCG memory access"). Memlane does not ask TCG what was written.
const MOST_BROKEN: usize = 10;
/// The memory that the guest's kernel needs for itself, in bytes.
const LEAST_REST: u64 = 128 << 20;

/// The options of the scenario.
#[derive(Args, Debug, Clone)]
pub struct QemuScenario {
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
    /// Ports between the two hosts; Memlane has lanes on each, and QEMU all its connections on the first
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
}

impl Scenario for QemuScenario {
    const NAME: &'static str = "qemu";

    fn needs(&self) -> &'static [Requirement] {
        Requirement::LAB_WITH_QEMU
    }

    fn measure(&self, bench: &Bench) -> Result<ScenarioReport> {
        ensure!(
            self.touched().bytes() + LEAST_REST <= self.ram.bytes(),
            "a guest of {} cannot fill {}: its kernel needs {} MiB; make --touched smaller or --ram larger",
            self.ram,
            self.touched(),
            LEAST_REST >> 20
        );
        let lab = LabOptions {
            ports: usize::from(self.ports),
            port_rate: self.port_rate,
            switch: true,
            ..LabOptions::default()
        };
        // The ports may be slow on purpose.
        let tables = "[limits]\nmin_bandwidth = \"1mbit\"\n".to_owned();
        let mut rig =
            Rig::new(&bench.programs, RigOptions { lab, tables, insecure: true, ..RigOptions::default() })?;
        let guest = self.guest(&rig)?;
        guest.make_console()?;
        for host in rig.lab().hosts() {
            host.add_tap(&guest.tap)?;
        }
        let daemons = [HostId::A, HostId::B].map(|id| rig.daemon(id).pid());

        let movers = [Mover::Daemons, Mover::Qemu(WAYS[0]), Mover::Qemu(WAYS[1])];
        let mut broken = Vec::new();
        let runs = bench.interleave(Self::NAME, &movers.map(|mover| (mover.case(), mover)), |mover| {
            self.repeat(&rig, &guest, *mover, &daemons, &mut broken)
        })?;
        self.report(&guest, runs, &broken)
    }
}

impl QemuScenario {
    fn touched(&self) -> Size {
        self.touched.unwrap_or_else(|| self.ram.part(2))
    }

    fn guest(&self, rig: &Rig) -> Result<LinuxGuest> {
        let kernel = Kernel::obtain()?;
        let directory = rig.lab().host(HostId::A).directory();
        let initramfs = Initramfs::build(&directory.join("initramfs"), &kernel)?;
        let (accelerator, _) = Accelerator::choose();
        Ok(LinuxGuest {
            vcpus: self.vcpus,
            ram: self.ram,
            prealloc: self.prealloc,
            working_set: self.touched(),
            rate: self.dirty_rate,
            ..LinuxGuest::new(kernel, initramfs, accelerator, directory.join("console"))
        })
    }

    /// Moves the guest once. If QEMU by itself has broken it, the guest is moved again, because Memlane cannot mend
    /// that.
    fn repeat(
        &self,
        rig: &Rig,
        guest: &LinuxGuest,
        mover: Mover,
        daemons: &[u32],
        broken: &mut Vec<(Mover, String)>,
    ) -> Result<CaseResult> {
        loop {
            let outcome = moves::run(rig, guest, mover, self.anonymous, daemons).with_context(|| {
                let console = std::fs::read_to_string(&guest.console).unwrap_or_default();
                format!("moving the guest, whose console ends: {}", last_lines(&console))
            })?;
            match outcome {
                MoveOutcome::Whole(moved) => {
                    return Ok(CaseResult {
                        figures: moved.figures(self.ram.bytes()),
                        detail: moved.told,
                        ..CaseResult::default()
                    });
                }
                MoveOutcome::Broken(how) => {
                    let failed = format!("the guest did not arrive whole: {how}");
                    let so_far = broken.iter().filter(|(by, _)| *by == mover).count();
                    ensure!(mover != Mover::Daemons && so_far < MOST_BROKEN, failed);
                    eprintln!("qemu: {failed}; the move is repeated");
                    broken.push((mover, how));
                }
            }
        }
    }

    fn report(
        &self,
        guest: &LinuxGuest,
        runs: CaseRuns,
        broken: &[(Mover, String)],
    ) -> Result<ScenarioReport> {
        let writes = match self.dirty_rate {
            0 => "idle".to_owned(),
            rate => format!("writing {rate} pages a second"),
        };
        let (accelerator, vcpus, ports) = (guest.accelerator.as_str(), self.vcpus, self.ports);
        let memory = if self.prealloc { "preallocated" } else { "fresh" };
        let baseline_memory = if self.anonymous { "anonymous" } else { "tmpfs" };
        let headline = format!(
            "Linux under QEMU ({accelerator}), {} with {} filled, {vcpus} vCPU(s), {writes}; {ports} port(s), {memory} \
             memory ({baseline_memory} for QEMU's own migration)",
            self.ram,
            self.touched()
        );
        let settings = json!({
            "ram_bytes": self.ram.bytes(),
            "touched_bytes": self.touched().bytes(),
            "dirty_rate": self.dirty_rate,
            "vcpus": vcpus,
            "accelerator": accelerator,
            "kernel": guest.kernel.release(),
            "qemu_version": memlane_lab::qemu::version()?,
            "ports": ports,
            "port_bits_per_second": self.port_rate.map(|rate| rate.bits_per_second()),
            "prealloc": self.prealloc,
            "baseline_memory": baseline_memory,
            "downtime_limit_seconds": DOWNTIME_LIMIT.as_secs_f64(),
        });

        let memlane = Mover::Daemons.case();
        let cases = WAYS.map(|way| Mover::Qemu(way).case());
        let fastest = runs.best(&cases, "gbit_per_second")?;
        let mut ratios = Vec::new();
        for (name, case) in cases.iter().map(|case| (case.how.as_str(), case)).chain([("qemu", fastest)]) {
            let part = |figure| runs.quotients((&memlane, figure), (case, figure));
            let faster = runs.quotients((case, "total_seconds"), (&memlane, "total_seconds"))?;
            ratios.push((format!("vs_{name}"), faster, format!("times as fast as {case}")));
            for (kind, figure, what) in [
                ("downtime", "downtime_ms", "pause"),
                ("bytes", "sent_gb", "bytes sent for RAM"),
                ("cpu", "cpu_seconds", "processor time of the whole move"),
            ] {
                ratios.push((
                    format!("{kind}_vs_{name}"),
                    part(figure)?,
                    format!("{what}, of that of {case}"),
                ));
            }
        }
        let mut report = ScenarioReport::new(Self::NAME, headline, &settings, runs)?;
        for (name, values, meaning) in ratios {
            report.ratio(name, values, meaning);
        }
        report.columns = vec![
            "total_seconds",
            "downtime_ms",
            "qemu_state_ms",
            "sent_gb",
            "cpu_seconds",
            "cpu_seconds_per_gb",
        ];
        report.notes.extend(broken.iter().map(|(mover, how)| {
            format!("one more move by {} broke the guest and counts for nothing: {how}", mover.case())
        }));
        Ok(report)
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().rev().take(3).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
}
