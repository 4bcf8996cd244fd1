//! Sizes on the command line.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Error, Result, ensure};

/// A size in bytes above 0, written as `1GiB`, `512MiB`, `64KiB` or a plain number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(usize);

const UNITS: [(&str, usize); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("", 1)];

impl Size {
    /// The size in bytes.
    pub fn bytes(self) -> usize {
        self.0
    }
}

impl FromStr for Size {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let explain =
            || format!("{text:?} is not a size: write it as 1GiB, 512MiB, 64KiB or a number of bytes");
        let (digits, factor) = UNITS
            .into_iter()
            .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))
            .expect("every text ends in the last unit, which is empty");
        let number: usize = digits.trim().parse().with_context(explain)?;
        let bytes = number.checked_mul(factor).with_context(explain)?;
        ensure!(bytes > 0, explain());
        Ok(Self(bytes))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = UNITS
            .into_iter()
            .find(|(_, factor)| self.0.is_multiple_of(*factor))
            .expect("every number is a multiple of the last factor, 1");
        write!(f, "{}{}{unit}", self.0 / factor, if unit.is_empty() { "" } else { " " })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_sizes() {
        for (text, bytes, shown) in
            [("1GiB", 1 << 30, "1 GiB"), ("3 MiB", 3 << 20, "3 MiB"), ("4097", 4097, "4097")]
        {
            let size: Size = text.parse().expect("a size");
            assert_eq!((size.bytes(), size.to_string().as_str()), (bytes, shown));
        }
    }

    #[test]
    fn refuses_what_is_not_a_size() {
        for text in ["", "0", "GiB", "1.5GiB", "-1", "1GB", "99999999999GiB"] {
            let error = text.parse::<Size>().expect_err(text);
            assert!(error.to_string().contains("is not a size"), "{error}");
        }
    }
}
