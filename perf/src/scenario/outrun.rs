//! `outrun`: a guest that writes as fast as it can, over two shaped ports that carry less.
//!
//! It is moved with each of the ways that Memlane knows for such a guest: **stun** slows its writes until the pause
//! fits, **postcopy** runs it at its destination without all of its memory, and **auto** does the one within bounds and
//! then the other. One of its vCPUs only reads, for whom stun should be no burden.
//!
//! - **stun_released_vs_target**: the rate at which writes were let go, over the rate that was aimed at. Left out if a
//!   guest did not outrun its ports, so that no write had to wait.
//! - **reader_slowdown_percent**: by how much slower the reader was while writes waited than while pages were only sent
//!   (see [`Readers`](memlane_lab::Readers)). Left out if a stun was over before the reader was seen for long enough.
//! - **limit_kept**: the part of all runs in which the pause was within the limit; the pauses themselves are
//!   **stun_downtime_ms**, **postcopy_downtime_ms** and **auto_downtime_ms**.
//!
//! The baseline **raw** asks for single pages over the same ports while nothing moves (see
//! [`rpc`](crate::baseline::rpc)): no page that the guest waits for can come sooner.

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::writer::Writer;
use super::{Bench, CaseResult, Scenario, single_pages};
use crate::memlane::{BenchGuest, MemlaneMove, WriteLoad};
use crate::report::{Case, CaseRun, CaseRuns, Contender, ScenarioReport};

/// The ways that are measured, as `memlanectl migrate --converge` names them.
const WAYS: [&str; 3] = ["stun", "postcopy", "auto"];

/// The options of the scenario.
#[derive(Args, Debug, Clone)]
pub struct OutrunScenario {
    #[command(flatten)]
    writer: Writer,
    /// The largest part of its writing that stun may take from the guest, in percent, if no post-copy follows; before
    /// post-copy the daemon's own limit applies
    #[arg(long, value_name = "PERCENT", default_value_t = 99, value_parser = clap::value_parser!(u8).range(..=99))]
    pub max_stun: u8,
}

impl Scenario for OutrunScenario {
    const NAME: &'static str = "outrun";

    fn measure(&self, bench: &Bench) -> Result<ScenarioReport> {
        let mut rig = bench.rig(self.writer.lab())?;
        // What docs/limits.md recommends for guests that may be stunned.
        let tracker = rig.lab().has_kvm().then_some("ring");
        let guest = BenchGuest { readers: 1, tracker, ..self.writer.guest(rig.lab(), WriteLoad::FlatOut) };
        let max_stun = self.max_stun.to_string();

        let moves = WAYS.map(|way| (Contender::Memlane.case(way), Some(way)));
        let cases: Vec<(Case, Option<&str>)> =
            moves.into_iter().chain([(Contender::Raw.case("page"), None)]).collect();
        let runs = bench.interleave(Self::NAME, &cases, |way| {
            let Some(way) = way else { return single_pages(&rig) };
            let mut order = vec!["--converge", way];
            if *way == "stun" {
                order.extend(["--max-stun", &max_stun]);
            }
            measured(guest.migrate(&mut rig, &order, |_, _| {})?.arrived()?)
        })?;
        self.report(runs)
    }
}

fn measured(moved: MemlaneMove) -> Result<CaseResult> {
    let mut figures = moved.figures()?;
    let limit = moved.number("downtime_limit_seconds")? * 1e3;
    figures.set_some("limit_kept", figures.value("downtime_ms").map(|pause| f64::from(pause <= limit)));
    let stun = &moved.migration["stun"];
    figures.set_some("stun_seconds", stun["seconds"].as_f64());
    let rate = |key: &str| stun[key].as_f64();
    if let (Some(released), Some(target)) =
        (rate("released_pages_per_second"), rate("target_pages_per_second"))
    {
        figures.set("stun_released_vs_target", released / target);
    }
    let slowdown = moved.readers.as_ref().and_then(|readers| readers.slowdown_percent());
    figures.set_some("reader_slowdown_percent", slowdown);
    let postcopy = &moved.migration["postcopy"];
    figures.set_some("fault_p50_us", postcopy["fault_p50_us"].as_f64());
    figures.set_some("fault_p99_us", postcopy["fault_p99_us"].as_f64());
    let readers = moved.readers.as_ref().map(|readers| readers.json());
    let measured = moved.with_figures(figures);
    let detail = json!({ "migration": measured.detail, "readers": readers });
    Ok(CaseResult { detail, ..measured })
}

impl OutrunScenario {
    fn report(&self, runs: CaseRuns) -> Result<ScenarioReport> {
        let cases = WAYS.map(|way| Contender::Memlane.case(way));
        let [stun, ..] = &cases;
        let mut kept = Vec::new();
        let mut ratios = Vec::new();
        for (way, case) in WAYS.into_iter().zip(&cases) {
            kept.extend(runs.values(case, "limit_kept")?);
            ratios.push((
                format!("{way}_downtime_ms"),
                runs.values(case, "downtime_ms")?,
                format!("the pause with {way}"),
            ));
        }
        let kept = kept.iter().sum::<f64>() / kept.len() as f64;
        ratios.push((
            "limit_kept".to_owned(),
            vec![kept],
            "part of all runs whose pause was within the limit".to_owned(),
        ));
        let seen = |run: &CaseRun| run.figures.value("stun_released_vs_target");
        let released: Vec<f64> = runs.of(stun).filter_map(seen).collect();
        let (stunned, all) = (released.len(), runs.of(stun).count());
        if !released.is_empty() {
            let meaning = "writes let go with stun, over what was aimed at".to_owned();
            ratios.push(("stun_released_vs_target".to_owned(), released, meaning));
        }
        if let Ok(slowdown) = runs.values(stun, "reader_slowdown_percent") {
            let meaning = "what stun cost a vCPU that only reads, in percent of its speed".to_owned();
            ratios.push(("reader_slowdown_percent".to_owned(), slowdown, meaning));
        }
        let headline = self.writer.headline("as fast as it can");
        let settings = self.writer.settings([("max_stun_percent", json!(self.max_stun))]);
        let mut report = ScenarioReport::new(Self::NAME, headline, &settings, runs)?;
        for (name, values, meaning) in ratios {
            report.ratio(name, values, meaning);
        }
        if stunned < all {
            report.notes.push(format!(
                "in {} of {all} runs with stun the ports kept up with the guest, and no write had to wait: try a lower \
                 --port-rate",
                all - stunned
            ));
        }
        report.columns = vec![
            "total_seconds",
            "rounds",
            "sent_gb",
            "downtime_ms",
            "stun_seconds",
            "stun_released_vs_target",
            "reader_slowdown_percent",
            "fault_p50_us",
            "fault_p99_us",
            "rpc_p50_us",
            "rpc_p99_us",
        ];
        Ok(report)
    }
}
