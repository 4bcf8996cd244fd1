//! `lostport`: an idle guest of incompressible memory, over ports of which one is lost in mid-copy: it goes down, or it
//! silently drops everything in both directions while its link stays up.
//!
//! - **vs_ideal**: the time that the move took, over that of an ideal move: the payload of TCP that all ports can carry
//!   (see [`line`](super::line)) until the port is lost, and what the others can from then on, with nothing sent twice
//!   and no time before, between and after. It is the larger one of `vs_ideal_down` and `vs_ideal_silent`.
//! - **beyond_memory**: what was sent beyond the guest's memory, as a share of that: what the lost port took with it and
//!   the others sent again, and the headers of frames.

use anyhow::{Context, Result, ensure};
use clap::Args;
use memlane_lab::{LabOptions, Rate, Requirement, Rig, Size, unix_time, why_not};
use serde_json::json;

use super::line::payload_gbit_per_second;
use super::{Bench, CaseResult, Scenario};
use crate::memlane::{BenchGuest, MemlaneMove, PAGE};
use crate::report::{Case, CaseRuns, Contender, ScenarioReport};

/// The index of the port that is lost.
const PORT: usize = 0;
/// The share of the pages that have been sent when the port is lost.
const SENT_BEFORE: f64 = 0.4;

/// The options of the scenario.
#[derive(Args, Debug, Clone)]
pub struct LostPortScenario {
    /// Memory of the guest
    #[arg(long, default_value = "2GiB")]
    pub ram: Size,
    /// Ports between the two hosts
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(2..=64))]
    pub ports: u8,
    /// What each port carries
    #[arg(long, default_value = "1gbit")]
    pub port_rate: Rate,
}

#[derive(Clone, Copy, PartialEq)]
enum LossKind {
    Down,
    Silent,
}

impl Scenario for LostPortScenario {
    const NAME: &'static str = "lostport";

    fn measure(&self, bench: &Bench) -> Result<ScenarioReport> {
        let lab = LabOptions {
            ports: usize::from(self.ports),
            port_rate: Some(self.port_rate),
            ..LabOptions::default()
        };
        let line = payload_gbit_per_second(self.port_rate, lab.mtu);
        let mut rig = bench.rig(lab)?;
        let guest = BenchGuest::idle(self.ram, why_not(&[Requirement::Kvm]).is_none());
        let cases = [
            (Contender::Memlane.case("down"), LossKind::Down),
            (Contender::Memlane.case("silent"), LossKind::Silent),
        ];
        let runs = bench.interleave(Self::NAME, &cases, |how| self.lose_one(&mut rig, &guest, *how, line))?;
        self.report(runs, &cases.map(|(case, _)| case), line)
    }
}

impl LossKind {
    fn happens(self) -> &'static str {
        match self {
            Self::Down => "goes down",
            Self::Silent => "drops everything",
        }
    }
}

impl LostPortScenario {
    fn lose_one(&self, rig: &mut Rig, guest: &BenchGuest, how: LossKind, line: f64) -> Result<CaseResult> {
        let mut lost: Option<(f64, Result<()>)> = None;
        let moved = guest.migrate(rig, &[], |rig, state| {
            let sent =
                state["pages_sent"].as_f64().unwrap_or(0.0) / state["pages_total"].as_f64().unwrap_or(1.0);
            if lost.is_none() && sent >= SENT_BEFORE && state["outcome"].is_null() {
                lost = Some((unix_time(), set_lost(rig, how, true)));
            }
        });
        if lost.is_some() {
            set_lost(rig, how, false).context("giving the port back")?;
        }
        let mut moved = moved?.arrived()?;
        let (lost_at, done) =
            lost.context("the guest arrived before the port was taken away: make --ram larger")?;
        done.context("taking the port away")?;
        let after = lost_at - moved.number("started_at_unix_seconds")?;
        let mut figures = moved.figures()?;
        let ideal = self.ideal_seconds(after, line);
        figures.set("lost_after_seconds", after);
        figures.set("ideal_seconds", ideal);
        figures.set("vs_ideal", moved.seconds / ideal);
        // What holds nothing travels as a descriptor, if at all.
        let empty = (moved.number("zero_pages")? + moved.number("hole_pages")?) * PAGE;
        let memory = self.ram.bytes() as f64 - empty;
        figures.set("beyond_memory", moved.number("bytes_sent")? / memory - 1.0);
        let port = &rig.lab().hosts()[0].ports()[PORT].interface;
        ensure_lost_alone(&moved, port)?;
        moved.timeline.note(lost_at, format!("{port} {}", how.happens()));
        Ok(moved.with_figures(figures))
    }

    /// Returns the least time of a move during which a port was lost `after` so many seconds.
    fn ideal_seconds(&self, after: f64, line: f64) -> f64 {
        let gbit = self.ram.bytes() as f64 * 8.0 / 1e9;
        let left = gbit - after * line * f64::from(self.ports);
        after + left / (line * f64::from(self.ports - 1))
    }

    fn report(&self, runs: CaseRuns, [down, silent]: &[Case; 2], line: f64) -> Result<ScenarioReport> {
        let headline = format!(
            "an idle guest of {} over {} ports of {}, of which one is lost when {:.0} % are sent",
            self.ram,
            self.ports,
            self.port_rate,
            SENT_BEFORE * 100.0
        );
        let settings = json!({
            "ram_bytes": self.ram.bytes(),
            "ports": self.ports,
            "port_bits_per_second": self.port_rate.bits_per_second(),
            "port_payload_gbit_per_second": line,
        });
        let (of_down, of_silent) = (runs.values(down, "vs_ideal")?, runs.values(silent, "vs_ideal")?);
        let beyond = [runs.values(down, "beyond_memory")?, runs.values(silent, "beyond_memory")?].concat();
        let worse = of_down.iter().zip(&of_silent).map(|(down, silent)| down.max(*silent)).collect();
        let mut report = ScenarioReport::new(Self::NAME, headline, &settings, runs)?;
        report.ratio(
            "vs_ideal",
            worse,
            "the whole move, of the ideal time for the ports left: the worse one",
        );
        report.ratio("vs_ideal_down", of_down, "the same, of a port that goes down");
        report.ratio("vs_ideal_silent", of_silent, "the same, of a port that silently drops everything");
        report.ratio("beyond_memory", beyond, "sent beyond the guest's memory, of that");
        Ok(report)
    }
}

fn set_lost(rig: &Rig, how: LossKind, lost: bool) -> Result<()> {
    let lab = rig.lab();
    match (how, lost) {
        (LossKind::Silent, _) => lab.silence_port(PORT, lost),
        (LossKind::Down, true) => lab.hosts()[0].port_down(PORT),
        (LossKind::Down, false) => lab.hosts()[0].port_up(PORT),
    }
}

/// Checks that the daemon has noticed the loss, and has lost lanes on no other port.
fn ensure_lost_alone(moved: &MemlaneMove, port: &str) -> Result<()> {
    let lanes = &moved.migration["lanes"];
    let losses = |of_port: bool| -> u64 {
        let lanes = lanes.as_array().into_iter().flatten().filter(|lane| (lane["port"] == port) == of_port);
        lanes.filter_map(|lane| lane["losses"].as_u64()).sum()
    };
    ensure!(losses(true) > 0, "no lane of {port} was lost: {lanes}");
    ensure!(losses(false) == 0, "lanes of other ports than {port} were lost: {lanes}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ideal_goes_on_with_the_ports_that_are_left() {
        let ram = Size::from_mib(1000);
        let rate = "1gbit".parse().expect("a rate");
        let scenario = LostPortScenario { ram, ports: 4, port_rate: rate };
        let gbit = ram.bytes() as f64 * 8.0 / 1e9;
        assert!((scenario.ideal_seconds(0.0, 1.0) - gbit / 3.0).abs() < 1e-9);
        assert!((scenario.ideal_seconds(gbit / 4.0, 1.0) - gbit / 4.0).abs() < 1e-9);
        assert!((scenario.ideal_seconds(1.0, 1.0) - (1.0 + (gbit - 4.0) / 3.0)).abs() < 1e-9);
    }
}
