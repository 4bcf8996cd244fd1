//! Amounts of memory.

use std::fmt;
use std::str::FromStr;

use anyhow::{Error, Result, ensure};
use memlane_api::units;

/// An amount of memory above 0, written as `512MiB` or `2GiB`, in powers of 1024. It is shown as a whole number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(units::Size);

impl Size {
    /// Makes a size from MiB.
    ///
    /// # Panics
    ///
    /// If it is 0.
    pub const fn from_mib(mib: u64) -> Self {
        assert!(mib > 0, "a size is above 0");
        Self(units::Size(mib << 20))
    }

    /// Returns the size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0.0
    }

    /// Returns a part of this size, in whole MiB, but at least one MiB.
    pub fn part(self, divisor: u64) -> Self {
        Self::from_mib(((self.bytes() / divisor) >> 20).max(1))
    }
}

impl FromStr for Size {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let size: units::Size = text.parse()?;
        ensure!(size.0 > 0, "{text:?} is no size: it must be above 0");
        Ok(Self(size))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.0)
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
    fn reads_fractions_and_writes_none() {
        assert_eq!(Size::from_mib(1536).to_string(), "1536MiB");
        for text in ["1536MiB", "1.5GiB", "1536mib", " 1536 MiB"] {
            assert_eq!(text.parse::<Size>().expect("a size"), Size::from_mib(1536));
        }
    }
}
