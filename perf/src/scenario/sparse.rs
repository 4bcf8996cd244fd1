//! `sparse`: an idle guest of 24 TiB of which 1 GiB is resident, in 64 pieces from its beginning to its end.
//!
//! The baseline, **dense**, is a guest that has no more memory than that, moved in the same run. Both are full of
//! what cannot be compressed, and processes: a virtual machine's slots and KVM's own records of them grow with the
//! guest's size, whatever moves it.
//!
//! What a round costs in which nothing was written is what it takes to find that: there is nothing to claim, and
//! nothing to send. Each move of the guest ends with such a look, which finds at most what the guest notes about itself.

use anyhow::{Context, Result, ensure};
use clap::Args;
use memlane_lab::{HostId, LabOptions, Rig, Size};
use serde_json::json;

use super::{Bench, CaseResult, Scenario};
use crate::memlane::BenchGuest;
use crate::peak::PeakMemory;
use crate::report::{Contender, ScenarioReport};

/// The number of pages in which the guest notes that it was kept waiting. Even an idle guest does so.
const OWN_PAGES: u64 = 2;
const EMPTY_ROUND: &str = "empty_round_ms";
const MEMORY: &str = "daemon_memory_gib";

/// The options of the scenario.
#[derive(Args, Debug, Clone)]
pub struct SparseScenario {
    /// Memory of the guest
    #[arg(long, default_value = "24TiB")]
    pub ram: Size,
    /// The part of it that is resident, and all the memory of the guest that it is compared with
    #[arg(long, default_value = "1GiB")]
    pub resident: Size,
    /// Ports between the two hosts
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub ports: u8,
}

impl Scenario for SparseScenario {
    const NAME: &'static str = "sparse";

    fn measure(&self, bench: &Bench) -> Result<ScenarioReport> {
        let lab = LabOptions { ports: usize::from(self.ports), ..LabOptions::default() };
        let mut rig = bench.rig(lab)?;
        let dense = BenchGuest::idle(self.resident, false);
        let sparse = BenchGuest { ram: self.ram, resident: Some(self.resident), ..dense.clone() };
        let cases = [(Contender::Memlane.case("sparse"), sparse), (Contender::Memlane.case("dense"), dense)];
        let runs = bench.interleave(Self::NAME, &cases, |guest| move_once(guest, &mut rig))?;

        let [sparse, dense] = cases.map(|(case, _)| case);
        let seconds = runs.values(&sparse, "total_seconds")?.into_iter();
        let vs_dense =
            seconds.zip(runs.values(&dense, "total_seconds")?).map(|(sparse, dense)| sparse / dense);
        let vs_dense = vs_dense.collect();
        let (empty_round, memory) = (runs.values(&sparse, EMPTY_ROUND)?, runs.values(&sparse, MEMORY)?);
        let headline = format!(
            "an idle guest of {} of which {} is resident, beside one of {}, over {} port(s)",
            self.ram, self.resident, self.resident, self.ports
        );
        let settings = json!({
            "ram_bytes": self.ram.bytes(),
            "resident_bytes": self.resident.bytes(),
            "ports": self.ports,
            "fill": BenchGuest::INCOMPRESSIBLE,
        });
        let mut report = ScenarioReport::new(Self::NAME, headline, &settings, runs)?;
        report.ratio("vs_dense", vs_dense, "time that it takes, of that of the guest that has nothing else");
        report.ratio(EMPTY_ROUND, empty_round, "milliseconds to find in a round that nothing was written");
        report.ratio(MEMORY, memory, "most memory of the larger of both daemons, in GiB");
        report.columns = vec!["total_seconds", "downtime_ms", "cpu_seconds", EMPTY_ROUND, MEMORY];
        Ok(report)
    }
}

fn move_once(guest: &BenchGuest, rig: &mut Rig) -> Result<CaseResult> {
    let daemons = [HostId::A, HostId::B].map(|id| rig.daemon(id).pid());
    let peaks = daemons.map(PeakMemory::begin).into_iter().collect::<Result<Vec<_>>>()?;
    let moved = guest.migrate(rig, &[], |_, _| {})?.arrived()?;
    let mut figures = moved.figures()?;
    let rounds = moved.migration["rounds"].as_array().context("the daemon tells no rounds")?;
    let last = rounds.last().context("there was no round")?;
    let dirtied = last["dirtied_pages"].as_u64().context("the daemon does not tell what was dirtied")?;
    ensure!(dirtied <= OWN_PAGES, "an idle guest has written {dirtied} pages in its last round");
    let harvest = last["harvest_seconds"].as_f64().context("the daemon does not tell how long it looked")?;
    figures.set(EMPTY_ROUND, harvest * 1e3);
    let bytes = peaks.iter().map(PeakMemory::bytes).collect::<Result<Vec<_>>>()?;
    let most = bytes.into_iter().max().unwrap_or(0);
    figures.set(MEMORY, most as f64 / (1u64 << 30) as f64);
    Ok(moved.with_figures(figures))
}
