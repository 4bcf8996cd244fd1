//! The text of a report for people: a table of the figures, and the ratios with their meaning.

use std::fmt;

use super::figures::Words;
use super::{NamedFigures, ScenarioReport, Spread};

/// The width of the narrowest column of figures.
const LEAST_WIDTH: usize = 8;

impl fmt::Display for ScenarioReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.scenario, self.headline)?;
        writeln!(f)?;
        self.write_table(f)?;
        if !self.ratios.is_empty() {
            writeln!(f)?;
        }
        let names = self.ratios.iter().map(|ratio| ratio.name.len()).max().unwrap_or(0);
        for ratio in &self.ratios {
            writeln!(f, "  {:<names$}  {:<22}  {}", ratio.name, ratio.spread.to_string(), ratio.meaning)?;
        }
        for note in &self.notes {
            writeln!(f, "  {note}")?;
        }
        write!(f, "  median (least–most); GB and Gbit are powers of ten")
    }
}

impl ScenarioReport {
    /// Writes a line for each case, with a column for each figure.
    fn write_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.table();
        let width = |column: usize| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0).max(if column == 0 { 0 } else { LEAST_WIDTH })
        };
        let widths: Vec<usize> = (0..rows.first().map_or(0, Vec::len)).map(width).collect();
        for row in &rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                line += &if column == 0 { format!("  {cell:width$}") } else { format!("  {cell:>width$}") };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }

    /// Returns a row of headings, and a row for each case: its name and its figures, empty where there is none.
    pub(crate) fn table(&self) -> Vec<Vec<String>> {
        let cases: Vec<(String, NamedFigures<Spread>)> =
            self.runs.cases().into_iter().map(|case| (case.to_string(), self.runs.spreads(case))).collect();
        let mut columns = self.columns.clone();
        if columns.is_empty() {
            for (name, _) in cases.iter().flat_map(|(_, figures)| figures.iter()) {
                if !columns.contains(&name) {
                    columns.push(name);
                }
            }
        }
        let headings = columns.iter().map(|column| Words(column).to_string());
        let mut rows = vec![[String::new()].into_iter().chain(headings).collect()];
        for (name, figures) in cases {
            let cell = |column| figures.value(column).map_or_else(String::new, |spread| spread.to_string());
            rows.push([name].into_iter().chain(columns.iter().map(|column| cell(column))).collect());
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::report::{CaseRun, CaseRuns, Contender, NamedFigures, ScenarioReport, Trace};

    #[test]
    fn a_table_has_a_line_for_each_case_and_says_nothing_where_nothing_was_measured() {
        let mut runs = CaseRuns::default();
        for repetition in 1..=2 {
            let mut figures = NamedFigures::from([("gbit_per_second", 12.0 + f64::from(repetition))]);
            let run = |case, figures| CaseRun {
                repetition,
                case,
                figures,
                detail: Value::Null,
                trace: Trace::default(),
            };
            runs.push(run(Contender::Raw.case(""), figures.clone()));
            figures.set("downtime_ms", 7.25);
            runs.push(run(Contender::Memlane.case("fresh"), figures));
        }
        let mut report = ScenarioReport::new("bulk", "one guest".into(), &json!({}), runs).expect("settings");
        report.ratio("vs_raw", vec![0.93], "of what sockets carry");
        report.notes.push("nothing else".into());
        let text = report.to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "bulk: one guest",
                "",
                "                  gbit per second       downtime ms",
                "  memlane fresh  13.5 (13.0–14.0)  7.25 (7.25–7.25)",
                "  raw            13.5 (13.0–14.0)",
                "",
                "  vs_raw  0.930 (0.930–0.930)     of what sockets carry",
                "  nothing else",
                "  median (least–most); GB and Gbit are powers of ten",
            ]
        );
    }
}
