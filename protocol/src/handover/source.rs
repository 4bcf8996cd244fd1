//! The half that has the guest and gives it away.

use super::{Action, Event, Message, Outcome, Phase, Record, WrongRecord};

/// The source's half of the handover of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    // The guest is ours; any failure returns to it.
    Offering,
    Copying,
    /// The guest is being paused and the rest sent. The destination may be done with it
    /// before our own books say so, and making it ask again would lengthen the pause.
    Pausing {
        ready: bool,
    },
    /// All is sent; the destination is to say that it is ready.
    Paused,
    Relinquishing,
    /// `Committed` is being written: until the journal answers, nothing can be decided.
    Committing,

    // The guest is the destination's, until it says otherwise.
    Committed,
    TakingBack,

    // The guest has run at the destination.
    /// It still needs the memory that is here.
    Serving,
    /// Nothing is needed from here any more. `Finished` is to be written; `writing` tells
    /// whether the journal is at it.
    Finishing {
        outcome: Outcome,
        writing: bool,
    },
    Discarding,
    Gone,

    // The guest is ours for good.
    Returning(Outcome),
    /// The VMM could not resume it; it is asked again.
    Stuck(Outcome),
    Kept,
}

impl Source {
    /// Begins: asks the destination.
    pub fn new() -> (Self, Vec<Action>) {
        (Self { state: State::Offering }, vec![Action::Send(Message::Offer)])
    }

    /// Takes up a migration after the daemon was restarted, from the last record that the
    /// journal holds of it. To be called as well, with `None`, for a VMM that says that it is
    /// paused or relinquished for a migration of which the journal knows nothing.
    ///
    /// # Errors
    ///
    /// [`WrongRecord`] for a record that only a destination writes.
    pub fn recover(record: Option<Record>) -> Result<(Self, Vec<Action>), WrongRecord> {
        let (state, action) = match record {
            None => (State::Returning(Outcome::Failed), Action::Resume),
            Some(Record::Committed) => (State::Committed, Action::Send(Message::Commit)),
            Some(Record::Finished) => (State::Discarding, Action::Discard),
            Some(Record::TakenBack) => (State::Returning(Outcome::TakenBack), Action::Resume),
            Some(record @ (Record::Prepared | Record::Running | Record::Declined)) => {
                return Err(WrongRecord { record, half: "source" });
            }
        };
        Ok((Self { state }, vec![action]))
    }

    /// Answers a message about a migration that this host, as a source, knows nothing of: it
    /// was never committed, or both sides have ended it.
    pub fn answer_unknown(message: Message) -> Option<Message> {
        match message {
            Message::Accept | Message::Ready => Some(Message::Abort),
            Message::Fetching => Some(Message::Gone),
            Message::Running | Message::Lost | Message::Declined => Some(Message::Done),
            _ => None,
        }
    }

    /// Takes an event and says what to do.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        use Event::Message as Heard;
        use State::*;

        match (self.state, event) {
            (Offering, Heard(Message::Accept)) => self.go(Copying, [Action::Copy]),
            (Offering, Heard(Message::Refuse)) => self.keep(Outcome::Refused),
            (Copying, Event::SwitchOver) => self.go(Pausing { ready: false }, [Action::Pause]),
            (Pausing { .. }, Heard(Message::Ready)) => self.go(Pausing { ready: true }, []),
            (Pausing { ready: false }, Event::Sent) => self.go(Paused, []),
            (Pausing { ready: true }, Event::Sent) | (Paused, Heard(Message::Ready)) => {
                self.go(Relinquishing, [Action::Relinquish])
            }
            (Relinquishing, Event::Relinquished) => self.go(Committing, [Action::Journal(Record::Committed)]),

            // Before the commit every failure is the same failure.
            (Offering | Copying | Pausing { .. } | Paused | Relinquishing, failure) => match failure {
                Event::Cancel => self.keep(Outcome::Cancelled),
                Event::VmmGone => {
                    self.go(Kept, [Action::Send(Message::Abort), Action::Report(Outcome::VmmGone)])
                }
                Event::PeerLost | Event::Failed | Heard(Message::Abort | Message::Declined) => {
                    self.keep(Outcome::Failed)
                }
                _ => Vec::new(),
            },

            // What the destination may say meanwhile it says again.
            (Committing, Event::Journalled(Record::Committed)) => {
                self.go(Committed, [Action::Send(Message::Commit)])
            }
            (Committing, Event::JournalFailed(Record::Committed)) => self.keep(Outcome::Failed),

            (Committed, Event::Tick | Heard(Message::Ready)) => {
                self.go(Committed, [Action::Send(Message::Commit)])
            }
            (Committed, Heard(Message::Fetching)) => self.go(Serving, [Action::Serve]),
            (Committed | Serving, Heard(Message::Running)) => self.finish(Outcome::Completed),
            (Committed | Serving, Heard(Message::Lost)) | (Serving, Event::Abandoned) => {
                self.finish(Outcome::Lost)
            }
            (Finishing { outcome, .. }, Event::Journalled(Record::Finished)) => {
                self.go(Discarding, [Action::Send(Message::Done), Action::Discard, Action::Report(outcome)])
            }
            // Asking again would not do: an operator says only once that all is lost.
            (Finishing { outcome, .. }, Event::JournalFailed(Record::Finished)) => {
                self.go(Finishing { outcome, writing: false }, [])
            }
            (Finishing { outcome, writing: false }, Event::Tick) => self.finish(outcome),

            (Committed, Heard(Message::Declined)) => {
                self.go(TakingBack, [Action::Journal(Record::TakenBack)])
            }
            (TakingBack, Event::Journalled(Record::TakenBack)) => {
                self.go(Returning(Outcome::TakenBack), [Action::Send(Message::Done), Action::Resume])
            }
            // Ask once more; the answer will be the same, and the journal is tried again.
            (TakingBack, Event::JournalFailed(Record::TakenBack)) => self.go(Committed, []),

            // Not before the VMM is gone: with no record of a migration, a relinquished VMM
            // would be resumed.
            (Discarding, Event::Discarded | Event::VmmGone) => self.go(Gone, [Action::Forget]),

            (Returning(outcome), Event::Resumed) => self.go(Kept, [Action::Forget, Action::Report(outcome)]),
            (Returning(outcome), Event::ResumeFailed) => self.go(Stuck(outcome), []),
            (Stuck(outcome), Event::Tick) => self.go(Returning(outcome), [Action::Resume]),
            (Returning(_) | Stuck(_), Event::VmmGone) => {
                self.go(Kept, [Action::Forget, Action::Report(Outcome::VmmGone)])
            }

            // Decided for good: as if the migration were no longer known.
            (Discarding | Gone | Returning(_) | Stuck(_) | Kept, Heard(message)) => {
                Self::answer_unknown(message).map(Action::Send).into_iter().collect()
            }
            _ => Vec::new(),
        }
    }

    /// Whether [`Event::Cancel`] would still be taken.
    pub fn can_cancel(&self) -> bool {
        use State::*;
        matches!(self.state, Offering | Copying | Pausing { .. } | Paused | Relinquishing)
    }

    /// Whether [`Event::Abandoned`] would be taken.
    pub fn can_abandon(&self) -> bool {
        self.state == State::Serving
    }

    /// Whether nothing is left to do, so that the machine may be dropped.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Gone | State::Kept)
    }

    /// Where it stands, for operators.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Offering => Phase::Offering,
            State::Copying => Phase::Copying,
            State::Pausing { .. } | State::Paused => Phase::SwitchingOver,
            State::Relinquishing | State::Committing | State::Committed => Phase::Committing,
            State::Serving => Phase::Fetching,
            State::Finishing { .. } | State::Discarding => Phase::Finishing,
            State::Gone => Phase::Completed,
            State::TakingBack | State::Returning(_) | State::Stuck(_) => Phase::Returning,
            State::Kept => Phase::Returned,
        }
    }

    /// Ends it with the guest here. Nothing has been committed.
    fn keep(&mut self, outcome: Outcome) -> Vec<Action> {
        self.go(State::Returning(outcome), [Action::Resume, Action::Send(Message::Abort)])
    }

    /// Ends it with the guest given away, whatever has become of it there.
    fn finish(&mut self, outcome: Outcome) -> Vec<Action> {
        self.go(State::Finishing { outcome, writing: true }, [Action::Journal(Record::Finished)])
    }

    fn go<const N: usize>(&mut self, state: State, actions: [Action; N]) -> Vec<Action> {
        self.state = state;
        actions.into()
    }
}
