//! Where a migration stands, and how it ended.

use std::fmt;

/// How a migration ended for one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The guest runs at the destination.
    Completed,
    /// The destination refused the offer; the guest runs at the source.
    Refused,
    /// The operator cancelled; the guest runs at the source.
    Cancelled,
    /// Something failed before the commit; the guest runs at the source.
    Failed,
    /// The destination had all of the guest, could not start it and gave it back; the guest runs at the source.
    TakenBack,
    /// The VMM that owned the guest ended during the migration, and the guest with it. It ended at the source before
    /// the commit or after taking the guest back, or at the destination while the guest was started.
    VmmGone,
    /// The guest shut itself down during the migration, and its VMM ended with it. Nothing is lost.
    PoweredOff,
    /// The guest was passed on, and ended or was given up at the destination before all of its memory was known to be
    /// there. The source's copy is out of date.
    Lost,
    /// The operator gave up what this host had of a guest in doubt. This host does not know whether the other host
    /// runs it.
    GivenUp,
}

/// The phase of a migration, as operators see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// The source asks the destination whether it takes the guest.
    Offering,
    /// The guest runs at the source while its memory is copied.
    Copying,
    /// The guest is paused, or is about to be; the rest is being sent and loaded.
    SwitchingOver,
    /// Ownership is being passed. Until the other host answers, neither host runs the guest.
    Committing,
    /// The guest runs at the destination, which fetches the rest of its memory.
    Fetching,
    /// The destination has the guest, and both hosts tidy up.
    Finishing,
    /// The guest is being resumed at the source, or discarded at the destination.
    Returning,
    /// The migration is over, and the guest was passed to the destination.
    Completed,
    /// The migration is over, and the guest stayed at the source.
    Returned,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Offering => "offering",
            Self::Copying => "copying",
            Self::SwitchingOver => "switching over",
            Self::Committing => "committing",
            Self::Fetching => "fetching",
            Self::Finishing => "finishing",
            Self::Returning => "returning",
            Self::Completed => "completed",
            Self::Returned => "returned",
        })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Completed => "completed: the guest runs at the destination",
            Self::Refused => "refused by the destination: the guest runs at the source",
            Self::Cancelled => "cancelled: the guest runs at the source",
            Self::Failed => "failed: the guest runs at the source",
            Self::TakenBack => "the destination could not start the guest: it runs at the source again",
            Self::VmmGone => "the VMM that owned the guest ended during the migration",
            Self::PoweredOff => "the guest shut itself down during the migration",
            Self::GivenUp => {
                "given up by the operator at this host: whether the other runs it is not known here"
            }
            Self::Lost => {
                "lost: the guest was passed on, and ended or was given up at the destination before all of \
                 its memory was known to be there"
            }
        })
    }
}
