//! A report for people: a table of the figures, and the ratios with what they mean.

use std::fmt;

use super::figures::Words;
use super::{Report, Spread};

/// Narrowest column of figures.
const LEAST_WIDTH: usize = 8;

impl fmt::Display for Report {
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

impl Report {
    /// A line for each case, and a column for each figure.
    fn write_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<(String, super::Figures<Spread>)> =
            self.runs.cases().into_iter().map(|case| (case.to_string(), self.runs.spreads(case))).collect();
        let mut columns = self.columns.clone();
        if columns.is_empty() {
            for (name, _) in rows.iter().flat_map(|(_, figures)| figures.iter()) {
                if !columns.contains(&name) {
                    columns.push(name);
                }
            }
        }
        let names = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let mut lines = vec![format!("  {:names$}", "")];
        lines.extend(rows.iter().map(|(name, _)| format!("  {name:names$}")));
        for column in columns {
            let mut cells = vec![Words(column).to_string()];
            let cell =
                |figures: &super::Figures<Spread>| figures.value(column).map(|spread| spread.to_string());
            cells.extend(rows.iter().map(|(_, figures)| cell(figures).unwrap_or_default()));
            let width = cells.iter().map(|cell| cell.chars().count()).max().unwrap_or(0).max(LEAST_WIDTH);
            for (line, cell) in lines.iter_mut().zip(cells) {
                line.push_str(&format!("  {cell:>width$}"));
            }
        }
        lines.iter().try_for_each(|line| writeln!(f, "{}", line.trim_end()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::report::{By, Figures, Report, Run, Runs};

    #[test]
    fn a_table_has_a_line_for_each_case_and_says_nothing_where_nothing_was_measured() {
        let mut runs = Runs::default();
        for repetition in 1..=2 {
            let mut figures = Figures::from([("gbit_per_second", 12.0 + f64::from(repetition))]);
            runs.push(Run {
                repetition,
                case: By::Raw.case(""),
                figures: figures.clone(),
                detail: Value::Null,
            });
            figures.set("downtime_ms", 7.25);
            runs.push(Run { repetition, case: By::Memlane.case("fresh"), figures, detail: Value::Null });
        }
        let mut report = Report::new("bulk", "one guest".into(), &json!({}), runs).expect("settings");
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
