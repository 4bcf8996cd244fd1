//! The phases of a migration, and how it is held up in them.

use memlane_api::types::{Migration, Phase as Shown};
use memlane_lab::HostId;
use memlane_protocol::handover::Message;
use memlane_protocol::wire::control::Control;

use crate::common::{Order, Stage, Tap};

/// Who says a message, and which it is.
type HeldMessage = (HostId, fn(&Control) -> bool);

/// Something fails in this phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// The source has said what it wants to send.
    Offer,
    /// All of the memory is sent for the first time.
    FirstRound,
    /// What the guest has written meanwhile is sent, again and again.
    Rounds,
    /// The guest's writes are slowed.
    Stun,
    /// The guest stands still, and its state is about to be sent.
    Pause,
    /// The destination has all it needs, and the source does not know yet.
    Prepared,
    /// The source has given the guest up, and the destination does not know yet.
    Committed,
    /// The guest runs at the destination without all of its memory.
    Postcopy,
    /// The guest runs at the destination, and the source does not know yet that it does.
    Finishing,
}

impl Phase {
    pub(crate) const ALL: [Self; 9] = [
        Self::Offer,
        Self::FirstRound,
        Self::Rounds,
        Self::Stun,
        Self::Pause,
        Self::Prepared,
        Self::Committed,
        Self::Postcopy,
        Self::Finishing,
    ];

    /// The heading of its column.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Offer => "offer",
            Self::FirstRound => "first round",
            Self::Rounds => "rounds",
            Self::Stun => "stun",
            Self::Pause => "pause",
            Self::Prepared => "prepared",
            Self::Committed => "committed",
            Self::Postcopy => "post-copy",
            Self::Finishing => "finishing",
        }
    }

    /// Tells whether lanes carry pages all the time, so slowly that the phase lasts.
    pub(crate) fn is_slow(self) -> bool {
        matches!(self, Self::FirstRound | Self::Rounds | Self::Stun | Self::Postcopy)
    }

    /// Orders the guest to move, and returns when its migration is in this phase.
    pub(crate) fn reach(self, stage: &Stage, tap: &Tap, name: &str) -> Order {
        if let Some((from, is)) = self.held_at() {
            tap.hold(from, is);
        }
        let order = stage.begin(name, self.order());
        if self.held_at().is_some() {
            tap.wait();
        } else {
            stage.wait_until(HostId::A, name, self.name(), |migration| {
                assert_eq!(migration.outcome, None, "it ended before: {migration:#?}");
                self.is_in(migration)
            });
        }
        order
    }

    /// The message that is held back, and who says it.
    fn held_at(self) -> Option<HeldMessage> {
        fn word(message: &Control, word: Message) -> bool {
            matches!(message, Control::Handover { message, .. } if *message == word)
        }
        Some(match self {
            Self::Offer => (HostId::A, |message| matches!(message, Control::Offer(_))),
            Self::Pause => (HostId::A, |message| matches!(message, Control::State { .. })),
            Self::Prepared => (HostId::B, |message| word(message, Message::Ready)),
            Self::Committed => (HostId::A, |message| word(message, Message::Commit)),
            Self::Finishing => (HostId::B, |message| word(message, Message::Running)),
            Self::FirstRound | Self::Rounds | Self::Stun | Self::Postcopy => return None,
        })
    }

    fn order(self) -> &'static [&'static str] {
        match self {
            Self::FirstRound | Self::Rounds => {
                &["--verify", "--converge", "none", "--downtime-limit", "500ms"]
            }
            Self::Stun => {
                &["--verify", "--converge", "stun", "--max-stun", "99", "--downtime-limit", "500ms"]
            }
            Self::Postcopy => &["--postcopy", "now"],
            // Held up, the pause lasts: as long as hosts are given up after.
            _ => &["--verify", "--downtime-limit", "20s"],
        }
    }

    fn is_in(self, migration: &Migration) -> bool {
        let round = migration.rounds.len();
        match self {
            Self::FirstRound => migration.bytes_sent > 2 << 20,
            Self::Rounds => round >= 2,
            Self::Stun => migration.stun.as_ref().is_some_and(|stun| stun.seconds > 0.2),
            Self::Postcopy => {
                migration.phase == Shown::Fetching
                    && migration.postcopy.as_ref().is_some_and(|postcopy| postcopy.pages_streamed > 100)
            }
            _ => true,
        }
    }
}
