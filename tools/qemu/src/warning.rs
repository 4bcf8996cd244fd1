//! What keeps a guest from being moved is told, and never keeps it from starting.

use std::fmt;

use memlane_protocol::wire::plain;

/// A part of the command line is left as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Warning {
    /// This was found.
    what: String,
    /// This is what a person can do about it.
    remedy: String,
}

impl Warning {
    /// Returns the warning that something was found, and what a person can do about it.
    pub(crate) fn new(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what: what.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, remedy } = self;
        let text = format!("{what}: the guest starts, but cannot be moved: {remedy}");
        f.write_str(&plain(&text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_is_one_line() {
        let told = Warning::new("/a\nb\u{1b} is no directory", "make it").to_string();
        assert_eq!(told, "/a b\u{fffd} is no directory: the guest starts, but cannot be moved: make it");
    }
}
