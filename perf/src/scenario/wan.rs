//! `wan`: an idle guest of incompressible memory, over one port of 1 Gbit/s with a round trip of 150 ms.
//!
//! - **of_line**: contents of memory in round one, over the port's rate, headers and slow start included.
//! - **whole_of_line**: the same of the whole move, from the order until the guest runs at its destination: the greeting,
//!   the rounds' answers and the switchover, each of which takes round trips.
//! - **vs_raw**: round one over what bare sockets carried over the same port in the same repetition, on so many
//!   connections that the buffers of all of them hold what fits into the line.

use anyhow::Result;
use clap::Args;
use memlane_api::units::Span;
use memlane_lab::{LabOptions, Rate, Requirement, Size, why_not};
use serde_json::json;

use super::{Bench, CaseResult, Scenario};
use crate::baseline::memory::{MemoryState, SharedMemory};
use crate::baseline::raw;
use crate::memlane::BenchGuest;
use crate::report::{Contender, ScenarioReport};

/// The number of connections of the baseline. The kernel gives each a send buffer of 4 MiB at most, unless it is told
/// otherwise.
const RAW_CONNECTIONS: usize = 8;

/// The downtime limit of the orders. It is above the default, because the last pages, the state and the commit each
/// take a round trip.
const LIMIT: [&str; 2] = ["--downtime-limit", "1s"];

/// The options of the scenario.
#[derive(Args, Debug, Clone)]
pub struct WanScenario {
    /// Memory of the guest
    #[arg(long, default_value = "2GiB")]
    pub ram: Size,
    /// What the port carries
    #[arg(long, default_value = "1gbit")]
    pub port_rate: Rate,
    /// The round trip
    #[arg(long, default_value = "150ms")]
    pub round_trip: Span,
}

#[derive(Clone, Copy)]
enum WanCase {
    Memlane,
    Raw,
}

impl Scenario for WanScenario {
    const NAME: &'static str = "wan";

    fn measure(&self, bench: &Bench) -> Result<ScenarioReport> {
        let lab = LabOptions {
            port_rate: Some(self.port_rate),
            port_delay: Some(self.round_trip.0 / 2),
            control_delay: Some(self.round_trip.0 / 2),
            ..LabOptions::default()
        };
        let mut rig = bench.rig(lab)?;
        let guest = BenchGuest::idle(self.ram, why_not(&[Requirement::Kvm]).is_none());
        let memory = SharedMemory::with_pattern(self.ram.bytes().try_into()?)?;

        let cases =
            [(Contender::Memlane.case(""), WanCase::Memlane), (Contender::Raw.case(""), WanCase::Raw)];
        let runs = bench.interleave(Self::NAME, &cases, |way| match way {
            WanCase::Memlane => guest.migrate(&mut rig, &LIMIT, |_, _| {})?.arrived()?.measured(),
            WanCase::Raw => {
                let took = raw::transfer(rig.lab(), &memory, RAW_CONNECTIONS, MemoryState::Fresh)?;
                let detail = json!({ "connections_per_port": RAW_CONNECTIONS });
                Ok(CaseResult { figures: took.figures(memory.len()), detail, ..CaseResult::default() })
            }
        })?;

        let [(memlane, _), (raw, _)] = &cases;
        let line = self.port_rate.bits_per_second() as f64 / 1e9;
        let of_line = |figure| -> Result<Vec<f64>> {
            Ok(runs.values(memlane, figure)?.iter().map(|rate| rate / line).collect())
        };
        let round_one = "round_one_gbit_per_second";
        let (round, whole) = (of_line(round_one)?, of_line("gbit_per_second")?);
        let vs_raw = runs.quotients((memlane, round_one), (raw, "gbit_per_second"))?;
        let headline = format!(
            "an idle guest of {} over one port of {} with a round trip of {}",
            self.ram, self.port_rate, self.round_trip
        );
        let settings = json!({
            "ram_bytes": self.ram.bytes(),
            "port_bits_per_second": self.port_rate.bits_per_second(),
            "round_trip_seconds": self.round_trip.0.as_secs_f64(),
        });
        let mut report = ScenarioReport::new(Self::NAME, headline, &settings, runs)?;
        report.ratio("of_line", round, "round one, of what the port carries");
        report.ratio("whole_of_line", whole, "the whole move, of what the port carries");
        report.ratio(
            "vs_raw",
            vs_raw,
            format!("round one, of what {RAW_CONNECTIONS} bare connections carried"),
        );
        Ok(report)
    }
}
