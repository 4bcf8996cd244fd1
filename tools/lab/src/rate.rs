//! Rates as `tc` writes them.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Error, Result, ensure};

/// A data rate, written as `tc` does: `1gbit`, `250mbit`, `64kbit` or `9600bit`, in powers of 1000.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    bits_per_second: u64,
}

const UNITS: [(&str, u64); 4] = [("gbit", 1_000_000_000), ("mbit", 1_000_000), ("kbit", 1000), ("bit", 1)];

impl Rate {
    /// Makes a rate from bits a second.
    ///
    /// # Panics
    ///
    /// If it is 0.
    pub const fn from_bits_per_second(bits_per_second: u64) -> Self {
        assert!(bits_per_second > 0, "a rate is above 0");
        Self { bits_per_second }
    }

    /// Returns the rate in bits a second.
    pub const fn bits_per_second(self) -> u64 {
        self.bits_per_second
    }
}

impl FromStr for Rate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let explain = || format!("{text:?} is not a rate: write it as 1gbit, 250mbit, 64kbit or 9600bit");
        let lower = text.to_ascii_lowercase();
        let (digits, factor) = UNITS
            .iter()
            .find_map(|(unit, factor)| Some((lower.strip_suffix(unit)?, *factor)))
            .with_context(explain)?;
        let number: u64 = digits.trim().parse().with_context(explain)?;
        let bits_per_second = number.checked_mul(factor).with_context(explain)?;
        ensure!(bits_per_second > 0, explain());
        Ok(Self { bits_per_second })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = UNITS
            .into_iter()
            .find(|(_, factor)| self.bits_per_second.is_multiple_of(*factor))
            .expect("every number is a multiple of the last factor, 1");
        write!(f, "{}{unit}", self.bits_per_second / factor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        for (text, bits_per_second) in
            [("1gbit", 1_000_000_000), ("2500mbit", 2_500_000_000), ("9600bit", 9600)]
        {
            let rate: Rate = text.parse().expect("a rate");
            assert_eq!(rate.bits_per_second(), bits_per_second);
            assert_eq!(rate.to_string().parse::<Rate>().expect("a rate"), rate);
        }
        assert_eq!("1000Mbit".parse::<Rate>().expect("a rate").to_string(), "1gbit");
    }

    #[test]
    fn refuses_what_is_not_a_rate() {
        for text in ["", "1", "gbit", "0gbit", "-1gbit", "1gbyte", "1.5gbit", "99999999999999gbit"] {
            let error = text.parse::<Rate>().expect_err(text);
            assert!(error.to_string().contains("is not a rate"), "{error}");
        }
    }
}
