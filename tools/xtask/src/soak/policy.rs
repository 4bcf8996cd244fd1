//! The policy of a move: what the order says besides the guest and the host.

use std::fmt;

use crate::common::dice::Dice;

/// A pause that noise cannot make too long.
const NO_LIMIT: &str = "60s";

/// What an order says besides the guest and the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MovePolicy {
    /// The time at which the guest's memory is sent, and the way to deal with a guest that writes too fast.
    pub way: MoveWay,
    /// The longest pause, as `memlanectl` reads it.
    pub limit: &'static str,
    /// Whether digests are compared in the pause.
    pub verify: bool,
    /// Whether pages may be compressed, if the order says so.
    pub compression: Option<&'static str>,
    /// The time for which the hosts try to reach each other, if the order says so.
    pub patience: Option<&'static str>,
    /// The number of times that the order is tried again.
    pub retry: u32,
}

/// The time at which the guest's memory is sent, and the way to deal with a guest that writes too fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum MoveWay {
    /// The memory is sent before, in rounds.
    Precopy,
    /// The memory is sent before, and a guest that writes too fast is slowed.
    Stun,
    /// A guest that writes too fast is slowed, and if that is not enough, finished by post-copy.
    Auto,
    /// A guest that writes too fast is finished by post-copy.
    ThenPostcopy,
    /// The guest runs at its destination after one round.
    Hybrid,
    /// The guest runs at its destination at once.
    Postcopy,
}

impl MovePolicy {
    /// Draws a policy.
    pub(crate) fn draw(dice: &mut Dice) -> Self {
        let way = dice.weighed(&[
            (30, MoveWay::Precopy),
            (14, MoveWay::Stun),
            (12, MoveWay::Auto),
            (8, MoveWay::ThenPostcopy),
            (16, MoveWay::Hybrid),
            (20, MoveWay::Postcopy),
        ]);
        let limit = match way {
            // Otherwise no guest would write too fast.
            MoveWay::Stun | MoveWay::Auto | MoveWay::ThenPostcopy => dice.pick(&["300ms", "1s"]),
            MoveWay::Precopy | MoveWay::Hybrid | MoveWay::Postcopy => {
                dice.weighed(&[(80, NO_LIMIT), (20, "2s")])
            }
        };
        let verify = dice.percent(35) && matches!(way, MoveWay::Precopy | MoveWay::Stun);
        let compression = dice.weighed(&[(60, None), (20, Some("auto")), (20, Some("off"))]);
        let patience = dice.weighed(&[(40, None), (20, Some("0s")), (15, Some("1s")), (25, Some("60s"))]);
        let retry = dice.weighed(&[(65, 0), (20, 1), (15, 4)]);
        Self { way, limit, verify, compression, patience, retry }
    }

    /// Returns the words for `memlanectl migrate` after the guest and the host.
    pub(crate) fn words(&self) -> Vec<String> {
        let mut line = format!("--downtime-limit {} --min-bandwidth 1mbit", self.limit);
        line += match self.way {
            MoveWay::Precopy => "",
            MoveWay::Stun => " --converge stun --max-stun 99",
            MoveWay::Auto => " --converge auto",
            MoveWay::ThenPostcopy => " --converge postcopy",
            MoveWay::Hybrid => " --postcopy hybrid",
            MoveWay::Postcopy => " --postcopy now",
        };
        if self.verify {
            line += " --verify";
        }
        for (option, value) in [("compression", self.compression), ("patience", self.patience)] {
            line += &value.map(|value| format!(" --{option} {value}")).unwrap_or_default();
        }
        if self.retry > 0 {
            line += &format!(" --retry {}", self.retry);
        }
        line.split_whitespace().map(str::to_owned).collect()
    }

    /// Returns whether the order must be carried out if nothing goes wrong, however busy the machine is.
    pub(crate) fn must_succeed(&self) -> bool {
        self.limit == NO_LIMIT
    }
}

impl MoveWay {
    /// All ways.
    pub(crate) const ALL: [Self; 6] =
        [Self::Precopy, Self::Stun, Self::Auto, Self::ThenPostcopy, Self::Hybrid, Self::Postcopy];

    /// Returns the name of the way, for people and for JSON.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Stun => "stun",
            Self::Auto => "auto",
            Self::ThenPostcopy => "then post-copy",
            Self::Hybrid => "hybrid",
            Self::Postcopy => "post-copy now",
        }
    }
}

impl fmt::Display for MovePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, limit {}", self.way.as_str(), self.limit)?;
        if self.verify {
            f.write_str(", verify")?;
        }
        for (name, value) in [("compression", self.compression), ("patience", self.patience)] {
            if let Some(value) = value {
                write!(f, ", {name} {value}")?;
            }
        }
        match self.retry {
            0 => Ok(()),
            retry => write!(f, ", retry {retry}"),
        }
    }
}
