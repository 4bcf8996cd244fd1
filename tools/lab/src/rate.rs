//! Rates of ports.

use std::fmt;
use std::str::FromStr;

use anyhow::{Error, Result, ensure};
use memlane_api::units;

/// A data rate above 0, written as `1gbit`, `250mbit`, `64kbit` or `9600bit`, in powers of 1000. It is shown as a whole
/// number, which `tc` reads as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(units::Rate);

impl Rate {
    /// Makes a rate from bits a second.
    ///
    /// # Panics
    ///
    /// If it is 0.
    pub const fn from_bits_per_second(bits_per_second: u64) -> Self {
        assert!(bits_per_second > 0, "a rate is above 0");
        Self(units::Rate(bits_per_second))
    }

    /// Returns the rate in bits a second.
    pub const fn bits_per_second(self) -> u64 {
        self.0.0
    }
}

impl FromStr for Rate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let rate: units::Rate = text.parse()?;
        ensure!(rate.0 > 0, "{text:?} is no rate: it must be above 0");
        Ok(Self(rate))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        for (text, bits_per_second) in
            [("1gbit", 1_000_000_000), ("2500mbit", 2_500_000_000), ("9600bit", 9600), ("64kbit", 64_000)]
        {
            let rate: Rate = text.parse().expect("a rate");
            assert_eq!((rate.bits_per_second(), rate.to_string().as_str()), (bits_per_second, text));
        }
        for (text, written) in [("1000Mbit", "1gbit"), (" 1 gbit", "1gbit"), ("2.5gbit", "2500mbit")] {
            assert_eq!(text.parse::<Rate>().expect("a rate").to_string(), written);
        }
    }

    #[test]
    fn refuses_what_is_not_a_rate() {
        for text in ["", "1", "gbit", "0gbit", "-1gbit", "1gbyte", "99999999999999gbit"] {
            let error = text.parse::<Rate>().expect_err(text);
            assert!(error.to_string().contains("is no rate"), "{error}");
        }
    }
}
