//! What an order allows a migration to do.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// What an order allows a migration to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// The longest pause that the guest may see.
    pub downtime_limit: Duration,
    /// The largest number of iterations, including those with a stunned guest.
    pub max_iterations: u32,
    /// What to do about a guest that outruns the lanes.
    pub converge: Converge,
    /// The largest share of its rate of writes that a guest may lose to a stun, in percent: 0 to 99.
    pub max_stun_percent: u8,
    /// When post-copy begins even for a guest that does not outrun the lanes, if ever.
    pub postcopy: Option<Postcopy>,
}

/// What to do about a guest that writes faster than the lanes deliver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Converge {
    /// The guest is left where it is.
    None,
    /// The guest is stunned within [`Policy::max_stun_percent`]. If that is not enough, it is left where it is.
    Stun,
    /// The guest runs at the destination while the rest of its memory is fetched.
    Postcopy,
    /// The guest is stunned within [`Policy::max_stun_percent`]. If that is not enough, post-copy begins.
    Auto,
}

/// When post-copy begins, whatever the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Postcopy {
    /// Post-copy begins before any iteration.
    Now,
    /// Post-copy begins after the first iteration.
    Hybrid,
}

/// A word does not name a [`Converge`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no way to converge: use `stun`, `postcopy`, `auto` or `none`")]
pub struct UnknownConverge(pub String);

/// A word does not name a [`Postcopy`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no moment for post-copy: use `now` or `hybrid`")]
pub struct UnknownPostcopy(pub String);

impl Default for Policy {
    fn default() -> Self {
        Self {
            downtime_limit: Duration::from_millis(300),
            max_iterations: 50,
            converge: Converge::None,
            max_stun_percent: 99,
            postcopy: None,
        }
    }
}

impl Policy {
    /// Returns the share of its rate of writes that a guest keeps at least.
    pub(super) fn kept_share(&self) -> f64 {
        f64::from(100 - self.max_stun_percent.min(99)) / 100.0
    }
}

impl Converge {
    const ALL: [Self; 4] = [Self::None, Self::Stun, Self::Postcopy, Self::Auto];

    pub(super) fn may_stun(self) -> bool {
        matches!(self, Self::Stun | Self::Auto)
    }

    pub(super) fn may_postcopy(self) -> bool {
        matches!(self, Self::Postcopy | Self::Auto)
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Stun => "stun",
            Self::Postcopy => "postcopy",
            Self::Auto => "auto",
        }
    }
}

impl fmt::Display for Converge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Converge {
    type Err = UnknownConverge;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|converge| converge.as_str() == word);
        known.ok_or_else(|| UnknownConverge(word.chars().take(40).collect()))
    }
}

impl Postcopy {
    const ALL: [Self; 2] = [Self::Now, Self::Hybrid];

    fn as_str(self) -> &'static str {
        match self {
            Self::Now => "now",
            Self::Hybrid => "hybrid",
        }
    }
}

impl fmt::Display for Postcopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Postcopy {
    type Err = UnknownPostcopy;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|postcopy| postcopy.as_str() == word);
        known.ok_or_else(|| UnknownPostcopy(word.chars().take(40).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_back() {
        for converge in Converge::ALL {
            assert_eq!(converge.to_string().parse(), Ok(converge));
        }
        for postcopy in Postcopy::ALL {
            assert_eq!(postcopy.to_string().parse(), Ok(postcopy));
        }
        let error = "never".parse::<Converge>().expect_err("no such way");
        assert!(error.to_string().contains("`stun`, `postcopy`, `auto` or `none`"), "{error}");
        let error = "later".parse::<Postcopy>().expect_err("no such moment");
        assert!(error.to_string().contains("`now` or `hybrid`"), "{error}");
    }

    #[test]
    fn a_guest_always_keeps_something() {
        let kept = |max_stun_percent| Policy { max_stun_percent, ..Policy::default() }.kept_share();
        assert_eq!((kept(0), kept(75), kept(99), kept(100), kept(255)), (1.0, 0.25, 0.01, 0.01, 0.01));
    }
}
