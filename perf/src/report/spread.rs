//! [`Spread`]: several measurements of one thing.

use std::fmt;

use serde::Serialize;

/// Several measurements of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The middle value, or the mean of the two in the middle.
    pub median: f64,
    /// The smallest value.
    pub min: f64,
    /// The largest value.
    pub max: f64,
}

impl Spread {
    /// # Panics
    ///
    /// If there are no values.
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (last, middle) = (values.len() - 1, values.len() / 2);
        let median = (values[middle] + values[last - middle]) / 2.0;
        Self { median, min: values[0], max: values[last] }
    }

    /// Formats all values, multiplied by `factor`.
    pub(crate) fn text(self, factor: f64, digits: usize) -> String {
        let Self { median, min, max } = self;
        let [median, min, max] = [median, min, max].map(|value| value * factor);
        format!("{median:.digits$} ({min:.digits$}–{max:.digits$})")
    }
}

/// Formats all values with three significant digits, or with all digits before the point.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = match self.median.abs() {
            100.0.. => 0,
            10.0.. => 1,
            1.0.. => 2,
            0.0 => 0,
            _ => 3,
        };
        f.pad(&self.text(1.0, digits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_have_a_middle() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 5.0]), Spread { median: 3.0, min: 1.0, max: 5.0 });
        assert_eq!(Spread::of(vec![4.0, 1.0]), Spread { median: 2.5, min: 1.0, max: 4.0 });
        assert_eq!(Spread::of(vec![7.0]), Spread { median: 7.0, min: 7.0, max: 7.0 });
        assert_eq!(Spread::of(vec![0.001, 0.003]).text(1e3, 1), "2.0 (1.0–3.0)");
        let texts = [1234.5, 12.345, 1.2345, 0.12345, 0.0].map(|value| Spread::of(vec![value]).to_string());
        let expected =
            ["1234 (1234–1234)", "12.3 (12.3–12.3)", "1.23 (1.23–1.23)", "0.123 (0.123–0.123)", "0 (0–0)"];
        assert_eq!(texts, expected);
    }
}
