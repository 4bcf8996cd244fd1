//! The half that is given the guest.

use super::{Action, Event, Message, Outcome, Phase, Record, WrongRecord};

/// The destination's half of the handover of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Destination {
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    // Free to give up.
    Accepting,
    Receiving,

    // In doubt.
    /// `Prepared` is being written. An abort that comes now comes again in answer to `Ready`.
    Preparing,
    Prepared,

    // The guest is ours.
    /// `Running` is being written; the VMM has not been told to run.
    Starting,
    /// The VMM has been told to run: if it vanishes now, nobody knows whether it did.
    Resuming,
    /// It runs, and part of its memory is still at the source.
    Fetching,
    Running,
    /// Nothing will make it whole any more, or it has ended before that was known.
    Lost,
    Finished,

    // The guest has never run here and never will.
    /// `Declined` is to be written; `writing` tells whether the journal is at it.
    Declining {
        writing: bool,
    },
    Declined,
    Discarded,
}

impl Destination {
    /// Begins, when an offer has come: the daemon is to look whether it can be met, and to say
    /// [`Event::Accepted`] or [`Event::Refused`].
    #[allow(clippy::new_without_default, reason = "a half is made for an offer, not by default")]
    pub fn new() -> Self {
        Self { state: State::Accepting }
    }

    /// Takes up a migration after the daemon was restarted, from the last record that the
    /// journal holds of it. If the VMM is no longer there, [`Event::VmmGone`] is to follow; if the
    /// guest cannot run here since nobody knows which of its pages are missing,
    /// [`Event::ResumeFailed`], which gives back at once what was only prepared. To be
    /// called as well, with `None`, for an incoming VMM that names a migration of which the
    /// journal knows nothing (but not for a VMM that runs: that is simply a guest of this host).
    ///
    /// # Errors
    ///
    /// [`WrongRecord`] for a record that only a source writes.
    pub fn recover(record: Option<Record>) -> Result<(Self, Vec<Action>), WrongRecord> {
        let (state, actions) = match record {
            None => (State::Discarded, vec![Action::Discard]),
            Some(Record::Prepared) => (State::Prepared, vec![Action::Send(Message::Ready)]),
            // Perhaps it runs already, and perhaps it was never told to.
            Some(Record::Running) => (State::Resuming, vec![Action::Resume]),
            Some(Record::Declined) => {
                (State::Declined, vec![Action::Discard, Action::Send(Message::Declined)])
            }
            Some(record @ (Record::Committed | Record::Finished | Record::TakenBack)) => {
                return Err(WrongRecord { record, half: "destination" });
            }
        };
        Ok((Self { state }, actions))
    }

    /// Answers a message, other than a new offer, about a migration that this host, as a
    /// destination, knows nothing of: it never got as far as `Ready`, or both sides have ended it.
    pub fn answer_unknown(message: Message) -> Option<Message> {
        match message {
            // Only a source that may still be waiting here can have offered it.
            Message::Offer => Some(Message::Abort),
            _ => None,
        }
    }

    /// Takes an event and says what to do.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        use Event::Message as Heard;
        use State::*;

        match (self.state, event) {
            (Accepting, Event::Accepted) => self.go(Receiving, [Action::Send(Message::Accept)]),
            (Accepting, Event::Refused) => self.go(
                Discarded,
                [Action::Send(Message::Refuse), Action::Discard, Action::Report(Outcome::Refused)],
            ),
            (Receiving, Event::Loaded) => self.go(Preparing, [Action::Journal(Record::Prepared)]),
            (
                Accepting | Receiving,
                Event::PeerLost | Event::Failed | Event::VmmGone | Heard(Message::Abort),
            )
            | (Preparing, Event::JournalFailed(Record::Prepared)) => self.go(
                Discarded,
                [Action::Send(Message::Abort), Action::Discard, Action::Report(Outcome::Failed)],
            ),

            // From here on the source may commit at any moment, so nothing is given up alone.
            (Preparing, Event::Journalled(Record::Prepared)) | (Prepared, Event::Tick) => {
                self.go(Prepared, [Action::Send(Message::Ready)])
            }
            (Prepared, Heard(Message::Commit)) => self.go(Starting, [Action::Journal(Record::Running)]),
            (Prepared, Heard(Message::Abort)) => {
                self.go(Discarded, [Action::Discard, Action::Forget, Action::Report(Outcome::Failed)])
            }
            (Starting, Event::Journalled(Record::Running)) => self.go(Resuming, [Action::Resume]),
            // The source is asked again, and the journal is tried again.
            (Starting, Event::JournalFailed(Record::Running)) => self.go(Prepared, []),

            // It never ran. Should a record still be on its way to the journal, `Declined` follows it.
            (Preparing | Prepared | Starting, Event::VmmGone)
            | (Prepared | Resuming, Event::ResumeFailed) => {
                self.go(Declining { writing: true }, [Action::Journal(Record::Declined)])
            }

            (Resuming, Event::Resumed) => {
                self.go(Running, [Action::Send(Message::Running), Action::Report(Outcome::Completed)])
            }
            (Running, Event::Tick | Heard(Message::Commit)) => {
                self.go(Running, [Action::Send(Message::Running)])
            }

            (Resuming, Event::ResumedIncomplete) | (Fetching, Event::Tick | Heard(Message::Commit)) => {
                self.go(Fetching, [Action::Send(Message::Fetching)])
            }
            (Fetching, Event::Complete) => {
                self.go(Running, [Action::Send(Message::Running), Action::Report(Outcome::Completed)])
            }

            // Perhaps it ran, so the source must not; and whether all of it was here is not known.
            (Resuming, Event::VmmGone) => {
                self.go(Lost, [Action::Send(Message::Lost), Action::Report(Outcome::VmmGone)])
            }
            (Resuming, Event::Abandoned)
            | (Fetching, Event::VmmGone | Event::Abandoned | Heard(Message::Gone)) => {
                self.go(Lost, [Action::Send(Message::Lost), Action::Report(Outcome::Lost)])
            }
            (Lost, Event::Tick | Heard(Message::Commit)) => self.go(Lost, [Action::Send(Message::Lost)]),

            (Running | Lost, Heard(Message::Done)) => self.go(Finished, [Action::Forget]),

            (Declining { .. }, Event::JournalFailed(Record::Declined)) => {
                self.go(Declining { writing: false }, [])
            }
            (Declining { writing: false }, Event::Tick) => {
                self.go(Declining { writing: true }, [Action::Journal(Record::Declined)])
            }
            // Not earlier: after a crash in between, the VMM is told to run once more.
            (Declining { .. }, Event::Journalled(Record::Declined)) => self.go(
                Declined,
                [Action::Send(Message::Declined), Action::Discard, Action::Report(Outcome::TakenBack)],
            ),
            (Declined, Event::Tick | Heard(Message::Commit)) => {
                self.go(Declined, [Action::Send(Message::Declined)])
            }
            (Declined, Heard(Message::Done | Message::Abort)) => self.go(Discarded, [Action::Forget]),

            (Finished | Discarded, Heard(message)) => {
                Self::answer_unknown(message).map(Action::Send).into_iter().collect()
            }
            _ => Vec::new(),
        }
    }

    /// Whether an operator may give the guest up with [`Event::Abandoned`].
    pub fn can_abandon(&self) -> bool {
        self.state == State::Fetching
    }

    /// Whether nothing is left to do, so that the machine may be dropped.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Finished | State::Discarded)
    }

    /// Where it stands, for operators.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Accepting => Phase::Offering,
            State::Receiving => Phase::Copying,
            State::Preparing => Phase::SwitchingOver,
            State::Prepared | State::Starting | State::Resuming => Phase::Committing,
            State::Fetching => Phase::Fetching,
            State::Running | State::Lost => Phase::Finishing,
            State::Finished => Phase::Completed,
            State::Declining { .. } | State::Declined => Phase::Returning,
            State::Discarded => Phase::Returned,
        }
    }

    fn go<const N: usize>(&mut self, state: State, actions: [Action; N]) -> Vec<Action> {
        self.state = state;
        actions.into()
    }
}
