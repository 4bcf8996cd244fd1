//! The results of a scenario, as JSON and as text.

mod figures;
mod machine;
mod spread;
mod text;
mod waits;

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::{Map, Value, json};

pub use figures::NamedFigures;
pub(crate) use figures::Words;
use machine::MachineInfo;
pub use spread::Spread;
pub use waits::Waits;
pub(crate) use waits::microseconds_within;

use crate::timeline::Timeline;

/// The program that moved a guest, or the work that was done instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Contender {
    /// The daemons moved a guest.
    Memlane,
    /// Bare sockets moved data from memory to memory.
    Raw,
    /// QEMU moved a guest by itself.
    Qemu,
    /// One core copied memory.
    Memcpy,
    /// One core read memory.
    Read,
    /// One core sealed and opened records.
    Cipher,
}

/// One of the things that a scenario measures again and again.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Case {
    /// The contender that did it.
    pub by: Contender,
    /// The way in which it was done, or what was special about it: `fresh`, `multifd4`.
    pub how: String,
}

/// One measurement of one case.
#[derive(Debug, Clone, Serialize)]
pub struct CaseRun {
    /// The number of the repetition, counted from 1.
    pub repetition: u32,
    /// The case that was measured.
    #[serde(flatten)]
    pub case: Case,
    /// The figures that were found.
    pub figures: NamedFigures,
    /// Further results, such as the migration as the daemon reports it.
    pub detail: Value,
    /// The data of the pictures.
    #[serde(skip)]
    pub trace: Trace,
}

/// The events of a measurement from moment to moment, for its pictures. They are left out of the JSON, where they would
/// be long.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    /// The timeline of a move.
    pub timeline: Option<Timeline>,
    /// The time that each page took that the guest or the client waited for.
    pub waits: Option<Waits>,
}

/// All measurements of a scenario.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(transparent)]
pub struct CaseRuns(Vec<CaseRun>);

/// A figure that tells how good Memlane is, mostly against a baseline.
#[derive(Debug, Clone, Serialize)]
pub struct Ratio {
    /// The name of the ratio.
    pub name: String,
    /// The meaning of the ratio.
    pub meaning: String,
    /// The values of all repetitions. Their median is the ratio.
    pub spread: Spread,
}

/// The results of a scenario. GB and Gbit are powers of ten.
#[derive(Debug, Clone)]
pub struct ScenarioReport {
    /// The scenario's name.
    pub scenario: &'static str,
    /// The subject of the measurement, in a line or two.
    pub headline: String,
    /// The options of the scenario, and the properties of the machine.
    pub settings: Map<String, Value>,
    /// The ratios that follow from the figures.
    pub ratios: Vec<Ratio>,
    /// The single measurements.
    pub runs: CaseRuns,
    /// The names of the figures that people are shown; all if none are named.
    pub columns: Vec<&'static str>,
    /// Further remarks.
    pub notes: Vec<String>,
}

impl Contender {
    /// Returns the name that JSON uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memlane => "memlane",
            Self::Raw => "raw",
            Self::Qemu => "qemu",
            Self::Memcpy => "memcpy",
            Self::Read => "read",
            Self::Cipher => "cipher",
        }
    }

    /// Returns a case of this contender.
    pub fn case(self, how: impl Into<String>) -> Case {
        Case { by: self, how: how.into() }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(format!("{} {}", self.by.as_str(), self.how).trim_end())
    }
}

impl CaseRuns {
    /// Adds a measurement.
    pub fn push(&mut self, run: CaseRun) {
        self.0.push(run);
    }

    /// Returns all measurements, in the order in which they were done.
    pub fn iter(&self) -> impl Iterator<Item = &CaseRun> + Clone {
        self.0.iter()
    }

    /// Returns the measurements of one case, from the first repetition on.
    pub fn of<'a>(&'a self, case: &'a Case) -> impl Iterator<Item = &'a CaseRun> + Clone {
        self.iter().filter(move |run| run.case == *case)
    }

    /// Returns each case once, in the order of their names.
    pub fn cases(&self) -> Vec<&Case> {
        let mut cases: Vec<&Case> = self.iter().map(|run| &run.case).collect();
        cases.sort();
        cases.dedup();
        cases
    }

    /// Returns one figure of a case, each time it was measured.
    ///
    /// # Errors
    ///
    /// If a run lacks it, or there is none.
    pub fn values(&self, case: &Case, figure: &str) -> Result<Vec<f64>> {
        let value = |run: &CaseRun| {
            run.figures.value(figure).with_context(|| format!("a run of {case} has no {figure}"))
        };
        let values: Vec<f64> = self.of(case).map(value).collect::<Result<_>>()?;
        ensure!(!values.is_empty(), "nothing was measured of {case}");
        Ok(values)
    }

    /// Returns one figure of a case over a figure of another, for each repetition. If a case comes several times in one
    /// repetition, its median counts.
    ///
    /// # Errors
    ///
    /// As [`CaseRuns::values`]; and if the two were not repeated as often.
    pub fn quotients(&self, over: (&Case, &str), under: (&Case, &str)) -> Result<Vec<f64>> {
        let (above, below) = (self.medians(over.0, over.1)?, self.medians(under.0, under.1)?);
        ensure!(above.keys().eq(below.keys()), "{} and {} were not repeated as often", over.0, under.0);
        Ok(above.values().zip(below.values()).map(|(above, below)| above / below).collect())
    }

    /// Returns the medians of one figure of a case by repetition.
    ///
    /// # Errors
    ///
    /// As [`CaseRuns::values`].
    pub fn medians(&self, case: &Case, figure: &str) -> Result<BTreeMap<u32, f64>> {
        let mut values: BTreeMap<u32, Vec<f64>> = BTreeMap::new();
        for (run, value) in self.of(case).zip(self.values(case, figure)?) {
            values.entry(run.repetition).or_default().push(value);
        }
        Ok(values.into_iter().map(|(repetition, values)| (repetition, Spread::of(values).median)).collect())
    }

    /// Returns that of these cases whose median of `figure` is largest.
    ///
    /// # Errors
    ///
    /// As [`CaseRuns::values`]; and if there are no cases.
    pub fn best<'a>(&self, cases: impl IntoIterator<Item = &'a Case>, figure: &str) -> Result<&'a Case> {
        let mut best: Option<(&Case, f64)> = None;
        for case in cases {
            let median = Spread::of(self.values(case, figure)?).median;
            if best.is_none_or(|(_, most)| median > most) {
                best = Some((case, median));
            }
        }
        best.map(|(case, _)| case).with_context(|| format!("there is no case whose {figure} could be best"))
    }

    /// Returns one figure of a case over all repetitions that have it.
    pub(crate) fn spread(&self, case: &Case, figure: &str) -> Option<Spread> {
        self.spreads(case).value(figure)
    }

    fn spreads(&self, case: &Case) -> NamedFigures<Spread> {
        NamedFigures::over(self.of(case).map(|run| &run.figures))
    }
}

impl ScenarioReport {
    /// Makes a report, still without ratios.
    ///
    /// # Errors
    ///
    /// If the settings are not to be had as JSON.
    pub fn new(
        scenario: &'static str,
        headline: String,
        settings: &impl Serialize,
        runs: CaseRuns,
    ) -> Result<Self> {
        let mut settings = match serde_json::to_value(settings).context("writing the settings as JSON")? {
            Value::Object(settings) => settings,
            other => Map::from_iter([("settings".to_owned(), other)]),
        };
        settings.insert("machine".to_owned(), json!(MachineInfo::this()));
        Ok(Self {
            scenario,
            headline,
            settings,
            ratios: Vec::new(),
            runs,
            columns: Vec::new(),
            notes: Vec::new(),
        })
    }

    /// Adds a ratio: its values in all repetitions, of which there is at least one, and its meaning.
    pub fn ratio(&mut self, name: impl Into<String>, values: Vec<f64>, meaning: impl Into<String>) {
        self.ratios.push(Ratio { name: name.into(), meaning: meaning.into(), spread: Spread::of(values) });
    }

    /// Returns the report as one JSON object: `ratios` has the medians of the ratios, `spread` the same with least and
    /// most, `memlane` the figures of Memlane by case, `baselines` those of each baseline by case, and `runs` every
    /// single measurement.
    pub fn json(&self) -> Value {
        let by_name = |value: fn(&Ratio) -> Value| -> Map<String, Value> {
            self.ratios.iter().map(|ratio| (ratio.name.clone(), value(ratio))).collect()
        };
        let mut memlane = Map::new();
        let mut baselines: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
        for case in self.runs.cases() {
            let figures = json!(self.runs.spreads(case));
            let place = match case.by {
                Contender::Memlane => &mut memlane,
                by => baselines.entry(by.as_str()).or_default(),
            };
            place.insert(case.how.clone(), figures);
        }
        json!({
            "scenario": self.scenario,
            "settings": self.settings,
            "ratios": by_name(|ratio| json!(ratio.spread.median)),
            "spread": by_name(|ratio| json!(ratio.spread)),
            "meaning": by_name(|ratio| json!(ratio.meaning)),
            "memlane": memlane,
            "baselines": baselines,
            "notes": self.notes,
            "runs": self.runs,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(repetition: u32, case: Case, rate: f64) -> CaseRun {
        let figures = NamedFigures::from([("gbit_per_second", rate), ("total_seconds", 16.0 / rate)]);
        CaseRun { repetition, case, figures, detail: Value::Null, trace: Trace::default() }
    }

    /// Two repetitions of Memlane and of two kinds of QEMU.
    fn runs() -> CaseRuns {
        let mut runs = CaseRuns::default();
        for (repetition, rates) in [(1, [8.0, 4.0, 5.0]), (2, [6.0, 4.0, 3.0])] {
            let cases = [
                Contender::Memlane.case("prepared"),
                Contender::Qemu.case("plain"),
                Contender::Qemu.case("multifd4"),
            ];
            for (case, rate) in cases.into_iter().zip(rates) {
                runs.push(run(repetition, case, rate));
            }
        }
        runs
    }

    #[test]
    fn ratios_are_of_what_was_measured_in_the_same_repetition() {
        let runs = runs();
        let (memlane, plain, multifd) = (
            Contender::Memlane.case("prepared"),
            Contender::Qemu.case("plain"),
            Contender::Qemu.case("multifd4"),
        );
        let quotients = |case| runs.quotients((&memlane, "gbit_per_second"), (case, "gbit_per_second"));
        assert_eq!(quotients(&plain).expect("figures"), [2.0, 1.5]);
        assert_eq!(quotients(&multifd).expect("figures"), [1.6, 2.0]);
        assert!(quotients(&Contender::Raw.case("")).is_err());
        let mut runs = runs.clone();
        for rate in [1.0, 4.0] {
            runs.push(run(2, Contender::Memlane.case("prepared"), rate));
        }
        let of_medians = runs.quotients((&memlane, "gbit_per_second"), (&plain, "gbit_per_second"));
        assert_eq!(of_medians.expect("figures"), [2.0, 1.0]);
        runs.push(run(3, memlane.clone(), 1.0));
        assert!(runs.quotients((&memlane, "gbit_per_second"), (&plain, "gbit_per_second")).is_err());
        assert!(runs.values(&plain, "none").unwrap_err().to_string().contains("qemu plain has no none"));
        let best = runs.best([&multifd, &plain], "gbit_per_second").expect("cases");
        assert_eq!(best, &multifd, "of two that are equal the first");
    }

    #[test]
    fn json_has_what_programs_look_for() {
        let mut report =
            ScenarioReport::new("bulk", "a guest".into(), &json!({ "ports": 2 }), runs()).expect("settings");
        report.ratio("vs_qemu", vec![1.6, 2.0, 1.5], "how many times faster");
        let json = report.json();
        assert_eq!((&json["scenario"], &json["settings"]["ports"]), (&json!("bulk"), &json!(2)));
        assert_eq!(
            (&json["ratios"]["vs_qemu"], &json["spread"]["vs_qemu"]["max"]),
            (&json!(1.6), &json!(2.0))
        );
        assert_eq!(json["memlane"]["prepared"]["gbit_per_second"]["median"], 7.0);
        assert_eq!(json["baselines"]["qemu"]["multifd4"]["total_seconds"]["min"], 3.2);
        assert_eq!(json["runs"].as_array().map(Vec::len), Some(6));
        assert_eq!((&json["runs"][1]["by"], &json["runs"][1]["how"]), (&json!("qemu"), &json!("plain")));
    }
}
