//! `zero`: an idle guest nine tenths of whose pages hold zeros, all of which are there and have to be read.
//!
//! It is moved twice in each repetition: as it is, and with holes where the zeros are, which are never read. What the
//! source's daemon takes of a processor for the first beyond the second, it takes to find that the pages hold zeros,
//! and to say so to the destination. So `zero_scan_gbytes_per_s` is what one core scans in a second.
//!
//! The baseline **read** is one core that reads memory of the same size, with as many zeros, which no other process uses:
//! when it has just mapped it (`vs_read`), and when it has touched every page of it before, so that no page has to be
//! mapped any more (`vs_mapped_read`). The daemon maps a guest's memory when its VMM comes, in the background.

use anyhow::{Result, ensure};
use clap::Args;
use memlane_lab::{LabOptions, Requirement, Size, why_not};
use serde_json::json;

use super::{Bench, CaseResult, Scenario};
use crate::baseline::memcpy;
use crate::baseline::memory::{MemoryState, SharedMemory};
use crate::memlane::{BenchGuest, PAGE};
use crate::report::{Case, CaseRuns, Contender, NamedFigures, ScenarioReport};

const FILL: &str = "zero=90,random=10,compressible=0";
const CPU: &str = "source_daemon_cpu_seconds";

/// The options of the scenario.
#[derive(Args, Debug, Clone)]
pub struct ZeroScenario {
    /// Memory of the guest
    #[arg(long, default_value = "4GiB")]
    pub ram: Size,
    /// Ports between the two hosts
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub ports: u8,
}

#[derive(Clone, Copy)]
enum ZeroCase {
    /// A move by Memlane. The value says whether the guest's zeros exist as pages; else they are holes.
    Memlane(bool),
    Read,
}

impl Scenario for ZeroScenario {
    const NAME: &'static str = "zero";

    fn measure(&self, bench: &Bench) -> Result<ScenarioReport> {
        let lab = LabOptions { ports: usize::from(self.ports), ..LabOptions::default() };
        let mut rig = bench.rig(lab)?;
        let kvm = why_not(&[Requirement::Kvm]).is_none();
        let idle = BenchGuest { fill: FILL, ..BenchGuest::idle(self.ram, kvm) };

        let cases = [
            (Contender::Memlane.case("zeros"), ZeroCase::Memlane(true)),
            (Contender::Memlane.case("holes"), ZeroCase::Memlane(false)),
            (Contender::Read.case(""), ZeroCase::Read),
        ];
        let runs = bench.interleave(Self::NAME, &cases, |what| match *what {
            ZeroCase::Memlane(populated) => {
                let moved =
                    BenchGuest { populated, ..idle.clone() }.migrate(&mut rig, &[], |_, _| {})?.arrived()?;
                let mut figures = moved.figures()?;
                figures.set(CPU, moved.source_daemon);
                figures.set("zero_gb", moved.number("zero_pages")? * PAGE / 1e9);
                Ok(moved.with_figures(figures))
            }
            ZeroCase::Read => Ok(CaseResult { figures: self.read()?, ..CaseResult::default() }),
        })?;
        let [zeros, holes, read] = cases.map(|(case, _)| case);
        self.report(runs, &zeros, &holes, &read)
    }
}

impl ZeroScenario {
    /// Reads memory like the guest's.
    fn read(&self) -> Result<NamedFigures> {
        let mut memory = SharedMemory::new(self.ram.bytes().try_into()?, MemoryState::Prepared)?;
        let tenth = memory.len() / 10;
        memory[..tenth].copy_from_slice(&SharedMemory::with_pattern(tenth)?);
        let figures = memcpy::measure_read(&memory)?;
        Ok(NamedFigures::from([
            ("read_gbytes_per_s", figures.unmapped),
            ("mapped_read_gbytes_per_s", figures.mapped),
        ]))
    }

    fn report(&self, runs: CaseRuns, zeros: &Case, holes: &Case, read: &Case) -> Result<ScenarioReport> {
        let cpu = |case| runs.values(case, CPU);
        let scan = runs.values(zeros, "zero_gb")?.into_iter().zip(cpu(zeros)?).zip(cpu(holes)?);
        let scan = scan.map(|((gigabytes, with), without)| {
            ensure!(with > without, "the zeros took no time that could be measured: make --ram larger");
            Ok(gigabytes / (with - without))
        });
        let scan = scan.collect::<Result<Vec<f64>>>()?;
        let vs = |figure: &str| -> Result<Vec<f64>> {
            Ok(scan.iter().zip(runs.values(read, figure)?).map(|(scan, read)| scan / read).collect())
        };
        let (vs_read, vs_mapped) = (vs("read_gbytes_per_s")?, vs("mapped_read_gbytes_per_s")?);
        let headline =
            format!("an idle guest of {}, 90 % zero and 10 % random, over {} port(s)", self.ram, self.ports);
        let settings = json!({ "ram_bytes": self.ram.bytes(), "ports": self.ports, "fill": FILL });
        let mut report = ScenarioReport::new(Self::NAME, headline, &settings, runs)?;
        report.ratio(
            "zero_scan_gbytes_per_s",
            scan,
            "GB of zeros for each second of a core that they take the source's daemon beyond holes",
        );
        report.ratio("vs_read", vs_read, "of what one core reads of memory that it has just mapped");
        report.ratio("vs_mapped_read", vs_mapped, "of what it reads when all pages are mapped");
        report.columns =
            vec!["total_seconds", CPU, "zero_gb", "read_gbytes_per_s", "mapped_read_gbytes_per_s"];
        Ok(report)
    }
}
