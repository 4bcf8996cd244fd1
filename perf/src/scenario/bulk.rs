//! `bulk`: an idle guest of incompressible memory, over ports that carry as much as the machine can.
//!
//! Everything is measured twice, with the destination's memory *prepared*, so that all of its pages are there and mapped
//! in the process that receives (in the VMM, for Memlane; with `prealloc=on`, for QEMU), and *fresh*. The memory that is sent was
//! always written before. The baselines are
//!
//! - **raw**: bare sockets with as many connections as Memlane had lanes, from memory to memory;
//! - **qemu**: stock QEMU's own migration, plain and with 2, 4 and 8 multifd channels, of a guest that has the same RAM
//!   contents in a shared file on tmpfs, and is as idle: it runs its firmware, which waits for a disk;
//! - **memcpy**: one core that copies the same memory.
//!
//! Hosts that are there already may lack QEMU, which is left out then, as memcpy is.
//!
//! Against raw counts round one, and against QEMU the whole move, from the order until the guest runs there. Processor
//! time is that of both ends and of the kernel's threads, for each GB sent.

use std::cell::Cell;

use anyhow::{Context, Result};
use clap::Args;
use memlane_lab::{HostId, LabOptions, Requirement, Size};
use serde_json::{Value, json};

use super::{Bench, CaseResult, Scenario};
use crate::baseline::memcpy;
use crate::baseline::memory::{MemoryState, SharedMemory};
use crate::baseline::qemu::QemuMethod;
use crate::baseline::qemu::firmware::Firmware;
use crate::baseline::raw;
use crate::memlane::BenchGuest;
use crate::report::{Case, CaseRuns, Contender, NamedFigures, ScenarioReport};

const RATE: &str = "gbit_per_second";
const CPU: &str = "cpu_seconds_per_gb";

/// The options of the scenario.
#[derive(Args, Debug, Clone)]
pub struct BulkScenario {
    /// Memory of the guest
    #[arg(long, default_value = "2GiB")]
    pub ram: Size,
    /// Ports between the two hosts; Memlane has lanes on each, and QEMU all its connections on the first
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub ports: u8,
    /// Leave QEMU's own migration out, which takes most of the time
    #[arg(long)]
    pub without_qemu: bool,
}

#[derive(Clone, Copy)]
enum BulkCase {
    Memlane(MemoryState),
    Raw(MemoryState),
    Qemu(QemuMethod, MemoryState),
    Memcpy,
}

impl Scenario for BulkScenario {
    const NAME: &'static str = "bulk";
    const ON_HOSTS: bool = true;

    fn needs(&self) -> &'static [Requirement] {
        if self.without_qemu { Requirement::LAB } else { Requirement::LAB_WITH_QEMU }
    }

    fn measure(&self, bench: &Bench) -> Result<ScenarioReport> {
        let lab = LabOptions { ports: usize::from(self.ports), ..LabOptions::default() };
        let mut rig = bench.rig(lab)?;
        let remote = rig.lab().is_remote();
        let ports = rig.lab().host(HostId::A).ports().len();
        let bytes = self.ram.bytes().try_into()?;
        // Hosts that are there already make their own.
        let contents = if remote {
            SharedMemory::new(bytes, MemoryState::Fresh)
        } else {
            SharedMemory::with_pattern(bytes)
        }?;
        let with_qemu = !self.without_qemu && rig.lab().hosts().iter().all(|host| host.has(&host.qemu()));
        let firmware = with_qemu.then(|| Firmware::new(rig.lab(), bytes)).transpose()?;
        let guest = BenchGuest::idle(self.ram, rig.lab().has_kvm());
        // Memlane comes first, and says how many it had.
        let lanes = Cell::new(ports);

        let mut cases: Vec<(Case, BulkCase)> = cases();
        // This machine is none of the hosts then.
        cases.retain(|(_, what)| match what {
            BulkCase::Memcpy => !remote,
            BulkCase::Qemu(..) => with_qemu,
            _ => true,
        });
        let runs = bench.interleave(Self::NAME, &cases, |what| {
            let (figures, detail) = match *what {
                BulkCase::Memlane(state) => {
                    let guest = BenchGuest { prepared: state == MemoryState::Prepared, ..guest.clone() };
                    let moved = guest.migrate(&mut rig, &[], |_, _| {})?.arrived()?;
                    lanes.set(moved.lanes());
                    return moved.measured();
                }
                BulkCase::Raw(state) => {
                    let each = lanes.get().div_ceil(ports);
                    let took = raw::transfer(rig.lab(), &contents, each, state)?;
                    (took.figures(contents.len()), json!({ "connections_per_port": each }))
                }
                BulkCase::Qemu(way, state) => {
                    let firmware = firmware.as_ref().context("there is no guest in QEMU")?;
                    let moved = firmware.migrate(rig.lab(), way, state)?;
                    (moved.figures(self.ram.bytes()), moved.told)
                }
                BulkCase::Memcpy => (copied(&contents)?, Value::Null),
            };
            Ok(CaseResult { figures, detail, ..CaseResult::default() })
        })?;
        self.report(runs, ports)
    }
}

/// Returns all cases, Memlane's first. Measurements that take a third of a second come three times, with others in
/// between, because a shared machine is sometimes slower for about as long.
fn cases() -> Vec<(Case, BulkCase)> {
    let ours = |state: MemoryState| {
        [
            (Contender::Memlane.case(state.as_str()), BulkCase::Memlane(state)),
            (Contender::Raw.case(state.as_str()), BulkCase::Raw(state)),
        ]
    };
    let stock = |way| {
        [MemoryState::Prepared, MemoryState::Fresh]
            .map(|state| (qemu(way, state), BulkCase::Qemu(way, state)))
    };
    let [plain, two, four, eight] = QemuMethod::PRECOPY;
    let mut cases = Vec::from(ours(MemoryState::Prepared));
    cases.extend(ours(MemoryState::Fresh));
    cases.extend([plain, two].into_iter().flat_map(stock));
    cases.extend(ours(MemoryState::Prepared));
    cases.extend([four, eight].into_iter().flat_map(stock));
    cases.extend(ours(MemoryState::Prepared));
    cases.push((Contender::Memcpy.case(""), BulkCase::Memcpy));
    cases
}

fn qemu(way: QemuMethod, state: MemoryState) -> Case {
    Contender::Qemu.case(format!("{way} {}", state.as_str()))
}

/// Measures what one core copies, into either kind of memory.
fn copied(contents: &SharedMemory) -> Result<NamedFigures> {
    let copies = memcpy::copy_twice(contents)?;
    let gbit = |copy: &memcpy::CopyFigures| copy.gb_per_second * 8.0;
    Ok(NamedFigures::from([
        ("gbit_per_second", gbit(&copies.prepared)),
        ("fresh_gbit_per_second", gbit(&copies.fresh)),
    ]))
}

impl BulkScenario {
    fn report(&self, runs: CaseRuns, ports: usize) -> Result<ScenarioReport> {
        let (prepared, fresh) = (MemoryState::Prepared, MemoryState::Fresh);
        let case = |by: Contender, state: MemoryState| by.case(state.as_str());
        let (memlane, raw) = (case(Contender::Memlane, prepared), case(Contender::Raw, prepared));
        let (memlane_fresh, raw_fresh) = (case(Contender::Memlane, fresh), case(Contender::Raw, fresh));
        let over = |above, below, figure| runs.quotients((above, figure), (below, figure));
        let round_one = |above, below| runs.quotients((above, "round_one_gbit_per_second"), (below, RATE));
        let mut ratios = vec![
            ("vs_raw", round_one(&memlane, &raw)?, "round one, of what raw sockets carried".to_owned()),
            ("cpu_vs_raw", over(&memlane, &raw, CPU)?, "processor time for a GB, of that of raw".to_owned()),
            (
                "fresh_vs_raw",
                round_one(&memlane_fresh, &raw_fresh)?,
                "as vs_raw, into fresh memory".to_owned(),
            ),
        ];
        if runs.cases().iter().any(|case| case.by == Contender::Qemu) {
            let best = |state| {
                let cases = QemuMethod::PRECOPY.map(|way| qemu(way, state));
                runs.best(&cases, RATE).cloned()
            };
            let (stock, stock_fresh) = (best(prepared)?, best(fresh)?);
            ratios.extend([
                (
                    "vs_qemu",
                    over(&memlane, &stock, RATE)?,
                    format!("the whole move, times as fast as {stock}, which has all its connections on the first port"),
                ),
                (
                    "cpu_vs_qemu",
                    over(&memlane, &stock, CPU)?,
                    format!("processor time for a GB, of that of {stock}"),
                ),
                (
                    "fresh_vs_qemu",
                    over(&memlane_fresh, &stock_fresh, RATE)?,
                    format!("the whole move into fresh memory, times as fast as {stock_fresh}"),
                ),
            ]);
        }
        ratios.extend([
            (
                "idle_downtime_ms",
                runs.values(&memlane, "downtime_ms")?,
                "from the guest's last instruction here to its first there".to_owned(),
            ),
            (
                "vmm_state_ms",
                runs.values(&memlane, "vmm_state_ms")?,
                "of which the VMM saved and loaded its own state".to_owned(),
            ),
        ]);
        let headline = format!("an idle guest of {}, incompressible, over {ports} port(s)", self.ram);
        let settings = json!({ "ram_bytes": self.ram.bytes(), "ports": ports });
        let mut report = ScenarioReport::new(Self::NAME, headline, &settings, runs)?;
        for (name, values, meaning) in ratios {
            report.ratio(name, values, meaning);
        }
        report.columns = vec![RATE, "round_one_gbit_per_second", "total_seconds", "downtime_ms", CPU];
        Ok(report)
    }
}
