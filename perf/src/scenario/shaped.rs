//! `shaped`: an idle guest of incompressible memory, over ports that carry less than the machine could.
//!
//! - **of_line**: contents of memory in round one, over what the ports can carry of them as payload of TCP at most: see
//!   [`line`](super::line).
//! - **vs_raw**: the same over what raw sockets carried over the same ports in the same repetition.

use anyhow::Result;
use clap::Args;
use memlane_lab::{LabOptions, Rate, Requirement, Size, why_not};
use serde_json::json;

use super::line::payload_gbit_per_second;
use super::{Bench, CaseResult, Scenario};
use crate::baseline::memory::{MemoryState, SharedMemory};
use crate::baseline::raw;
use crate::memlane::BenchGuest;
use crate::report::{Contender, ScenarioReport};

/// The options of the scenario.
#[derive(Args, Debug, Clone)]
pub struct ShapedScenario {
    /// Memory of the guest
    #[arg(long, default_value = "1GiB")]
    pub ram: Size,
    /// Ports between the two hosts
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub ports: u8,
    /// What each port carries
    #[arg(long, default_value = "1gbit")]
    pub port_rate: Rate,
}

#[derive(Clone, Copy)]
enum ShapedCase {
    Memlane,
    Raw,
}

impl Scenario for ShapedScenario {
    const NAME: &'static str = "shaped";

    fn measure(&self, bench: &Bench) -> Result<ScenarioReport> {
        let lab = LabOptions {
            ports: usize::from(self.ports),
            port_rate: Some(self.port_rate),
            ..LabOptions::default()
        };
        let line = payload_gbit_per_second(self.port_rate, lab.mtu) * f64::from(self.ports);
        let mut rig = bench.rig(lab)?;
        let guest = BenchGuest::idle(self.ram, why_not(&[Requirement::Kvm]).is_none());
        let memory = SharedMemory::with_pattern(self.ram.bytes().try_into()?)?;

        let cases = [
            (Contender::Memlane.case("fresh"), ShapedCase::Memlane),
            (Contender::Raw.case("fresh"), ShapedCase::Raw),
        ];
        let runs = bench.interleave(Self::NAME, &cases, |way| match way {
            ShapedCase::Memlane => guest.migrate(&mut rig, &[], |_, _| {})?.arrived()?.measured(),
            ShapedCase::Raw => {
                let figures = raw::transfer(rig.lab(), &memory, 1, MemoryState::Fresh)?.figures(memory.len());
                Ok(CaseResult { figures, ..CaseResult::default() })
            }
        })?;

        let [(memlane, _), (raw, _)] = &cases;
        let rate = "round_one_gbit_per_second";
        let of_line = runs.values(memlane, rate)?.iter().map(|rate| rate / line).collect();
        let vs_raw = runs.quotients((memlane, rate), (raw, "gbit_per_second"))?;
        let headline =
            format!("an idle guest of {} over {} port(s) of {}", self.ram, self.ports, self.port_rate);
        let settings = json!({
            "ram_bytes": self.ram.bytes(),
            "ports": self.ports,
            "port_bits_per_second": self.port_rate.bits_per_second(),
            "payload_gbit_per_second": line,
        });
        let mut report = ScenarioReport::new(Self::NAME, headline, &settings, runs)?;
        report.ratio("of_line", of_line, format!("round one, of the {line:.3} Gbit/s of payload that fit"));
        report.ratio("vs_raw", vs_raw, "round one, of what raw sockets carried");
        Ok(report)
    }
}
