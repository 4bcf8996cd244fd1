//! The role of the host that is given the guest.

use super::action::Action;
use super::event::{Event, Resolution};
use super::message::Message;
use super::outcome::{Outcome, Phase};
use super::record::{Record, WrongRecord};

/// The destination's role in the handover of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Destination {
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    // This host may give up by itself.
    Accepting,
    Receiving,
    /// The VMM loads the state. `Prepared` is being written meanwhile, or is `written`: a daemon that is started anew knows by
    /// the VMM that it was not ready.
    Loading {
        written: bool,
    },

    // This host is in doubt.
    /// `Prepared` is being written. An abort that comes now is ignored, because it comes again in answer to `Ready`.
    Preparing,
    Prepared,
    /// The daemon was restarted, and the VMM has not said yet whether it runs the guest. Until it does,
    /// nothing is begun or promised that it may belie.
    Unsure {
        /// The guest cannot be started here, as it is not known which of its pages are missing, or its state was not loaded.
        incomplete: bool,
    },

    // This host owns the guest.
    /// `Running` is being written, and the VMM has not been told to run the guest.
    Starting,
    /// The VMM was seen to run the guest, of which the journal says no more than `Prepared`. `Running` is to
    /// be written again; `writing` tells whether the journal is at it.
    Unrecorded {
        writing: bool,
    },
    /// The VMM has been told to run the guest. If it vanishes now, it is not known whether it did.
    Resuming,
    /// The VMM has been told to run the guest, and does not answer, perhaps because it waits for memory that is still at
    /// the source.
    Recovering,
    /// The guest runs, and part of its memory is still at the source.
    Fetching,
    Running,
    /// The guest will never be whole, or it has ended before it was known to be whole.
    Lost,
    Finished,

    // The guest has never run here and never will.
    /// `Declined` is to be written, and `writing` tells whether the journal is writing it.
    Declining {
        writing: bool,
        outcome: Outcome,
    },
    /// The promise is durable. It is forgotten when the VMM is gone and the source has received it.
    Declined {
        discarded: bool,
        heard: bool,
    },
    /// The source keeps the guest, and the VMM is being discarded.
    Discarding,
    Discarded,
}

impl Destination {
    /// Begins when an offer has come. The daemon checks whether the offer can be met, and says [`Event::Accepted`] or
    /// [`Event::Refused`].
    #[allow(clippy::new_without_default, reason = "a role begins with an offer, not by default")]
    pub fn new() -> Self {
        Self { state: State::Accepting }
    }

    /// Takes up a migration after the daemon was restarted, from the last record that the journal holds of it.
    ///
    /// The daemon says what the VMM reports: [`Event::Owned`] if it runs the guest, [`Event::Waits`] if it does not,
    /// [`Event::VmmGone`] if it has ended. If the guest cannot be started here because it is not known which of its
    /// pages are missing, or because the VMM has not loaded all of its state, the daemon says [`Event::ResumeFailed`] first. A guest that was only prepared is then given
    /// back as soon as the VMM has said that it waits, or has ended. [`Event::VmmGone`] also stands for a VMM that was
    /// prepared to fetch, does not answer for 10 s and cannot be ended.
    ///
    /// The daemon also calls this, with `None`, for a VMM that has loaded a guest of a migration that the journal does
    /// not know. It does not do so for a VMM that runs its guest: that is simply a guest of this host.
    ///
    /// # Errors
    ///
    /// Returns [`WrongRecord`] for a record that only a source writes.
    pub fn recover(record: Option<Record>) -> Result<(Self, Vec<Action>), WrongRecord> {
        let (state, actions) = match record {
            // The source may have received `Ready`, whatever this journal has lost.
            None => (State::Preparing, vec![Action::Journal(Record::Prepared)]),
            Some(Record::Prepared) => {
                (State::Unsure { incomplete: false }, vec![Action::Send(Message::Ready)])
            }
            // The VMM may run the guest already, or may never have been told to.
            Some(Record::Running) => (State::Resuming, vec![Action::Resume]),
            Some(Record::Declined) => (
                State::Declined { discarded: false, heard: false },
                vec![Action::Discard, Action::Send(Message::Declined), Action::Report(Outcome::TakenBack)],
            ),
            Some(record) => return Err(WrongRecord { record, role: "destination" }),
        };
        Ok((Self { state }, actions))
    }

    /// Answers a message, other than a new offer, about a migration that this host does not know as a destination. Such
    /// a migration never got as far as `Ready`, or both hosts have ended it.
    pub fn answer_unknown(message: Message) -> Option<Message> {
        match message {
            // Only a source that may still be waiting here can have offered it.
            Message::Offer => Some(Message::Abort),
            Message::Commit | Message::Withdraw => Some(Message::Unknown),
            _ => None,
        }
    }

    /// Takes an event and returns what the daemon is to do.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        use Event::Message as Heard;
        use State::*;

        match (self.state, event) {
            (Accepting, Event::Accepted) => self.go(Receiving, [Action::Send(Message::Accept)]),
            (Accepting, Event::Refused) => self.go(
                Discarded,
                [Action::Send(Message::Refuse), Action::Discard, Action::Report(Outcome::Refused)],
            ),
            (Receiving, Event::Loading) => {
                self.go(Loading { written: false }, [Action::Journal(Record::Prepared)])
            }
            (Loading { written: false }, Event::Journalled(Record::Prepared)) => {
                self.go(Loading { written: true }, [])
            }
            (Loading { written: false }, Event::Loaded) => self.go(Preparing, []),
            (
                Accepting | Receiving,
                Event::PeerLost | Event::Failed | Event::VmmGone | Event::PoweredOff | Heard(Message::Abort),
            )
            | (Loading { .. } | Preparing, Event::JournalFailed(Record::Prepared)) => self.go(
                Discarded,
                [Action::Send(Message::Abort), Action::Discard, Action::Report(Outcome::Failed)],
            ),

            // `Ready` was not sent, so the source cannot have committed. The record is forgotten when the VMM is gone.
            (
                Loading { .. },
                Event::PeerLost | Event::Failed | Event::VmmGone | Event::PoweredOff | Heard(Message::Abort),
            ) => self.go(
                Discarding,
                [Action::Send(Message::Abort), Action::Discard, Action::Report(Outcome::Failed)],
            ),

            // From here on the source may commit at any moment, so nothing is given up alone.
            (Loading { written: true }, Event::Loaded)
            | (Preparing, Event::Journalled(Record::Prepared))
            | (Prepared, Event::Tick) => self.go(Prepared, [Action::Send(Message::Ready)]),
            (before @ Unsure { incomplete: false }, Event::Tick) => {
                self.go(before, [Action::Send(Message::Ready)])
            }
            (Unsure { incomplete: false }, Event::Waits) => self.go(Prepared, [Action::Send(Message::Ready)]),
            // That it never ran is promised only when its VMM has said so, or has ended.
            (Unsure { .. }, Event::ResumeFailed) => self.go(Unsure { incomplete: true }, []),
            // A VMM that runs was told to, though the journal has lost it.
            (Unsure { .. }, Event::Owned) | (Unrecorded { writing: false }, Event::Tick) => {
                self.go(Unrecorded { writing: true }, [Action::Journal(Record::Running)])
            }
            (Unrecorded { .. }, Event::JournalFailed(Record::Running)) => {
                self.go(Unrecorded { writing: false }, [])
            }
            (Prepared, Heard(Message::Commit) | Event::Resolved(Resolution::RunHere)) => {
                self.go(Starting, [Action::Journal(Record::Running)])
            }
            (Prepared, Heard(Message::Abort)) => {
                self.go(Discarding, [Action::Discard, Action::Report(Outcome::Failed)])
            }
            // Not before the VMM is gone: with no record, a loaded VMM would be in doubt again.
            (Discarding, Event::Discarded | Event::VmmGone | Event::PoweredOff) => {
                self.go(Discarded, [Action::Forget])
            }
            (Starting | Unrecorded { .. }, Event::Journalled(Record::Running)) => {
                self.go(Resuming, [Action::Resume])
            }
            // The source is asked again, and the journal is tried again.
            (Starting, Event::JournalFailed(Record::Running)) => self.go(Prepared, []),

            // The guest never ran. A record that is still on its way to the journal is followed by `Declined`.
            (Preparing | Prepared | Unsure { .. } | Starting, Event::VmmGone | Event::PoweredOff)
            | (Unsure { incomplete: true }, Event::Waits)
            | (Prepared | Resuming | Recovering, Event::ResumeFailed)
            | (Accepting | Receiving | Loading { .. } | Prepared, Heard(Message::Withdraw)) => {
                self.decline(Outcome::TakenBack)
            }
            (Prepared, Event::Resolved(Resolution::Discard)) => self.decline(Outcome::GivenUp),

            (Resuming | Recovering, Event::Resumed) => {
                self.go(Running, [Action::Send(Message::Running), Action::Report(Outcome::Completed)])
            }
            (Running, Event::Tick | Heard(Message::Commit | Message::Withdraw)) => {
                self.go(Running, [Action::Send(Message::Running)])
            }

            (Resuming | Recovering, Event::MemoryFound) => {
                self.go(Recovering, [Action::Send(Message::Recovering)])
            }
            (Resuming | Recovering, Event::ResumedIncomplete)
            | (Fetching, Event::Tick | Heard(Message::Commit | Message::Withdraw)) => {
                self.go(Fetching, [Action::Send(Message::Fetching)])
            }
            (Fetching, Event::Complete) => {
                self.go(Running, [Action::Send(Message::Running), Action::Report(Outcome::Completed)])
            }

            // What it had not fetched it needs no more.
            (Resuming | Recovering | Unrecorded { .. } | Fetching, Event::PoweredOff) => {
                self.go(Running, [Action::Send(Message::Running), Action::Report(Outcome::PoweredOff)])
            }
            // The guest may have run, so the source must not run it; whether all of it was here is not known.
            (Resuming | Recovering | Unrecorded { .. }, Event::VmmGone) => {
                self.go(Lost, [Action::Send(Message::Lost), Action::Report(Outcome::VmmGone)])
            }
            (Resuming, Event::Abandoned)
            | (Fetching, Event::VmmGone | Event::Abandoned | Heard(Message::Gone)) => {
                self.go(Lost, [Action::Send(Message::Lost), Action::Report(Outcome::Lost)])
            }
            // It would hang for ever.
            (Recovering, Event::Abandoned | Heard(Message::Gone)) => {
                self.go(Lost, [Action::Send(Message::Lost), Action::Discard, Action::Report(Outcome::Lost)])
            }
            (Lost, Event::Tick | Heard(Message::Commit | Message::Withdraw)) => {
                self.go(Lost, [Action::Send(Message::Lost)])
            }

            (Running | Lost, Heard(Message::Done)) => self.go(Finished, [Action::Forget]),

            (Declining { outcome, .. }, Event::JournalFailed(Record::Declined)) => {
                self.go(Declining { writing: false, outcome }, [])
            }
            (Declining { writing: false, outcome }, Event::Tick) => self.decline(outcome),
            // Not earlier: after a crash in between, the VMM is told to run once more.
            (Declining { outcome, .. }, Event::Journalled(Record::Declined)) => self.go(
                Declined { discarded: false, heard: false },
                [Action::Send(Message::Declined), Action::Discard, Action::Report(outcome)],
            ),
            (
                Declined { heard: false, discarded },
                Event::Tick | Heard(Message::Commit | Message::Withdraw),
            ) => self.go(Declined { heard: false, discarded }, [Action::Send(Message::Declined)]),
            (Declined { discarded: false, .. }, Heard(Message::Done | Message::Abort)) => {
                self.go(Declined { discarded: false, heard: true }, [])
            }
            (Declined { heard: false, .. }, Event::Discarded | Event::VmmGone | Event::PoweredOff) => {
                self.go(Declined { discarded: true, heard: false }, [])
            }
            (Declined { discarded: true, .. }, Heard(Message::Done | Message::Abort))
            | (Declined { heard: true, .. }, Event::Discarded | Event::VmmGone | Event::PoweredOff) => {
                self.go(Discarded, [Action::Forget])
            }

            (Finished | Discarded, Heard(message)) => {
                Self::answer_unknown(message).map(Action::Send).into_iter().collect()
            }
            _ => Vec::new(),
        }
    }

    /// Tells whether an operator may give the guest up with [`Event::Abandoned`].
    pub fn can_abandon(&self) -> bool {
        matches!(self.state, State::Fetching | State::Recovering)
    }

    /// Tells whether the guest is in doubt, so that [`Event::Resolved`] would have an effect.
    pub fn can_resolve(&self) -> bool {
        self.state == State::Prepared
    }

    /// Tells whether nothing is left to do, so that the machine may be dropped.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Finished | State::Discarded)
    }

    /// Returns the phase of the migration, as operators see it.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Accepting => Phase::Offering,
            State::Receiving | State::Loading { .. } => Phase::Copying,
            State::Preparing => Phase::SwitchingOver,
            State::Prepared
            | State::Unsure { .. }
            | State::Starting
            | State::Unrecorded { .. }
            | State::Resuming
            | State::Recovering => Phase::Committing,
            State::Fetching => Phase::Fetching,
            State::Running | State::Lost => Phase::Finishing,
            State::Finished => Phase::Completed,
            State::Declining { .. } | State::Declined { .. } | State::Discarding => Phase::Returning,
            State::Discarded => Phase::Returned,
        }
    }

    /// Begins to promise that the guest never ran here and never will.
    fn decline(&mut self, outcome: Outcome) -> Vec<Action> {
        self.go(State::Declining { writing: true, outcome }, [Action::Journal(Record::Declined)])
    }

    fn go<const N: usize>(&mut self, state: State, actions: [Action; N]) -> Vec<Action> {
        self.state = state;
        actions.into()
    }
}
