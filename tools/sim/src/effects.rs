//! What is done of what the handover decides: in the journal, to the VMM, and in words to the other host. This is a model
//! of `effects.rs` of `daemon/migrate`, and of its parts.

use std::time::Duration;

use memlane_protocol::handover::{Action, Event as Told, Message, Record};
use memlane_protocol::wire::control::Control;

use crate::event::{Answer, HostId, MigrationId, Wake};
use crate::network::{Payload, Purpose};
use crate::plant::Plant;
use crate::session::{Busy, Input, Reach, Session, identity};
use crate::vmm::{Command, State, command_for};
use crate::world::World;

/// The answer to a word that is sent over a connection of its own may take this long.
const ANSWER: Duration = Duration::from_secs(2);
/// A VMM that lives may take this long to attach again, before it is ended by force.
const RETURN: Duration = Duration::from_secs(10);

impl World {
    pub(crate) fn perform(&mut self, at: HostId, session: &mut Session, action: Action) {
        self.ambush();
        match action {
            Action::Send(message) => self.say(at, session, message),
            Action::Journal(record) => self.journal(at, session, record),
            Action::Forget => {
                let ticket = self.write(at, session.migration, None);
                session.busy = Some((ticket, Busy::Forget));
            }
            Action::Relinquish | Action::Resume | Action::Discard => self.tell_vmm(at, session, action),
            Action::Copy | Action::Pause | Action::Serve | Action::Report(_) => session.left.push(action),
        }
    }

    pub(crate) fn journal(&mut self, at: HostId, session: &mut Session, record: Record) {
        if record == Record::Committed {
            self.check_commit(at, session);
        }
        let cheats = match self.plant {
            Plant::CommitNotJournalled => record == Record::Committed,
            Plant::PreparedNotJournalled => record == Record::Prepared,
            _ => false,
        };
        if cheats {
            session.record = Some(record);
            session.todo.extend(session.machine.on(Told::Journalled(record)));
            return;
        }
        session.busy_since = self.clock.now();
        let ticket = self.write(at, session.migration, Some((record, session.fetching, session.vmm)));
        session.busy = Some((ticket, Busy::Journal(record)));
    }

    /// The journal has written, or cannot.
    pub(crate) fn journalled(&mut self, at: HostId, session: &mut Session, ticket: u64, written: bool) {
        let now = self.clock.now();
        match session.busy.take() {
            Some((due, Busy::Journal(record))) if due == ticket => {
                session.journal_time += now - session.busy_since;
                let event = if written { Told::Journalled(record) } else { Told::JournalFailed(record) };
                if written {
                    session.record = Some(record);
                    self.declined |= record == Record::Declined;
                }
                session.todo.extend(session.machine.on(event));
                if self.plant == Plant::DestinationRunsUnasked && record == Record::Prepared && written {
                    let asker = session.asker(at, 0);
                    self.command(session.vmm, Command::Resume, asker);
                }
            }
            Some((due, Busy::Forget)) if due == ticket => {}
            Some((due, Busy::Whole)) if due == ticket && written => session.event(Told::Complete),
            Some((due, Busy::Whole)) if due == ticket => self.note_whole(at, session),
            other => session.busy = other,
        }
    }

    /// Sends a word where the other side will hear it.
    pub(crate) fn say(&mut self, at: HostId, session: &mut Session, message: Message) {
        if matches!(message, Message::Offer | Message::Accept | Message::Refuse) {
            return; // these carry more than a word, and were sent where they were made
        }
        self.check_word(at, session, message);
        let nanoseconds = match message {
            Message::Ready => session.load_time,
            Message::Running | Message::Fetching => session.resume_time,
            _ => Duration::ZERO,
        };
        let word = self.word(session.migration, message, nanoseconds);
        if let Some(reply) = session.reply.take() {
            self.send_control(reply, at, &word);
            self.close(reply, at);
        } else if session.link.is_some() && session.suspension.is_none() {
            self.tell_peer(at, session, &word);
        } else if session.exchanging.is_none() {
            session.exchanging = Some(None);
            self.hosts[at].words.insert(session.migration, Payload::control(&word));
            self.dial(at, Purpose::Word(session.migration));
        }
    }

    /// The connection for a word is there, or not to be had.
    pub(crate) fn word_dialled(&mut self, at: HostId, session: &mut Session, connection: Option<usize>) {
        let word = self.hosts[at].words.remove(&session.migration);
        match (connection, word) {
            (Some(connection), Some(word)) => {
                session.exchanging = Some(Some(connection));
                self.send(connection, at, word);
                self.wake_after(at, ANSWER, Wake::WordEnds { connection });
            }
            _ => session.exchanging = None,
        }
    }

    /// The answer to a word has come, or nothing will come.
    pub(crate) fn word_answered(
        &mut self,
        session: &mut Session,
        connection: usize,
        answer: Option<Message>,
    ) {
        if session.exchanging != Some(Some(connection)) {
            return;
        }
        session.exchanging = None;
        if let Some(message) = answer {
            session.input(Input::Word { message, reply: None });
        }
    }

    pub(crate) fn tell_vmm(&mut self, at: HostId, session: &mut Session, action: Action) {
        let known = match action {
            Action::Resume if session.resumed => Some(session.resumed()),
            Action::Resume if session.cannot_be_whole() => self.give_back_or_end(session),
            _ => match session.reach {
                Reach::Attached => {
                    let command = command_for(action, session.bond());
                    let ticket = self.ticket();
                    session.busy = Some((ticket, Busy::Vmm(action, session.told_to_run)));
                    session.busy_since = self.clock.now();
                    if action == Action::Resume {
                        session.told_to_run = true;
                    }
                    self.command(session.vmm, command, session.asker(at, ticket));
                    None
                }
                Reach::Away => self.leave_unanswered(session, action),
                Reach::Ended => Some(session.ended()),
                Reach::Released => Some(Told::Discarded),
            },
        };
        if let Some(event) = known {
            session.todo.extend(session.machine.on(event));
        }
    }

    /// The VMM has answered what the handover told it.
    pub(crate) fn vmm_answered(
        &mut self,
        session: &mut Session,
        action: Action,
        before: bool,
        answer: Answer,
    ) {
        let now = self.clock.now();
        let late = session.commit_by.is_some_and(|commit_by| now >= commit_by);
        let event = match (action, answer) {
            (Action::Relinquish, Answer::Done) if late && self.plant != Plant::DeadlineIgnored => {
                Some(Told::Failed)
            }
            (Action::Relinquish, Answer::Done) => Some(Told::Relinquished),
            (Action::Resume, Answer::Done) => {
                session.resume_time = now - session.busy_since;
                session.resumed = true;
                let vmm = &mut self.vmms[session.vmm];
                (vmm.memory.tracker, vmm.stun) = (None, None);
                Some(session.resumed())
            }
            (_, Answer::Done) => Some(Told::Discarded),
            (Action::Resume, Answer::Failed) => {
                let loaded = self.vmms[session.vmm].state == State::Loaded && self.plan.linked;
                let has_run = before && !loaded;
                let ran = session.record == Some(Record::Running) && has_run;
                Some(if ran { Told::VmmGone } else { Told::ResumeFailed })
            }
            (Action::Relinquish, Answer::Failed) => Some(Told::Failed),
            (_, Answer::Unheard) => {
                session.told_to_run = before;
                self.leave_unanswered(session, action)
            }
            (_, Answer::Failed | Answer::Gone) => self.leave_unanswered(session, action),
        };
        if let Some(event) = event {
            session.todo.extend(session.machine.on(event));
        }
    }

    pub(crate) fn leave_unanswered(&mut self, session: &mut Session, action: Action) -> Option<Told> {
        if action == Action::Relinquish {
            return Some(Told::Failed);
        }
        session.unanswered = Some(action);
        session.unanswered_since = self.clock.now();
        None
    }

    /// Deals with a guest that can never be whole here.
    pub(crate) fn give_back_or_end(&mut self, session: &mut Session) -> Option<Told> {
        match session.reach {
            Reach::Away => self.leave_unanswered(session, Action::Resume),
            Reach::Attached if self.vmms[session.vmm].state == State::Loaded && self.plan.linked => {
                Some(Told::ResumeFailed)
            }
            _ => {
                self.end_vmm(session.vmm);
                Some(Told::Abandoned)
            }
        }
    }

    /// Tells whether the VMM does not answer that it is to let the guest run, and pages can come to it.
    pub(crate) fn awaits_memory(&self, session: &Session) -> bool {
        let unanswered = session.reach == Reach::Away && session.unanswered == Some(Action::Resume);
        unanswered && session.fetching && session.placing
    }

    pub(crate) fn patience_ended(&self, session: &Session) -> bool {
        let prepared = session.record == Some(Record::Prepared) && !session.told_to_run;
        let waits = session.fetching && session.reach == Reach::Away;
        let asked = session.unanswered == Some(Action::Discard) || prepared;
        waits && asked && self.clock.now() >= session.unanswered_since + RETURN
    }

    /// Does to a VMM that does not come back what it cannot be told.
    pub(crate) fn lose_patience(&mut self, session: &mut Session) {
        self.end_vmm(session.vmm);
        session.unanswered_since = self.clock.now();
    }

    /// Returns what a VMM that has attached says about the owner of the guest.
    pub(crate) fn told_by(&self, session: &mut Session) -> Option<Told> {
        let vmm = &self.vmms[session.vmm];
        session.told_to_run |= vmm.state == State::Running;
        match vmm.state {
            State::Running => Some(Told::Owned),
            State::Paused if vmm.bond.is_none() && session.record == Some(Record::Leaving) => {
                Some(Told::Owned)
            }
            // Only prepared, and never whole: that comes first.
            State::Loaded if session.unknown_pages && session.record == Some(Record::Prepared) => {
                session.event(Told::Waits);
                Some(Told::ResumeFailed)
            }
            // It was loading when the daemon ended, and what it has it must not run.
            State::Incoming if session.record == Some(Record::Prepared) => {
                session.event(Told::Waits);
                Some(Told::ResumeFailed)
            }
            State::Paused | State::Relinquished | State::Loaded => Some(Told::Waits),
            State::Incoming | State::Ended => None,
        }
    }

    pub(crate) fn word(&self, migration: MigrationId, message: Message, took: Duration) -> Control {
        Control::Handover {
            migration: identity(migration),
            message,
            nanoseconds: took.as_nanos() as u64,
            reason: String::new(),
        }
    }
}
