//! `compressible`: an idle guest over one port of 1 Gbit/s, with compression left to the daemon and without: once with
//! memory that LZ4 makes a third of, and once with memory that cannot be compressed.
//!
//! - **compressible_speedup**: the time that the move took without compression, over the time that it took with it.
//! - **incompressible_vs_off**: the same of the guest that cannot be compressed: 1 if looking at its memory costs nothing.

use anyhow::{Result, ensure};
use clap::Args;
use memlane_lab::{LabOptions, Rate, Requirement, Size, why_not};
use serde_json::json;

use super::{Bench, Scenario};
use crate::memlane::BenchGuest;
use crate::report::{Case, CaseRuns, Contender, ScenarioReport};

const COMPRESSIBLE: &str = "mixed=100";
/// The downtime limit of the orders. It is long because only the time of the move matters here, not the pause.
const LIMIT: [&str; 2] = ["--downtime-limit", "5s"];
/// The range of compression ratios within which the figures mean anything.
const THIRD: std::ops::Range<f64> = 0.28..0.40;

/// The options of the scenario.
#[derive(Args, Debug, Clone)]
pub struct CompressibleScenario {
    /// Memory of the guest
    #[arg(long, default_value = "1GiB")]
    pub ram: Size,
    /// What the port carries
    #[arg(long, default_value = "1gbit")]
    pub port_rate: Rate,
}

#[derive(Clone, Copy)]
struct CompressibleCase {
    fill: &'static str,
    compression: &'static str,
}

impl Scenario for CompressibleScenario {
    const NAME: &'static str = "compressible";

    fn measure(&self, bench: &Bench) -> Result<ScenarioReport> {
        let lab = LabOptions { port_rate: Some(self.port_rate), ..LabOptions::default() };
        let mut rig = bench.rig(lab)?;
        let kvm = why_not(&[Requirement::Kvm]).is_none();
        let case = |name: &str, fill, compression| {
            (Contender::Memlane.case(name), CompressibleCase { fill, compression })
        };
        let cases = [
            case("a third, auto", COMPRESSIBLE, "auto"),
            case("a third, off", COMPRESSIBLE, "off"),
            case("random, auto", BenchGuest::INCOMPRESSIBLE, "auto"),
            case("random, off", BenchGuest::INCOMPRESSIBLE, "off"),
        ];
        let runs = bench.interleave(Self::NAME, &cases, |&CompressibleCase { fill, compression }| {
            let guest = BenchGuest { fill, ..BenchGuest::idle(self.ram, kvm) };
            let arguments = [&LIMIT[..], &["--compression", compression]].concat();
            let moved = guest.migrate(&mut rig, &arguments, |_, _| {})?.arrived()?;
            let mut figures = moved.figures()?;
            let (from, to) = (moved.number("uncompressed_bytes")?, moved.number("compressed_bytes")?);
            figures.set("compressed_share", from / (moved.number("pages_total")? * crate::memlane::PAGE));
            ensure!(compression == "auto" || from == 0.0, "pages were compressed although that was off");
            if compression == "auto" && fill == COMPRESSIBLE {
                ensure!(from > 0.0, "the lane has not compressed anything");
                ensure!(THIRD.contains(&(to / from)), "LZ4 makes {:.2} of the guest's memory", to / from);
                figures.set("compressed_to", to / from);
            }
            Ok(moved.with_figures(figures))
        })?;
        self.report(runs, &cases.map(|(case, _)| case))
    }
}

impl CompressibleScenario {
    fn report(
        &self,
        runs: CaseRuns,
        [third, third_off, random, random_off]: &[Case; 4],
    ) -> Result<ScenarioReport> {
        let time = "total_seconds";
        let speedup = runs.quotients((third_off, time), (third, time))?;
        let unharmed = runs.quotients((random_off, time), (random, time))?;
        let headline = format!("an idle guest of {} over one port of {}", self.ram, self.port_rate);
        let settings = json!({
            "ram_bytes": self.ram.bytes(),
            "port_bits_per_second": self.port_rate.bits_per_second(),
            "fill": COMPRESSIBLE,
        });
        let mut report = ScenarioReport::new(Self::NAME, headline, &settings, runs)?;
        report.ratio(
            "compressible_speedup",
            speedup,
            "times as fast as without compression, of memory that LZ4 makes a third of",
        );
        report.ratio("incompressible_vs_off", unharmed, "the same of memory that cannot be compressed");
        report.columns =
            vec![time, "sent_gb", "compressed_share", "compressed_to", "cpu_seconds", "downtime_ms"];
        Ok(report)
    }
}
