//! [`Unit`]: values as people read them.

/// The unit of a value. Multiples are powers of ten throughout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// The value is in hundredths of something.
    Percent,
    Seconds,
    Bytes,
    /// The value is in bits a second on a network.
    BitsPerSecond,
    PagesPerSecond,
}

/// A multiple of a unit, for all the values of one axis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Multiple {
    factor: f64,
    name: &'static str,
}

impl Unit {
    /// Formats a value with its unit, to three digits.
    pub(crate) fn text(self, value: f64) -> String {
        let multiple = self.multiple(value.abs());
        format!("{} {}", digits(value / multiple.factor), multiple.name)
    }

    /// Returns the multiple that fits values up to `largest` best.
    pub(crate) fn multiple(self, largest: f64) -> Multiple {
        let multiples: &[(f64, &'static str)] = match self {
            Self::Percent => &[(0.01, "%")],
            Self::Seconds => &[(1e-6, "µs"), (1e-3, "ms"), (1.0, "s")],
            Self::Bytes => &[(1.0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB")],
            Self::BitsPerSecond => &[(1.0, "bit/s"), (1e3, "kbit/s"), (1e6, "Mbit/s"), (1e9, "Gbit/s")],
            Self::PagesPerSecond => &[
                (1.0, "pages/s"),
                (1e3, "thousand pages/s"),
                (1e6, "million pages/s"),
                (1e9, "billion pages/s"),
            ],
        };
        // 0.9995 is told as 1 of the next.
        let fits = multiples.iter().rev().find(|(factor, _)| largest >= factor * 0.9995);
        let &(factor, name) = fits.unwrap_or(match largest > 0.0 {
            true => &multiples[0],
            false => multiples.iter().find(|(factor, _)| *factor == 1.0).unwrap_or(&multiples[0]),
        });
        Multiple { factor, name }
    }
}

impl Multiple {
    /// Formats a value without its unit, as an axis has it.
    pub(crate) fn number(&self, value: f64) -> String {
        let value = value / self.factor;
        // An axis has round values: what is beyond nine digits comes from adding them up.
        let text = format!("{:.*}", (9 - magnitude(value)).clamp(0, 9) as usize, value);
        trimmed(&text).replace('-', "\u{2212}")
    }

    /// Formats a value with its unit.
    pub(crate) fn text(&self, value: f64) -> String {
        if self.name.is_empty() {
            self.number(value)
        } else {
            format!("{} {}", self.number(value), self.name)
        }
    }
}

/// Formats a value to three digits, or to the whole number.
pub(crate) fn digits(value: f64) -> String {
    // 0.9995 is told as 1.
    let text = format!("{value:.*}", (2 - magnitude(value * 1.0005)).clamp(0, 4) as usize);
    let text = if value.abs() < 0.9995 { trimmed(&text) } else { text.as_str() };
    text.replace('-', "\u{2212}")
}

/// Returns the number of digits before the point, less one.
fn magnitude(value: f64) -> i32 {
    if value == 0.0 || !value.is_finite() { 0 } else { value.abs().log10().floor() as i32 }
}

fn trimmed(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_told_in_the_unit_that_fits() {
        assert_eq!(Unit::Seconds.text(0.012_34), "12.3 ms");
        assert_eq!(Unit::Seconds.text(0.000_085), "85.0 µs");
        assert_eq!(Unit::Seconds.text(12.0), "12.0 s");
        assert_eq!(Unit::Seconds.text(0.0), "0 s");
        assert_eq!(Unit::BitsPerSecond.text(9.414e9), "9.41 Gbit/s");
        assert_eq!(Unit::BitsPerSecond.text(9.999e8), "1.00 Gbit/s");
        assert_eq!(Unit::Bytes.text(1.5e12), "1.50 TB");
        assert_eq!(Unit::PagesPerSecond.text(10_000.0), "10.0 thousand pages/s");
        assert_eq!(Unit::Percent.text(0.271), "27.1 %");
        assert_eq!([-1.2345, 1234.5, 0.05].map(digits), ["\u{2212}1.23", "1234", "0.05"]);
    }

    #[test]
    fn an_axis_has_one_unit() {
        let multiple = Unit::Seconds.multiple(0.2);
        assert_eq!([0.0, 0.05, 0.1].map(|value| multiple.number(value)), ["0", "50", "100"]);
        assert_eq!((multiple.number(-0.05), multiple.text(0.15)), ("\u{2212}50".into(), "150 ms".into()));
        assert_eq!(Unit::BitsPerSecond.multiple(4e9).number(0.30000000000000004 * 1e9), "0.3");
        assert_eq!(Unit::Percent.multiple(1.5).text(1.0), "100 %");
    }
}
