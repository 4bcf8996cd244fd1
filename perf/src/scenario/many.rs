//! `many`: several idle guests of incompressible memory, moved at once, beside one guest that has as much memory as all of
//! them.
//!
//! - **slowest_vs_mean**: memory over the time from the order until the guest runs at its destination, of the guest that
//!   had least of it, over the mean of all.
//! - **total_vs_one**: all memory over the time from the first order until the last guest runs there, over the same of
//!   the one guest.

use anyhow::Result;
use clap::Args;
use memlane_lab::{LabOptions, Rate, Requirement, Size, why_not};
use serde_json::json;

use super::{Bench, CaseResult, Scenario};
use crate::memlane::{BenchGuest, migrate_together};
use crate::report::{Contender, NamedFigures, ScenarioReport};

/// The downtime limit of the orders. It is long because only the share of the ports matters here. On a machine whose
/// processors are all busy with lanes, or whose disk is busy with the journals of eight handovers, pauses may be long.
const LIMIT: [&str; 2] = ["--downtime-limit", "5s"];

/// The options of the scenario.
#[derive(Args, Debug, Clone)]
pub struct ManyScenario {
    /// Guests
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(2..=64))]
    pub guests: u8,
    /// Memory of each
    #[arg(long, default_value = "256MiB")]
    pub ram: Size,
    /// Ports between the two hosts
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub ports: u8,
    /// What each port carries, such as 1gbit; as much as the machine can if not given
    #[arg(long)]
    pub port_rate: Option<Rate>,
}

#[derive(Clone, Copy)]
enum ManyCase {
    Together,
    One,
}

impl Scenario for ManyScenario {
    const NAME: &'static str = "many";

    fn measure(&self, bench: &Bench) -> Result<ScenarioReport> {
        let lab =
            LabOptions { ports: usize::from(self.ports), port_rate: self.port_rate, ..LabOptions::default() };
        let mut rig = bench.rig(lab)?;
        let count = usize::from(self.guests);
        let all = Size::from_mib((self.ram.bytes() >> 20) * u64::from(self.guests));
        let kvm = why_not(&[Requirement::Kvm]).is_none();
        let (each, one) = (BenchGuest::idle(self.ram, kvm), BenchGuest::idle(all, kvm));
        let gbit = all.bytes() as f64 * 8.0 / 1e9;

        let cases = [
            (Contender::Memlane.case(format!("{count} together")), ManyCase::Together),
            (Contender::Memlane.case("one"), ManyCase::One),
        ];
        let runs = bench.interleave(Self::NAME, &cases, |way| match way {
            ManyCase::Together => {
                let moved = migrate_together(&each, &mut rig, count, &LIMIT)?;
                let mut figures = NamedFigures::from([
                    ("total_seconds", moved.total_seconds),
                    ("gbit_per_second", gbit / moved.total_seconds),
                ]);
                figures.set("slowest_vs_mean", slowest_vs_mean(&moved.seconds));
                let limit = |key| moved.migrations.iter().filter_map(move |moved| moved[key].as_f64());
                figures.set("longest_downtime_ms", limit("downtime_seconds").fold(0.0, f64::max) * 1e3);
                Ok(CaseResult { figures, detail: json!(moved.migrations), ..CaseResult::default() })
            }
            ManyCase::One => one.migrate(&mut rig, &LIMIT, |_, _| {})?.arrived()?.measured(),
        })?;

        let [(together, _), (alone, _)] = &cases;
        let fairness = runs.values(together, "slowest_vs_mean")?;
        let total = runs.quotients((together, "gbit_per_second"), (alone, "gbit_per_second"))?;
        let ports = match self.port_rate {
            Some(rate) => format!("{} port(s) of {rate}", self.ports),
            None => format!("{} unlimited port(s)", self.ports),
        };
        let headline = format!("{count} idle guests of {} at once over {ports}", self.ram);
        let settings = json!({
            "guests": self.guests,
            "ram_bytes": self.ram.bytes(),
            "ports": self.ports,
            "port_bits_per_second": self.port_rate.map(Rate::bits_per_second),
        });
        let mut report = ScenarioReport::new(Self::NAME, headline, &settings, runs)?;
        report.ratio("slowest_vs_mean", fairness, "rate of the slowest guest, of the mean of all");
        report.ratio("total_vs_one", total, format!("rate of all together, of that of one guest of {all}"));
        Ok(report)
    }
}

/// Returns the speed of the slowest guest over the mean speed, of guests with the same memory that took so many
/// seconds.
fn slowest_vs_mean(seconds: &[f64]) -> f64 {
    let rates = seconds.iter().map(|seconds| 1.0 / seconds);
    let mean = rates.clone().sum::<f64>() / seconds.len() as f64;
    rates.fold(f64::INFINITY, f64::min) / mean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fairness_is_of_rates() {
        assert_eq!(slowest_vs_mean(&[2.0, 2.0, 2.0]), 1.0);
        // Rates of 1, 1 and 0.5: the mean is 2.5 / 3.
        assert!((slowest_vs_mean(&[1.0, 1.0, 2.0]) - 0.6).abs() < 1e-12);
    }
}
