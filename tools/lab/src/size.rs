//! Amounts of memory.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Error, Result, ensure};

/// An amount of memory above 0, written as `512MiB` or `2GiB`, in powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size {
    bytes: u64,
}

const UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

impl Size {
    /// Makes a size from MiB.
    ///
    /// # Panics
    ///
    /// If it is 0.
    pub const fn from_mib(mib: u64) -> Self {
        assert!(mib > 0, "a size is above 0");
        Self { bytes: mib << 20 }
    }

    /// Returns the size in bytes.
    pub const fn bytes(self) -> u64 {
        self.bytes
    }

    /// Returns a part of this size, in whole MiB, but at least one MiB.
    pub fn part(self, divisor: u64) -> Self {
        Self::from_mib(((self.bytes / divisor) >> 20).max(1))
    }
}

impl FromStr for Size {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let explain = || format!("{text:?} is no size: write it as 512MiB or 2GiB");
        let (digits, factor) = UNITS
            .iter()
            .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, *factor)))
            .with_context(explain)?;
        let number: u64 = digits.trim().parse().with_context(explain)?;
        let bytes = number.checked_mul(factor).with_context(explain)?;
        ensure!(bytes > 0, explain());
        Ok(Self { bytes })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = UNITS
            .into_iter()
            .find(|(_, factor)| self.bytes.is_multiple_of(*factor))
            .expect("every number is a multiple of the last factor, 1");
        write!(f, "{}{unit}", self.bytes / factor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        for (text, bytes) in [("512MiB", 512 << 20), ("2GiB", 2 << 30), ("24TiB", 24 << 40), ("4097B", 4097)]
        {
            let size: Size = text.parse().expect("a size");
            assert_eq!((size.bytes(), size.to_string().as_str()), (bytes, text));
        }
        for text in ["", "1", "GiB", "0MiB", "-1MiB", "1GB", "99999999999GiB"] {
            let error = text.parse::<Size>().expect_err(text);
            assert!(error.to_string().contains("is no size"), "{error}");
        }
        assert_eq!(Size::from_mib(1).part(4), Size::from_mib(1));
    }

    #[test]
    fn writes_no_fractions_since_memlane_vmm_reads_none() {
        assert_eq!(Size::from_mib(1536).to_string(), "1536MiB");
        for text in ["1.5GiB", "1gib", "1 MiB "] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!(" 1 MiB".parse::<Size>().expect("a size"), Size::from_mib(1));
    }
}
