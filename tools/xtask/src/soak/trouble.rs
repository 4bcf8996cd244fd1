//! What goes wrong while guests move.

use std::fmt;
use std::time::Duration;

use crate::common::dice::Dice;

/// The number of ports of each host.
pub(crate) const PORTS: usize = 2;

/// The time after the order at which the last trouble begins.
const LATEST: Duration = Duration::from_millis(2500);

/// Something that goes wrong, or that an operator does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Trouble {
    /// A daemon gets SIGKILL, and is started again after a while.
    DaemonKilled { side: Side, away: Duration },
    /// A daemon is told to end (SIGTERM), and is started again a while after that.
    DaemonRestarted { side: Side, away: Duration },
    /// A daemon stands still for a while (SIGSTOP).
    DaemonStopped { side: Side, away: Duration },
    /// A daemon gets new keys, and is told to read them (SIGHUP).
    KeysRenewed { side: Side },
    /// The control connection silently loses everything for a while.
    ControlCut { away: Duration },
    /// A port silently loses everything for a while.
    PortSilent { port: usize, away: Duration },
    /// A port goes down on one host for a while.
    PortDown { port: usize, side: Side, away: Duration },
    /// A port loses a share of its packets, in percent, and delays the others for a while.
    PortBad { port: usize, percent: u32, delay: Duration, away: Duration },
    /// A port carries a tenth of its rate for a while.
    PortSlow { port: usize, away: Duration },
    /// Everything between the hosts is cut for a while.
    AllCut { away: Duration },
    /// An operator cancels the migration.
    Cancel,
    /// An operator orders the guest to move once more, at one of the hosts.
    SecondOrder { side: Side },
}

/// One of the two hosts of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The host on which the guest is.
    Source,
    /// The host to which the guest is to go.
    Destination,
}

/// A trouble, and the time from the order until it begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlannedTrouble {
    /// The trouble.
    pub trouble: Trouble,
    /// The time from the order until it begins.
    pub after: Duration,
}

/// The kinds of trouble, in the order of the report.
pub(crate) const KINDS: [&str; 12] = [
    "daemon killed",
    "daemon restarted",
    "daemon stopped",
    "keys renewed",
    "control cut",
    "port silent",
    "port down",
    "port lossy and late",
    "port slow",
    "all cut",
    "cancelled",
    "second order",
];

impl PlannedTrouble {
    /// Draws the troubles of a move, none of which meddles with what another one has to mend. In a calm time no daemon ends,
    /// so that some of them live for long.
    pub(crate) fn draw(dice: &mut Dice, calm: bool) -> Vec<Self> {
        let count = dice.weighed(&[(30, 0), (50, 1), (20, 2)]);
        let mut drawn: Vec<Self> = Vec::new();
        for _ in 0..count {
            let trouble = Trouble::draw(dice, calm);
            let after = dice.up_to(LATEST);
            if drawn.iter().all(|other| !other.trouble.meddles_with(&trouble)) {
                drawn.push(Self { trouble, after });
            }
        }
        drawn.sort_by_key(|planned| planned.after);
        drawn
    }
}

impl Trouble {
    fn draw(dice: &mut Dice, calm: bool) -> Self {
        let side = dice.pick(&[Side::Source, Side::Destination]);
        let port = dice.pick(&[0, 1]);
        let short = Duration::from_millis(20);
        let away = dice.between(short, Duration::from_secs(3));
        // Longer than daemons wait for a peer that says nothing, in half of the cases.
        let cut = dice.between(Duration::from_millis(300), Duration::from_secs(8));
        let percent = dice.pick(&[1, 3, 10]);
        let delay = dice.between(Duration::from_millis(1), Duration::from_millis(40));
        let ends = if calm { 0 } else { 1 };
        dice.weighed(&[
            (20 * ends, Self::DaemonKilled { side, away }),
            (12 * ends, Self::DaemonRestarted { side, away }),
            (12, Self::DaemonStopped { side, away: cut }),
            (6, Self::KeysRenewed { side }),
            (10, Self::ControlCut { away: cut }),
            (9, Self::PortSilent { port, away: cut }),
            (5, Self::PortDown { port, side, away: cut }),
            (7, Self::PortBad { port, percent, delay, away: cut }),
            (5, Self::PortSlow { port, away: cut }),
            (8, Self::AllCut { away: cut }),
            (10, Self::Cancel),
            (6, Self::SecondOrder { side }),
        ])
    }

    /// Returns the place of the kind in [`KINDS`].
    pub(crate) fn kind(&self) -> usize {
        match self {
            Self::DaemonKilled { .. } => 0,
            Self::DaemonRestarted { .. } => 1,
            Self::DaemonStopped { .. } => 2,
            Self::KeysRenewed { .. } => 3,
            Self::ControlCut { .. } => 4,
            Self::PortSilent { .. } => 5,
            Self::PortDown { .. } => 6,
            Self::PortBad { .. } => 7,
            Self::PortSlow { .. } => 8,
            Self::AllCut { .. } => 9,
            Self::Cancel => 10,
            Self::SecondOrder { .. } => 11,
        }
    }

    /// Returns the port that it is about, if it is about one.
    pub(crate) fn port(&self) -> Option<usize> {
        match self {
            Self::PortSilent { port, .. }
            | Self::PortDown { port, .. }
            | Self::PortBad { port, .. }
            | Self::PortSlow { port, .. } => Some(*port),
            _ => None,
        }
    }

    /// Returns the host whose daemon it strikes, so that who waits for that daemon may wait in vain.
    pub(crate) fn daemon(&self) -> Option<Side> {
        match self {
            Self::DaemonKilled { side, .. }
            | Self::DaemonRestarted { side, .. }
            | Self::DaemonStopped { side, .. } => Some(*side),
            _ => None,
        }
    }

    /// Returns what it is for a guest that goes the other way.
    pub(crate) fn seen_from_the_other_host(self) -> Self {
        let mut seen = self;
        match &mut seen {
            Self::DaemonKilled { side, .. }
            | Self::DaemonRestarted { side, .. }
            | Self::DaemonStopped { side, .. }
            | Self::KeysRenewed { side }
            | Self::PortDown { side, .. }
            | Self::SecondOrder { side } => *side = side.other(),
            _ => {}
        }
        seen
    }

    /// Returns whether it is about one guest alone, the first of a step.
    pub(crate) fn is_about_one_guest(&self) -> bool {
        matches!(self, Self::Cancel | Self::SecondOrder { .. })
    }

    /// Returns whether an order that nothing else disturbs must be carried out all the same. A single port may be lost:
    /// that costs speed.
    pub(crate) fn is_harmless(&self) -> bool {
        matches!(self, Self::KeysRenewed { .. } | Self::SecondOrder { .. }) || self.port().is_some()
    }

    fn meddles_with(&self, other: &Self) -> bool {
        let cuts_all = |one: &Self| matches!(one, Self::AllCut { .. });
        let is_network =
            |one: &Self| cuts_all(one) || matches!(one, Self::ControlCut { .. }) || one.port().is_some();
        // While a daemon stands still or is away, it reads no keys.
        let daemon = |one: &Self| match one {
            Self::KeysRenewed { side } => Some(*side),
            _ => one.daemon(),
        };
        self.kind() == other.kind()
            || (cuts_all(self) && is_network(other))
            || (cuts_all(other) && is_network(self))
            || (self.port().is_some() && self.port() == other.port())
            || (daemon(self).is_some() && daemon(self) == daemon(other))
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DaemonKilled { side, away } => write!(f, "{side} daemon killed for {away:.0?}"),
            Self::DaemonRestarted { side, away } => write!(f, "{side} daemon restarted after {away:.0?}"),
            Self::DaemonStopped { side, away } => write!(f, "{side} daemon stopped for {away:.0?}"),
            Self::KeysRenewed { side } => write!(f, "keys renewed at the {side}"),
            Self::ControlCut { away } => write!(f, "control cut for {away:.0?}"),
            Self::PortSilent { port, away } => write!(f, "port{port} silent for {away:.0?}"),
            Self::PortDown { port, side, away } => write!(f, "port{port} down at the {side} for {away:.0?}"),
            Self::PortBad { port, percent, delay, away } => {
                write!(f, "port{port} loses {percent} % and delays by {delay:.0?} for {away:.0?}")
            }
            Self::PortSlow { port, away } => write!(f, "port{port} slow for {away:.0?}"),
            Self::AllCut { away } => write!(f, "all cut for {away:.0?}"),
            Self::Cancel => f.write_str("cancelled"),
            Self::SecondOrder { side } => write!(f, "ordered again at the {side}"),
        }
    }
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}
