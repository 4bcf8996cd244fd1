//! What a role writes to its host's journal.

use std::fmt;
use std::str::FromStr;

/// What a role writes to its host's journal, durably, about one migration. The last record counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Record {
    /// Source: the guest is about to be paused and relinquished.
    Leaving,
    /// Source: the destination owns the guest.
    Committed,
    /// Source: the destination needs nothing from this host any more, and the VMM is to be discarded.
    Finished,
    /// Source: the guest was passed on and lost, and the VMM is to be discarded.
    Lost,
    /// Source: the operator gave up what this host has, and the VMM is to be discarded.
    GivenUp,
    /// Source: the destination declined, or the operator decided so, and the source owns the guest again.
    TakenBack,
    /// Destination: the guest is loaded, and this host is in doubt until the source answers.
    Prepared,
    /// Destination: this host owns the guest, which may run from now on.
    Running,
    /// Destination: the guest has never run here and never will, which is a promise.
    Declined,
}

/// `recover` was given a journal record that only the other role writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the journal says `{record}` of a migration for which this host is the {role}: \
     the journal is damaged or was copied from another host"
)]
pub struct WrongRecord {
    /// The record that was found.
    pub record: Record,
    /// The role of this host: "source" or "destination".
    pub role: &'static str,
}

/// A journal holds a word that names no [`Record`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is no handover record: the journal is damaged or was written by a later version", .0.escape_debug())]
pub struct UnknownRecord(pub String);

impl Record {
    pub(super) const ALL: [Self; 9] = [
        Self::Leaving,
        Self::Committed,
        Self::Finished,
        Self::Lost,
        Self::GivenUp,
        Self::TakenBack,
        Self::Prepared,
        Self::Running,
        Self::Declined,
    ];

    /// Tells whether a source writes this record; a destination writes the others.
    pub fn is_of_source(self) -> bool {
        !matches!(self, Self::Prepared | Self::Running | Self::Declined)
    }

    /// Returns the word that stands for the record in the journal; [`FromStr`] reads it back.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Leaving => "leaving",
            Self::Committed => "committed",
            Self::Finished => "finished",
            Self::Lost => "lost",
            Self::GivenUp => "given-up",
            Self::TakenBack => "taken-back",
            Self::Prepared => "prepared",
            Self::Running => "running",
            Self::Declined => "declined",
        }
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Record {
    type Err = UnknownRecord;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|record| record.as_str() == word);
        known.ok_or_else(|| UnknownRecord(word.chars().take(40).collect()))
    }
}
