//! The half that has the guest and gives it away.

use super::{Action, Event, Message, Outcome, Phase, Record, Resolution, WrongRecord};

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
    /// `Leaving` is being written, and the guest runs.
    Leaving,
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

    // Whose the guest is, this host cannot tell any more.
    /// Restarted, with no more than `Leaving`: the VMM is to say how it stands.
    Unsure,
    /// The VMM has been relinquished: the destination is asked for its promise.
    Asking,

    // The guest is the destination's, until it says otherwise.
    Committed,
    /// `TakenBack` is being written. `committed`: `Committed` was durable before.
    TakingBack {
        committed: bool,
    },

    // The guest has run at the destination.
    /// It still needs the memory that is here.
    Serving,
    /// Nothing is needed from here any more. How it ended is to be written; `writing` tells
    /// whether the journal is at it.
    Finishing {
        outcome: Outcome,
        writing: bool,
    },
    Discarding,
    Gone,

    // The guest is ours for good.
    /// `silent`: the destination may still be in doubt, and must not forget before the guest runs.
    Returning {
        outcome: Outcome,
        silent: bool,
    },
    /// The VMM could not resume it; it is asked again.
    Stuck {
        outcome: Outcome,
        silent: bool,
    },
    Kept,
}

impl Source {
    /// Begins: asks the destination.
    pub fn new() -> (Self, Vec<Action>) {
        (Self { state: State::Offering }, vec![Action::Send(Message::Offer)])
    }

    /// Takes up a migration after the daemon was restarted, from the last record that the
    /// journal holds of it. To be called as well, with `None`, for a VMM that says that it has been
    /// relinquished for a migration of which the journal knows nothing.
    ///
    /// After [`Record::Leaving`] the VMM is to be heard: [`Event::Owned`], [`Event::Waits`] or
    /// [`Event::VmmGone`]; [`Event::Owned`] is to be told after [`Record::Committed`] as well.
    ///
    /// # Errors
    ///
    /// [`WrongRecord`] for a record that only a destination writes.
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
                return Err(WrongRecord { record, half: "source" });
            }
        };
        Ok((Self { state }, actions))
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
            (Offering | Copying | Leaving | Pausing { .. } | Paused | Relinquishing, Event::VmmGone)
            | (Unsure | Asking, Event::VmmGone) => self.vmm_gone(),
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
            (Committed | Asking, Heard(Message::Fetching)) => self.go(Serving, [Action::Serve]),
            (Committed | Asking | Serving, Heard(Message::Running)) => self.finish(Outcome::Completed),
            // A destination that declines what has run there has lost its journal, and the guest with it.
            (Committed | Asking | Serving, Heard(Message::Lost))
            | (Serving, Heard(Message::Declined) | Event::Abandoned) => self.finish(Outcome::Lost),
            (Committed | Asking, Event::Resolved(Resolution::Discard)) => self.finish(Outcome::GivenUp),
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
            // Ask once more; the answer will be the same, and the journal is tried again.
            (TakingBack { committed }, Event::JournalFailed(Record::TakenBack)) => {
                self.go(if committed { Committed } else { Asking }, [])
            }
            // Nobody but this half can have told it to run again: what told of that is lost.
            (Committed, Event::Owned) => self.keep_silently(Outcome::TakenBack),

            // Not before the VMM is gone: with no record of a migration, a relinquished VMM
            // would be in doubt.
            (Discarding, Event::Discarded | Event::VmmGone) => self.go(Gone, [Action::Forget]),

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
            (Returning { .. } | Stuck { .. }, Event::VmmGone) => self.vmm_gone(),

            // Decided for good: as if the migration were no longer known.
            (
                Discarding | Gone | Returning { silent: false, .. } | Stuck { silent: false, .. } | Kept,
                Heard(message),
            ) => Self::answer_unknown(message).map(Action::Send).into_iter().collect(),
            _ => Vec::new(),
        }
    }

    /// Whether [`Event::Cancel`] would still be taken.
    pub fn can_cancel(&self) -> bool {
        use State::*;
        matches!(self.state, Offering | Copying | Leaving | Pausing { .. } | Paused | Relinquishing)
    }

    /// Whether [`Event::Abandoned`] would be taken.
    pub fn can_abandon(&self) -> bool {
        self.state == State::Serving
    }

    /// Whether the guest is in doubt, so that [`Event::Resolved`] would be taken.
    pub fn can_resolve(&self) -> bool {
        matches!(self.state, State::Committed | State::Asking)
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
            State::Leaving | State::Pausing { .. } | State::Paused => Phase::SwitchingOver,
            State::Relinquishing | State::Committing | State::Unsure | State::Asking | State::Committed => {
                Phase::Committing
            }
            State::Serving => Phase::Fetching,
            State::Finishing { .. } | State::Discarding => Phase::Finishing,
            State::Gone => Phase::Completed,
            State::TakingBack { .. } | State::Returning { .. } | State::Stuck { .. } => Phase::Returning,
            State::Kept => Phase::Returned,
        }
    }

    /// Ends it with the guest here, which has not been relinquished.
    fn keep(&mut self, outcome: Outcome) -> Vec<Action> {
        let silent = false;
        self.go(State::Returning { outcome, silent }, [Action::Resume, Action::Send(Message::Abort)])
    }

    /// Ends it with the guest here, which may have been relinquished, though not committed: it runs
    /// before the destination hears that it may forget.
    fn keep_silently(&mut self, outcome: Outcome) -> Vec<Action> {
        self.go(State::Returning { outcome, silent: true }, [Action::Resume])
    }

    /// Ends it with the guest's VMM, which has ended.
    fn vmm_gone(&mut self) -> Vec<Action> {
        let told = [Action::Forget, Action::Send(Message::Abort), Action::Report(Outcome::VmmGone)];
        self.go(State::Kept, told)
    }

    /// Ends it with the guest given away, whatever has become of it there.
    fn finish(&mut self, outcome: Outcome) -> Vec<Action> {
        self.go(State::Finishing { outcome, writing: true }, [Action::Journal(Self::end_of(outcome))])
    }

    /// What is written of a guest that was given away.
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
