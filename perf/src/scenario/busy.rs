//! `busy`: a guest that writes at 30, 60 and 90 % of what two shaped ports carry, and still gets to a short pause.
//!
//! - **limit_kept**: the part of all runs in which the pause was within the limit; it must be all of them.
//! - **prediction_error_p90_ms**: of all runs together, what 9 of 10 predictions of the pause were not further off than.
//! - **bytes_vs_ideal_N**: what was sent, over what rounds that lost no time would have sent. These are a series: the
//!   first round sends all memory at the rate of the line (see [`line`](super::line)), and each round sends what was
//!   dirtied in the time of the one before. Writes hit any page of the working set as likely as any other, so in `t`
//!   seconds at `r` writes a second `W * (1 - exp(-r * t / W))` of its `W` pages are dirtied. `r` is what the guest
//!   really wrote, by its own count. The series ends where the guest did: with the first round that is not larger than
//!   what was sent in the pause. `bytes_vs_ideal` is the worst of the three.
//! - **max_downtime_ms**: the longest pause of all runs.

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;

use super::line::payload_gbit_per_second;
use super::writer::Writer;
use super::{Bench, CaseResult, Scenario};
use crate::memlane::{MemlaneMove, PAGE, WriteLoad};
use crate::report::{Case, CaseRuns, Contender, ScenarioReport};

/// The number of rounds after which a series is given up.
const MOST_ROUNDS: usize = 10_000;

/// The options of the scenario.
#[derive(Args, Debug, Clone)]
pub struct BusyScenario {
    #[command(flatten)]
    writer: Writer,
    /// How much the guest writes, in percent of what the ports carry
    #[arg(long, value_delimiter = ',', default_values_t = [30, 60, 90], value_parser = clap::value_parser!(u32).range(1..=95))]
    pub shares: Vec<u32>,
}

impl Scenario for BusyScenario {
    const NAME: &'static str = "busy";
    const ON_HOSTS: bool = true;

    fn measure(&self, bench: &Bench) -> Result<ScenarioReport> {
        ensure!(!self.shares.is_empty(), "--shares must name at least one share, such as 30,60,90");
        let mut rig = bench.rig(self.writer.lab())?;
        let writer = self.writer.on(rig.lab());
        let line = payload_gbit_per_second(writer.port_rate, rig.lab().mtu()) * f64::from(writer.ports);
        let wire = line * 1e9 / 8.0 / PAGE;

        let cases: Vec<(Case, u32)> = self.shares.iter().map(|share| (case(*share), *share)).collect();
        let runs = bench.interleave(Self::NAME, &cases, |share| {
            let writes = WriteLoad::Rate((wire * f64::from(*share) / 100.0) as u64);
            let moved = writer.guest(rig.lab(), writes).migrate(&mut rig, &[], |_, _| {})?.arrived()?;
            self.measured(moved, wire)
        })?;
        Self { writer, ..self.clone() }.report(runs, line)
    }
}

/// Returns the case of a guest that writes at this share of the line.
fn case(share: u32) -> Case {
    Contender::Memlane.case(format!("{share}%"))
}

impl BusyScenario {
    fn measured(&self, moved: MemlaneMove, wire: f64) -> Result<CaseResult> {
        let mut figures = moved.figures()?;
        let milliseconds = |key: &str| Ok::<f64, anyhow::Error>(moved.number(key)? * 1e3);
        let (downtime, predicted) =
            (milliseconds("downtime_seconds")?, milliseconds("downtime_predicted_seconds")?);
        let limit = milliseconds("downtime_limit_seconds")?;
        let writes = moved.writes_per_second.context("the guest does not say what it wrote")?;
        let rounds = moved.migration["rounds"].as_array().context("the daemon tells of no rounds")?;
        let sent = moved.number("bytes_sent")?;
        // No round is told of what goes in the pause.
        let before: f64 = rounds.iter().filter_map(|round| round["bytes"].as_f64()).sum();
        let guest = Series {
            pages: moved.number("pages_total")?,
            working_set: self.writer.working_set().bytes() as f64 / PAGE,
            writes,
            wire,
        };
        let ideal = guest.sent_until((sent - before) / PAGE)? * PAGE;
        figures.set("predicted_ms", predicted);
        figures.set("prediction_error_ms", (predicted - downtime).abs());
        figures.set("limit_kept", f64::from(downtime <= limit));
        figures.set("writes_per_second", writes);
        figures.set("ideal_gb", ideal / 1e9);
        figures.set("bytes_vs_ideal", sent / ideal);
        Ok(moved.with_figures(figures))
    }

    fn report(&self, runs: CaseRuns, line: f64) -> Result<ScenarioReport> {
        let cases: Vec<Case> = self.shares.iter().map(|share| case(*share)).collect();
        let all = |figure: &str| -> Result<Vec<f64>> {
            let values = cases.iter().map(|case| runs.values(case, figure)).collect::<Result<Vec<_>>>()?;
            Ok(values.concat())
        };
        let (errors, kept, downtimes) =
            (all("prediction_error_ms")?, all("limit_kept")?, all("downtime_ms")?);
        let kept = kept.iter().sum::<f64>() / kept.len() as f64;
        let worst = runs.best(&cases, "bytes_vs_ideal")?;
        let mut ratios = vec![
            (
                "limit_kept".to_owned(),
                vec![kept],
                "part of all runs whose pause was within the limit".to_owned(),
            ),
            (
                "prediction_error_p90_ms".to_owned(),
                vec![nine_of_ten(errors)],
                "9 of 10 predictions were not further off".to_owned(),
            ),
            (
                "max_downtime_ms".to_owned(),
                vec![downtimes.into_iter().fold(0.0, f64::max)],
                "the longest pause of all runs".to_owned(),
            ),
            (
                "bytes_vs_ideal".to_owned(),
                runs.values(worst, "bytes_vs_ideal")?,
                format!("sent, over the ideal for what was written: the worst, {worst}"),
            ),
        ];
        for (case, share) in cases.iter().zip(&self.shares) {
            let values = runs.values(case, "bytes_vs_ideal")?;
            ratios.push((format!("bytes_vs_ideal_{share}"), values, format!("the same at {share} %")));
        }
        let headline = self.writer.headline("all over");
        let settings = self
            .writer
            .settings([("payload_gbit_per_second", json!(line)), ("shares_percent", json!(self.shares))]);
        let mut report = ScenarioReport::new(Self::NAME, headline, &settings, runs)?;
        for (name, values, meaning) in ratios {
            report.ratio(name, values, meaning);
        }
        report.columns = vec![
            "total_seconds",
            "rounds",
            "writes_per_second",
            "sent_gb",
            "ideal_gb",
            "downtime_ms",
            "predicted_ms",
            "prediction_error_ms",
        ];
        Ok(report)
    }
}

/// The series of rounds of a guest, each of which takes only the time that the line needs for it. All values are in
/// pages.
struct Series {
    pages: f64,
    working_set: f64,
    /// The number of writes in a second.
    writes: f64,
    /// The number of pages that the line carries in a second.
    wire: f64,
}

impl Series {
    /// Returns what is sent in all rounds up to the first that is not larger than `last`, which is sent in the pause.
    fn sent_until(&self, last: f64) -> Result<f64> {
        let (mut round, mut sent) = (self.pages, self.pages);
        for _ in 0..MOST_ROUNDS {
            if round <= last.max(1.0) {
                return Ok(sent);
            }
            let seconds = round / self.wire;
            round = self.working_set * -(-self.writes * seconds / self.working_set).exp_m1();
            sent += round;
        }
        anyhow::bail!("{:.0} writes a second are too many for the line: no rounds would end", self.writes)
    }
}

/// Returns the smallest of these values that 9 of 10 do not exceed.
fn nine_of_ten(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() * 9).div_ceil(10).max(1) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_a_geometric_series_where_the_working_set_is_large() {
        let guest = Series { pages: 1000.0, working_set: 1e9, writes: 50.0, wire: 100.0 };
        let all = guest.sent_until(0.0).expect("an end");
        assert!((all - 2000.0).abs() < 2.0, "{all}");
        let some = guest.sent_until(250.0).expect("an end");
        assert!((some - 1750.0).abs() < 1.0, "1000, 500, and 250 in the pause: {some}");
        let endless = Series { writes: 101.0, ..guest };
        assert!(endless.sent_until(10.0).is_err());
    }

    #[test]
    fn a_page_that_is_written_twice_is_dirty_once() {
        let guest = Series { pages: 1000.0, working_set: 10.0, writes: 1e6, wire: 100.0 };
        assert!((guest.sent_until(10.0).expect("an end") - 1010.0).abs() < 1e-6);
    }

    #[test]
    fn one_of_ten_may_be_larger() {
        assert_eq!(nine_of_ten((1..=10).map(f64::from).collect()), 9.0);
        assert_eq!(nine_of_ten(vec![3.0, 1.0]), 3.0);
    }
}
