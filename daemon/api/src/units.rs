//! Durations, rates and sizes as people write them: `300ms`, `250mbit`, `4GiB`.
//!
//! Each is shown in the largest unit that leaves at most three decimals (`1.5GiB`), or none with `{:#}` (`1536MiB`).

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A length of time: a number and one of `us`, `ms`, `s`, `min`, `h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// Bits per second: a number and one of `bit`, `kbit`, `mbit`, `gbit`, `tbit`, in powers of 1000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(pub u64);

/// Bytes: a number and one of `B`, `KiB`, `MiB`, `GiB`, `TiB`, in powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// The error for a text that is not a quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found:?} is no {what}; write {allowed}")]
pub struct BadUnit {
    /// The kind of quantity, such as "rate".
    pub what: &'static str,
    /// The text that was found.
    pub found: String,
    /// The texts that are allowed.
    pub allowed: &'static str,
}

impl Span {
    /// This describes the texts that are allowed.
    pub const ALLOWED: &'static str = "a number and us, ms, s, min or h, such as \"300ms\" or \"1.5s\"";
}

impl Rate {
    /// This describes the texts that are allowed.
    pub const ALLOWED: &'static str =
        "a number and bit, kbit, mbit, gbit or tbit (per second), such as \"250mbit\" or \"2.5gbit\"";

    /// Returns the rate in bytes per second.
    pub fn bytes_per_second(self) -> f64 {
        self.0 as f64 / 8.0
    }
}

impl Size {
    /// This describes the texts that are allowed.
    pub const ALLOWED: &'static str =
        "a number and B, KiB, MiB, GiB or TiB, such as \"256MiB\" or \"1.5GiB\"";
}

// Each unit has its value in the unit that is stored: nanoseconds, bits, bytes.
const SPANS: [(&str, f64); 5] = [("h", 3600e9), ("min", 60e9), ("s", 1e9), ("ms", 1e6), ("us", 1e3)];
const RATES: [(&str, f64); 5] = [("tbit", 1e12), ("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3), ("bit", 1.0)];
const SIZES: [(&str, f64); 5] = [
    ("TiB", (1u64 << 40) as f64),
    ("GiB", (1u64 << 30) as f64),
    ("MiB", (1u64 << 20) as f64),
    ("KiB", (1u64 << 10) as f64),
    ("B", 1.0),
];

impl FromStr for Span {
    type Err = BadUnit;

    fn from_str(text: &str) -> Result<Self, BadUnit> {
        let bad = || BadUnit { what: "length of time", found: shorten(text), allowed: Self::ALLOWED };
        parse(text, &SPANS).map(|nanoseconds| Self(Duration::from_nanos(nanoseconds))).ok_or_else(bad)
    }
}

impl FromStr for Rate {
    type Err = BadUnit;

    fn from_str(text: &str) -> Result<Self, BadUnit> {
        let bad = || BadUnit { what: "rate", found: shorten(text), allowed: Self::ALLOWED };
        parse(text, &RATES).map(Self).ok_or_else(bad)
    }
}

impl FromStr for Size {
    type Err = BadUnit;

    fn from_str(text: &str) -> Result<Self, BadUnit> {
        let bad = || BadUnit { what: "size", found: shorten(text), allowed: Self::ALLOWED };
        parse(text, &SIZES).map(Self).ok_or_else(bad)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanoseconds = u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX);
        f.pad(&display(nanoseconds, &SPANS, f.alternate()))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&display(self.0, &RATES, f.alternate()))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&display(self.0, &SIZES, f.alternate()))
    }
}

fn parse(text: &str, units: &[(&str, f64)]) -> Option<u64> {
    let text = text.trim();
    let unit_at = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = (text[..unit_at].trim_end(), &text[unit_at..]);
    let (_, scale) = units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit))?;
    // f64 would also take "1e3", "+1", "inf" and "nan".
    if number.is_empty() || !number.chars().all(|c| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let value = (number.parse::<f64>().ok()? * scale).round();
    // Beyond 2^53 the number would silently become another one.
    (value <= (1u64 << 53) as f64).then_some(value as u64)
}

/// Formats a value in the largest unit that leaves at most three decimals, or none if `whole`.
fn display(value: u64, units: &[(&str, f64)], whole: bool) -> String {
    let smallest = units[units.len() - 1];
    let parts = if whole { 1.0 } else { 1000.0 };
    let (name, scale) = units
        .iter()
        .copied()
        .find(|(_, scale)| {
            let shown = value as f64 / scale * parts;
            shown >= parts && shown.fract() == 0.0
        })
        .unwrap_or(smallest);
    format!("{}{name}", value as f64 / scale)
}

fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_people_write() {
        assert_eq!("300ms".parse(), Ok(Span(Duration::from_millis(300))));
        assert_eq!("1.5s".parse(), Ok(Span(Duration::from_millis(1500))));
        assert_eq!("2 min".parse(), Ok(Span(Duration::from_secs(120))));
        assert_eq!("250mbit".parse(), Ok(Rate(250_000_000)));
        assert_eq!("2.5gbit".parse(), Ok(Rate(2_500_000_000)));
        assert_eq!("1Gbit".parse(), Ok(Rate(1_000_000_000)));
        assert_eq!("1GiB".parse(), Ok(Size(1 << 30)));
        assert_eq!("1.5MiB".parse(), Ok(Size(3 << 19)));
        assert_eq!("0B".parse(), Ok(Size(0)));
    }

    #[test]
    fn refuses_the_rest_and_says_what_is_allowed() {
        for bad in ["", "300", "ms", "-1s", "1e3s", "nan s", "1.2.3s", "1 fortnight", "99999999999h", "1GB"] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
        let message = "fast".parse::<Rate>().unwrap_err().to_string();
        assert!(message.contains("\"fast\" is no rate") && message.contains("gbit"), "{message}");
    }

    #[test]
    fn shows_the_unit_that_fits() {
        assert_eq!(Span(Duration::from_millis(300)).to_string(), "300ms");
        assert_eq!(Span(Duration::from_millis(1500)).to_string(), "1.5s");
        assert_eq!(Rate(250_000_000).to_string(), "250mbit");
        assert_eq!(Size(1 << 30).to_string(), "1GiB");
        assert_eq!(Size(0).to_string(), "0B");
        assert_eq!(
            (format!("{:#}", Size(3 << 29)), Size(3 << 29).to_string()),
            ("1536MiB".into(), "1.5GiB".into())
        );
        assert_eq!(format!("{:#}", Rate(2_500_000_000)), "2500mbit");
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,40}") {
            let _ = text.parse::<Span>();
            let _ = text.parse::<Rate>();
            let _ = text.parse::<Size>();
        }

        #[test]
        fn what_is_shown_is_read_again(value in 0u64..1 << 50) {
            prop_assert_eq!(Rate(value).to_string().parse(), Ok(Rate(value)));
            prop_assert_eq!(Size(value).to_string().parse(), Ok(Size(value)));
            prop_assert_eq!(format!("{:#}", Size(value)).parse(), Ok(Size(value)));
            let span = Span(Duration::from_micros(value / 1000));
            prop_assert_eq!(span.to_string().parse(), Ok(span));
        }
    }
}
