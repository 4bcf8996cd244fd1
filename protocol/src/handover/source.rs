//! The role of the host that has the guest and gives it away.

use super::action::Action;
use super::event::{Event, Resolution};
use super::message::Message;
use super::outcome::{Outcome, Phase};
use super::record::{Record, WrongRecord};

/// The source's role in the handover of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    // This host owns the guest, and every failure ends with the guest running here.
    Offering,
    Copying,
    /// `Leaving` is being written, and the guest runs.
    Leaving,
    /// The guest is being paused and the rest is being sent. `ready` tells whether `Ready` came already: the
    /// destination may be done before this host has counted everything as sent, and asking it to repeat `Ready` would
    /// lengthen the pause.
    Pausing {
        ready: bool,
    },
    /// Everything is sent, and the destination is to say that it is ready.
    Paused,
    Relinquishing,
    /// `Committed` is being written. Nothing can be decided until the journal answers.
    Committing,

    // This host cannot tell any more which host owns the guest.
    /// The daemon was restarted, the journal says `Leaving`, and the VMM has not said yet whether it was relinquished.
    Unsure,
    /// The VMM has been relinquished, and the destination is asked for its promise.
    Asking,

    // The destination owns the guest, unless it declines.
    Committed,
    /// The destination owns the guest, and needs the memory that is here to learn whether it runs there. `committed` tells
    /// whether `Committed` was durable before.
    Recovering {
        committed: bool,
    },
    /// `TakenBack` is being written. `committed` tells whether `Committed` was durable before.
    TakingBack {
        committed: bool,
    },

    // The guest has run at the destination.
    /// The guest still needs the memory that is here.
    Serving,
    /// Nothing is needed from here any more. The outcome is to be written, and `writing` tells whether the journal is
    /// writing it.
    Finishing {
        outcome: Outcome,
        writing: bool,
    },
    Discarding,
    Gone,

    // This host owns the guest for good.
    /// The guest is being resumed. `silent` means that the destination may still be in doubt, and must not forget the
    /// migration before the guest runs.
    Returning {
        outcome: Outcome,
        silent: bool,
    },
    /// The VMM could not resume the guest, and is asked again.
    Stuck {
        outcome: Outcome,
        silent: bool,
    },
    Kept,
}

impl Source {
    /// Begins a migration by asking the destination. Returns the role and the first actions.
    pub fn new() -> (Self, Vec<Action>) {
        (Self { state: State::Offering }, vec![Action::Send(Message::Offer)])
    }

    /// Takes up a migration after the daemon was restarted, from the last record that the journal holds of it. The
    /// daemon also calls this, with `None`, for a VMM that says that it has been relinquished for a migration that the
    /// journal does not know.
    ///
    /// After [`Record::Leaving`], the daemon says what the VMM reports: [`Event::Owned`], [`Event::Waits`] or
    /// [`Event::VmmGone`]. It also says [`Event::Owned`] after [`Record::Committed`].
    ///
    /// # Errors
    ///
    /// Returns [`WrongRecord`] for a record that only a destination writes.
    pub fn recover(record: Option<Record>) -> Result<(Self, Vec<Action>), WrongRecord> {
        let ended = |outcome| (State::Discarding, vec![Action::Discard, Action::Report(outcome)]);
        let (state, actions) = match record {
            None => (State::Asking, vec![Action::Send(Message::Withdraw)]),
            Some(Record::Leaving) => (State::Unsure, Vec::new()),
            Some(Record::Committed) => (State::Committed, vec![Action::Send(Message::Commit)]),
            Some(Record::Finished) => ended(Outcome::Completed),
            Some(Record::Lost) => ended(Outcome::Lost),
            Some(Record::GivenUp) => ended(Outcome::GivenUp),
            Some(Record::TakenBack) => {
                let outcome = Outcome::TakenBack;
                (State::Returning { outcome, silent: false }, vec![Action::Resume])
            }
            Some(record @ (Record::Prepared | Record::Running | Record::Declined)) => {
                return Err(WrongRecord { record, role: "source" });
            }
        };
        Ok((Self { state }, actions))
    }

    /// Answers a message about a migration that this host does not know as a source. Such a migration was never
    /// committed, or both hosts have ended it.
    pub fn answer_unknown(message: Message) -> Option<Message> {
        match message {
            Message::Accept | Message::Ready => Some(Message::Abort),
            Message::Fetching | Message::Recovering => Some(Message::Gone),
            Message::Running | Message::Lost | Message::Declined => Some(Message::Done),
            _ => None,
        }
    }

    /// Takes an event and returns what the daemon is to do.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        use Event::Message as Heard;
        use State::*;

        match (self.state, event) {
            (Offering, Heard(Message::Accept)) => self.go(Copying, [Action::Copy]),
            (Offering, Heard(Message::Refuse)) => self.keep(Outcome::Refused),
            (Copying, Event::SwitchOver) => self.go(Leaving, [Action::Journal(Record::Leaving)]),
            (Leaving, Event::Journalled(Record::Leaving)) => {
                self.go(Pausing { ready: false }, [Action::Pause])
            }
            (Leaving, Event::JournalFailed(Record::Leaving)) => self.keep(Outcome::Failed),
            (Pausing { .. }, Heard(Message::Ready)) => self.go(Pausing { ready: true }, []),
            (Pausing { ready: false }, Event::Sent) => self.go(Paused, []),
            (Pausing { ready: true }, Event::Sent) | (Paused, Heard(Message::Ready)) => {
                self.go(Relinquishing, [Action::Relinquish])
            }
            (Relinquishing, Event::Relinquished) => self.go(Committing, [Action::Journal(Record::Committed)]),

            // Before the commit every failure is the same failure.
            (
                Offering | Copying | Leaving | Pausing { .. } | Paused | Relinquishing | Unsure | Asking,
                Event::VmmGone | Event::PoweredOff,
            ) => self.vmm_gone(event),
            (Offering | Copying | Leaving | Pausing { .. } | Paused, failure) => match failure {
                Event::Cancel => self.keep(Outcome::Cancelled),
                Event::PeerLost | Event::Failed | Heard(Message::Abort | Message::Declined) => {
                    self.keep(Outcome::Failed)
                }
                _ => Vec::new(),
            },
            (Relinquishing, Event::Cancel) => self.keep_silently(Outcome::Cancelled),
            (Relinquishing, Event::PeerLost | Event::Failed | Heard(Message::Abort | Message::Declined)) => {
                self.keep_silently(Outcome::Failed)
            }

            // What the destination may say meanwhile it says again.
            (Committing, Event::Journalled(Record::Committed)) => {
                self.go(Committed, [Action::Send(Message::Commit)])
            }
            (Committing, Event::JournalFailed(Record::Committed)) => self.keep_silently(Outcome::Failed),

            (Unsure, Event::Owned) => self.keep_silently(Outcome::Failed),
            (Unsure, Event::Waits) | (Asking, Event::Tick | Heard(Message::Ready)) => {
                self.go(Asking, [Action::Send(Message::Withdraw)])
            }

            (Committed, Event::Tick | Heard(Message::Ready)) => {
                self.go(Committed, [Action::Send(Message::Commit)])
            }
            (Committed | Asking | Recovering { .. }, Heard(Message::Fetching)) => {
                self.go(Serving, [Action::Serve])
            }
            // Only with the memory that is here is it found out whether the guest runs there.
            (before @ (Committed | Asking), Heard(Message::Recovering)) => {
                self.go(Recovering { committed: before == Committed }, [Action::Serve])
            }
            (Committed | Asking | Recovering { .. } | Serving, Heard(Message::Running)) => {
                self.finish(Outcome::Completed)
            }
            // A destination that declines what has run there has lost its journal, and the guest with it.
            (Committed | Asking | Recovering { .. } | Serving, Heard(Message::Lost))
            | (Recovering { .. }, Event::Abandoned)
            | (Serving, Heard(Message::Declined) | Event::Abandoned) => self.finish(Outcome::Lost),
            (Committed | Asking | Recovering { .. }, Event::Resolved(Resolution::Discard)) => {
                self.finish(Outcome::GivenUp)
            }
            (Finishing { outcome, .. }, Event::Journalled(record)) if record == Self::end_of(outcome) => {
                self.go(Discarding, [Action::Send(Message::Done), Action::Discard, Action::Report(outcome)])
            }
            // Asking again would not do: an operator says only once that all is lost.
            (Finishing { outcome, .. }, Event::JournalFailed(record)) if record == Self::end_of(outcome) => {
                self.go(Finishing { outcome, writing: false }, [])
            }
            (Finishing { outcome, writing: false }, Event::Tick) => self.finish(outcome),

            (
                before @ (Committed | Asking),
                Heard(Message::Declined) | Event::Resolved(Resolution::RunHere),
            ) => self.go(TakingBack { committed: before == Committed }, [Action::Journal(Record::TakenBack)]),
            (TakingBack { committed }, Event::Journalled(Record::TakenBack)) => {
                let outcome = if committed { Outcome::TakenBack } else { Outcome::Failed };
                let silent = false;
                self.go(Returning { outcome, silent }, [Action::Send(Message::Done), Action::Resume])
            }
            (before @ Recovering { committed }, Event::Tick | Heard(Message::Ready)) => {
                let word = if committed { Message::Commit } else { Message::Withdraw };
                self.go(before, [Action::Send(word)])
            }
            (Recovering { committed }, Heard(Message::Declined) | Event::Resolved(Resolution::RunHere)) => {
                self.go(TakingBack { committed }, [Action::Journal(Record::TakenBack)])
            }
            // Ask once more; the answer will be the same, and the journal is tried again.
            (TakingBack { committed }, Event::JournalFailed(Record::TakenBack)) => {
                self.go(if committed { Committed } else { Asking }, [])
            }
            // Only this role can have told it to run again, and the record of that is lost.
            (Committed, Event::Owned) => self.keep_silently(Outcome::TakenBack),

            // Not before the VMM is gone: with no record of a migration, a relinquished VMM
            // would be in doubt.
            (Discarding, Event::Discarded | Event::VmmGone | Event::PoweredOff) => {
                self.go(Gone, [Action::Forget])
            }

            (Returning { outcome, silent: false }, Event::Resumed) => {
                self.go(Kept, [Action::Forget, Action::Report(outcome)])
            }
            (Returning { outcome, silent: true }, Event::Resumed) => {
                self.go(Kept, [Action::Forget, Action::Send(Message::Abort), Action::Report(outcome)])
            }
            (Returning { outcome, silent }, Event::ResumeFailed) => self.go(Stuck { outcome, silent }, []),
            (Stuck { outcome, silent }, Event::Tick) => {
                self.go(Returning { outcome, silent }, [Action::Resume])
            }
            (Returning { .. } | Stuck { .. }, Event::VmmGone | Event::PoweredOff) => self.vmm_gone(event),

            // Decided for good: as if the migration were no longer known.
            (
                Discarding | Gone | Returning { silent: false, .. } | Stuck { silent: false, .. } | Kept,
                Heard(message),
            ) => Self::answer_unknown(message).map(Action::Send).into_iter().collect(),
            _ => Vec::new(),
        }
    }

    /// Tells whether [`Event::Cancel`] would still have an effect.
    pub fn can_cancel(&self) -> bool {
        use State::*;
        matches!(self.state, Offering | Copying | Leaving | Pausing { .. } | Paused | Relinquishing)
    }

    /// Tells whether [`Event::Abandoned`] would have an effect.
    pub fn can_abandon(&self) -> bool {
        self.state == State::Serving
    }

    /// Tells whether the guest is in doubt, so that [`Event::Resolved`] would have an effect.
    pub fn can_resolve(&self) -> bool {
        matches!(self.state, State::Committed | State::Asking | State::Recovering { .. })
    }

    /// Tells whether nothing is left to do, so that the machine may be dropped.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Gone | State::Kept)
    }

    /// Returns the phase of the migration, as operators see it.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Offering => Phase::Offering,
            State::Copying => Phase::Copying,
            State::Leaving | State::Pausing { .. } | State::Paused => Phase::SwitchingOver,
            State::Relinquishing
            | State::Committing
            | State::Unsure
            | State::Asking
            | State::Committed
            | State::Recovering { .. } => Phase::Committing,
            State::Serving => Phase::Fetching,
            State::Finishing { .. } | State::Discarding => Phase::Finishing,
            State::Gone => Phase::Completed,
            State::TakingBack { .. } | State::Returning { .. } | State::Stuck { .. } => Phase::Returning,
            State::Kept => Phase::Returned,
        }
    }

    /// Ends the migration with the guest here, whose VMM has not been relinquished.
    fn keep(&mut self, outcome: Outcome) -> Vec<Action> {
        let silent = false;
        self.go(State::Returning { outcome, silent }, [Action::Resume, Action::Send(Message::Abort)])
    }

    /// Ends the migration with the guest here. It was not committed, but its VMM may have been relinquished, so the guest
    /// is resumed before the destination is told that it may forget the migration.
    fn keep_silently(&mut self, outcome: Outcome) -> Vec<Action> {
        self.go(State::Returning { outcome, silent: true }, [Action::Resume])
    }

    /// Ends the migration because the guest's VMM has ended.
    fn vmm_gone(&mut self, event: Event) -> Vec<Action> {
        let outcome = if event == Event::PoweredOff { Outcome::PoweredOff } else { Outcome::VmmGone };
        let told = [Action::Forget, Action::Send(Message::Abort), Action::Report(outcome)];
        self.go(State::Kept, told)
    }

    /// Ends the migration with the guest given away, whatever has become of it at the destination.
    fn finish(&mut self, outcome: Outcome) -> Vec<Action> {
        self.go(State::Finishing { outcome, writing: true }, [Action::Journal(Self::end_of(outcome))])
    }

    /// Returns the record of a guest that was given away.
    fn end_of(outcome: Outcome) -> Record {
        match outcome {
            Outcome::Lost => Record::Lost,
            Outcome::GivenUp => Record::GivenUp,
            _ => Record::Finished,
        }
    }

    fn go<const N: usize>(&mut self, state: State, actions: [Action; N]) -> Vec<Action> {
        self.state = state;
        actions.into()
    }
}
