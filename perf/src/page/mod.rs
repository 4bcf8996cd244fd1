//! One file of HTML with everything that scenarios found, and pictures of it.
//!
//! It needs nothing from elsewhere: no scripts, no fonts, no network. Its pictures are SVG, and follow the light or the
//! dark that the reader's system is set to.

mod faults;
mod guest;
mod html;
mod ports;
mod prediction;
mod ratios;
mod rounds;
mod targets;

use serde_json::Value;

use crate::picture::Picture;
use crate::report::{Case, CaseRun, Contender, ScenarioReport, Words};
use crate::timeline::Timeline;

use faults::Distribution;
use html::{Figure, HtmlTable, Section};
use prediction::PredictedPause;
use ratios::Aim;

/// The largest error that predictions of downtime should have, in seconds.
const PREDICTION: f64 = 0.02;
/// The number of moves of a scenario that are shown from moment to moment, one of each case.
const MOVES: usize = 4;

/// Returns the page as the text of a file.
pub fn page(reports: &[ScenarioReport]) -> String {
    let mut sections = Vec::new();
    if let [_, _, ..] = reports {
        sections.push(summary(reports));
    }
    sections.extend(reports.iter().map(section));
    html::page("Memlane, measured", &machine(reports), &sections)
}

/// Returns the picture of the first run that shows what a move did to the guest, as the text of a file.
pub fn picture(reports: &[ScenarioReport]) -> Option<String> {
    let runs = reports.iter().flat_map(|report| report.runs.iter());
    let drawn = runs.filter_map(|run| guest::draw(run.trace.timeline.as_ref()?)).next()?;
    Some(drawn.file())
}

/// Describes all scenarios side by side.
fn summary(reports: &[ScenarioReport]) -> Section {
    let mut section = Section { name: "Summary".into(), ..Section::default() };
    let aims: Vec<Aim<'_>> = reports.iter().flat_map(targets::of).collect();
    section.show(
        ratios::draw(&aims),
        "Dots are medians, lines reach from the least to the most of all repetitions. To the right is better, \
         whether a figure is to be large or small.",
    );
    let pauses: Vec<PredictedPause> =
        reports.iter().flat_map(|report| pauses(report, |_| report.scenario.to_owned())).collect();
    section.show(prediction::draw(&pauses, PREDICTION), CAPTION_OF_PREDICTIONS);
    section
}

const CAPTION_OF_PREDICTIONS: &str = "Each dot is a move. On the diagonal the guest stood still for as long as was \
    predicted when the pause began; the band is 20 ms to either side.";

fn section(report: &ScenarioReport) -> Section {
    let lead = std::iter::once(&report.headline).chain(&report.notes).cloned().collect();
    let mut section = Section { name: report.scenario.to_owned(), lead, ..Section::default() };
    let aims: Vec<Aim<'_>> = targets::of(report);
    section.show(
        ratios::draw(&aims),
        "Dots are medians, lines reach from the least to the most of all repetitions.",
    );
    for (case, timeline) in moves(report) {
        section.show(
            guest::draw(timeline),
            &format!(
                "{case}. Counted by the guest itself; at the right, the pause close up. The dashed line is what it did before \
                 the order."
            ),
        );
        section.show(ports::draw(timeline), &format!("{case}. As the destination's kernel counts it."));
        let caption = format!("{case}. What is dirtied in one round is sent in the next, or in the pause.");
        section.show(rounds::draw(&timeline.course).filter(|_| timeline.course.rounds.len() > 2), &caption);
    }
    section.show(
        faults::draw(&distributions(report)),
        "From when the access was seen until the page was in place; for the raw probe, from the request over an idle \
         connection until the page was there.",
    );
    if report.ratios.iter().any(|ratio| ratio.name.starts_with("prediction_error")) {
        let pauses: Vec<PredictedPause> = pauses(report, |case| case.how.clone()).collect();
        section.show(prediction::draw(&pauses, PREDICTION), CAPTION_OF_PREDICTIONS);
    }
    section.tables = tables(report);
    section
}

/// Finds for each of Memlane's cases the move that took as long as the median of them.
fn moves(report: &ScenarioReport) -> Vec<(String, &Timeline)> {
    let seconds = |run: &CaseRun| run.figures.value("total_seconds").unwrap_or(0.0);
    let cases = report.runs.cases().into_iter().filter(|case| case.by == Contender::Memlane);
    let moves = cases.filter_map(|case| {
        let mut runs: Vec<&CaseRun> =
            report.runs.of(case).filter(|run| run.trace.timeline.is_some()).collect();
        runs.sort_by(|one, other| seconds(one).total_cmp(&seconds(other)));
        let run = runs.get(runs.len().checked_sub(1)? / 2)?;
        Some((format!("{case}, repetition {}", run.repetition), run.trace.timeline.as_ref()?))
    });
    moves.take(MOVES).collect()
}

/// Finds the pauses of guests whose memory was all there at the end of the pause.
fn pauses<'a>(
    report: &'a ScenarioReport,
    name: impl Fn(&Case) -> String + 'a,
) -> impl Iterator<Item = PredictedPause> + 'a {
    let runs = report.runs.iter().filter(|run| run.case.by == Contender::Memlane);
    runs.filter(|run| migration(run)["postcopy"].is_null()).filter_map(move |run| {
        let seconds = |key: &str| migration(run)[key].as_f64();
        let (predicted, actual) = (seconds("downtime_predicted_seconds")?, seconds("downtime_seconds")?);
        Some(PredictedPause { case: name(&run.case), predicted, actual })
    })
}

/// Returns the migration, as the daemon reported it at its end. A scenario may report other things beside it.
fn migration(run: &CaseRun) -> &Value {
    run.detail.get("migration").unwrap_or(&run.detail)
}

/// Returns the distribution of the times that pages took, in all repetitions of each case.
fn distributions(report: &ScenarioReport) -> Vec<Distribution> {
    let cases = report.runs.cases().into_iter();
    let distributions = cases.filter_map(|case| {
        let waits = report.runs.of(case).filter_map(|run| run.trace.waits.as_ref());
        let waits = waits.cloned().reduce(|one, other| one.and(&other))?;
        // What was measured run by run is finer than what its buckets tell.
        let median = |names: [&str; 2]| {
            let value = names.into_iter().find_map(|name| report.runs.spread(case, name));
            value.map(|spread| spread.median / 1e6)
        };
        let p50 = median(["fault_p50_us", "rpc_p50_us"]).unwrap_or_else(|| waits.quantile(0.5));
        let p99 = median(["fault_p99_us", "rpc_p99_us"]).unwrap_or_else(|| waits.quantile(0.99));
        Some(Distribution { name: case.to_string(), limit: case.by == Contender::Raw, waits, p50, p99 })
    });
    distributions.collect()
}

fn tables(report: &ScenarioReport) -> Vec<HtmlTable> {
    let ratios = report.ratios.iter().map(|ratio| {
        let target =
            targets::find(report.scenario, &ratio.name).map_or_else(String::new, |target| target.text());
        vec![ratio.name.clone(), ratio.spread.to_string(), target, ratio.meaning.clone()]
    });
    let head = ["", "median (least–most)", "target", ""].map(str::to_owned).into();
    let ratios = HtmlTable { heading: "Ratios".into(), head, rows: ratios.collect() };
    let mut rows = report.table().into_iter();
    let figures =
        HtmlTable { heading: "Figures".into(), head: rows.next().unwrap_or_default(), rows: rows.collect() };
    let settings = report.settings.iter().filter(|(name, _)| *name != "machine").map(|(name, value)| {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        vec![Words(name).to_string(), text]
    });
    let settings = HtmlTable { heading: "Settings".into(), head: Vec::new(), rows: settings.collect() };
    [ratios, figures, settings].into_iter().filter(|table| !table.rows.is_empty()).collect()
}

/// Describes the machine, as the first report does.
fn machine(reports: &[ScenarioReport]) -> String {
    let machine = reports.first().map_or(&Value::Null, |report| &report.settings["machine"]);
    let mut parts = Vec::new();
    if let Some(cpus) = machine["cpus"].as_u64() {
        let processor = machine["processor"].as_str().unwrap_or("of a kind that is not known");
        parts.push(format!("{cpus} processors ({processor})"));
    }
    if let Some(memory_kib) = machine["memory_kib"].as_u64() {
        parts.push(format!("{:.0} GiB of memory", memory_kib as f64 / f64::from(1 << 20)));
    }
    parts.extend(machine["kernel"].as_str().map(|kernel| format!("Linux {kernel}")));
    parts.join(", ")
}

impl Section {
    /// Adds a picture, if there is one.
    fn show(&mut self, picture: Option<Picture>, caption: &str) {
        self.figures.extend(picture.map(|picture| Figure { caption: caption.to_owned(), picture }));
    }
}

#[cfg(test)]
mod tests;
