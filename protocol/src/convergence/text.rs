//! The texts of decisions and their figures, for operators.

use std::fmt;
use std::time::Duration;

use super::decision::{Decision, Figures, Reason, Verdict, Why};

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { decision, figures, forecast, .. } = self;
        match decision {
            Decision::Continue => write!(f, "{decision}: {figures}"),
            Decision::SwitchOver => {
                let (expected, at_most) = (Milliseconds(forecast.total()), Milliseconds(figures.downtime));
                let (left, limit) =
                    (Megabytes(figures.remaining_bytes), Milliseconds(figures.downtime_limit));
                write!(
                    f,
                    "{decision}: with {left} left the pause should take {expected}, {at_most} at most, and the limit \
                     is {limit}"
                )
            }
            Decision::Stun { .. } | Decision::Postcopy { .. } | Decision::GiveUp { .. } => decision.fmt(f),
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Continue => f.write_str("copies another round"),
            Self::SwitchOver => f.write_str("switches over"),
            Self::Stun { pages_per_second, why } => {
                write!(f, "slows the guest's writes to {} pages/s", Grouped(*pages_per_second))?;
                if let Some(stun) = why.figures.stun {
                    write!(f, " ({} % less)", stun.percent())?;
                }
                write!(f, ": {}", Finding(why))
            }
            Self::Postcopy { why } => {
                let left = Megabytes(why.figures.remaining_bytes);
                write!(f, "lets the guest run at the destination with {left} still to come: {}", Finding(why))
            }
            Self::GiveUp { why } => write!(f, "leaves the guest where it is: {why}"),
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", Finding(self))?;
        match (self.reason, self.figures.stun) {
            (Reason::LimitTooShort, _) => f.write_str("raise the downtime limit above that"),
            (Reason::StunTooWeak, Some(stun)) => {
                f.write_str("allow post-copy (--converge auto), ")?;
                match stun.percent() {
                    percent @ ..100 if percent > stun.max_percent => {
                        write!(f, "raise --max-stun to {percent}, ")?;
                    }
                    _ => {}
                }
                f.write_str("raise the downtime limit, add ports, or try when the guest writes less")
            }
            _ => f.write_str(
                "raise the downtime limit above that, add ports, or try when the guest writes less",
            ),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dirty_bytes_per_second, bandwidth, remaining_bytes, .. } = *self;
        let (downtime, limit) = (Milliseconds(self.downtime), Milliseconds(self.downtime_limit));
        write!(f, "it dirties {}", Rate(dirty_bytes_per_second))?;
        match bandwidth {
            Some(bandwidth) => write!(f, " and the ports deliver {}", Rate(bandwidth))?,
            None => write!(f, " and the ports have delivered nothing")?,
        }
        let left = Megabytes(remaining_bytes);
        write!(f, "; with {left} left the pause would take {downtime}, and the limit is {limit}")
    }
}

/// The text of what was found, without what could be done about it.
struct Finding<'a>(&'a Why);

impl fmt::Display for Finding<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Why { reason, figures } = self.0;
        let iteration = figures.iteration;
        match (reason, figures.stun) {
            (Reason::Ordered, _) if iteration == 0 => return f.write_str("as ordered, before any round"),
            (Reason::Ordered, _) => write!(f, "as ordered, after round {iteration}: ")?,
            (Reason::LimitTooShort, _) => {
                let (downtime, limit) =
                    (Milliseconds(figures.downtime), Milliseconds(figures.downtime_limit));
                return write!(
                    f,
                    "even with nothing left to send, the pause would take {downtime}, and the limit is {limit}"
                );
            }
            (Reason::Outrun, _) => {} // as the figures show
            (Reason::StunTooWeak, Some(stun)) => {
                let (needed, allowed) = (stun.percent(), stun.max_percent);
                write!(f, "it would have to lose {needed} % of its writes, and may lose {allowed} % ")?;
                write!(f, "(round {iteration}): ")?;
            }
            (Reason::StoppedShrinking | Reason::StunTooWeak, _) => {
                write!(f, "rounds have stopped shrinking (round {iteration}): ")?;
            }
            (Reason::ShrinkingSlowly, _) => write!(f, "rounds shrink too slowly (round {iteration}): ")?,
            (Reason::TooManyIterations, _) => {
                write!(f, "the guest does not fit into its pause after {iteration} rounds: ")?;
            }
        }
        figures.fmt(f)
    }
}

/// The text of a rate in the units of operators of hosts and of networks.
struct Rate(f64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} MB/s ({:.2} Gbit/s)", self.0 / 1e6, self.0 * 8.0 / 1e9)
    }
}

struct Megabytes(u64);

impl fmt::Display for Megabytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} MB", self.0 as f64 / 1e6)
    }
}

struct Milliseconds(Duration);

impl fmt::Display for Milliseconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_micros().div_ceil(1000) {
            ms @ ..10_000 => write!(f, "{ms} ms"),
            ms @ ..3_600_000 => write!(f, "{:.1} s", ms as f64 / 1000.0),
            _ => f.write_str("more than an hour"),
        }
    }
}

/// The text of a number with separated thousands.
struct Grouped(u64);

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            small @ ..1000 => write!(f, "{small}"),
            large => write!(f, "{},{:03}", Grouped(large / 1000), large % 1000),
        }
    }
}
