//! [`Label`] is the name of a guest, host, port or network, on the wire and in memory alike.

use std::fmt;
use std::str::FromStr;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A name of 1 to 63 characters out of `A-Z a-z 0-9 . _ -`, not beginning with a dot or dash.
///
/// Labels are safe in paths, logs, metrics and JSON, so nothing needs quoting later.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label(String);

/// A name is not a [`Label`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the name {0:?} must have 1 to 63 characters of A-Z a-z 0-9 . _ - and begin with a letter or digit")]
pub struct BadLabel(pub String);

/// A label as it travels, padded with NUL to 64 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawLabel([u8; 64]);

impl Label {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn raw(&self) -> RawLabel {
        let mut raw = [0; 64];
        raw[..self.0.len()].copy_from_slice(self.0.as_bytes());
        RawLabel(raw)
    }
}

impl RawLabel {
    pub(crate) fn label(&self) -> Result<Label, BadLabel> {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(self.0.len());
        let name = String::from_utf8_lossy(&self.0[..end]);
        if self.0[end..].iter().any(|byte| *byte != 0) {
            return Err(BadLabel(name.into_owned()));
        }
        name.parse()
    }
}

impl FromStr for Label {
    type Err = BadLabel;

    fn from_str(name: &str) -> Result<Self, BadLabel> {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
        if first && name.len() < 64 && name.chars().all(fits) {
            return Ok(Self(name.to_owned()));
        }
        Err(BadLabel(name.chars().take(80).collect()))
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_names_that_are_safe_everywhere() {
        for good in ["web1", "0", "a.b-c_D", &"x".repeat(63)] {
            let label: Label = good.parse().unwrap();
            assert_eq!(label.raw().label().unwrap(), label);
        }
        for bad in ["", ".", "../x", "-x", "a/b", "a b", "é", "a\0b", &"x".repeat(64)] {
            assert!(bad.parse::<Label>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn refuses_bytes_after_the_padding() {
        let mut raw = "web1".parse::<Label>().unwrap().raw();
        raw.0[40] = b'x';
        assert!(raw.label().is_err());
    }
}
