//! Carries out what a half of the handover orders.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use memlane_protocol::handover::{Action, Destination, Event, Message, Source};
use memlane_protocol::wire::control::Control;
use tokio::sync::oneshot;
use tracing::{debug, error, info, warn};

use crate::guest::{DriverError, Guest};
use crate::host::Host;
use crate::journal::Entry;
use crate::link::Link;

/// Longest wait for the answer to a word that is sent over a connection of its own.
const ANSWER: Duration = Duration::from_secs(2);

/// A half of the handover.
pub trait Half {
    /// Takes an event and says what to do.
    fn on(&mut self, event: Event) -> Vec<Action>;
    /// Whether nothing is left to do.
    fn is_over(&self) -> bool;
}

impl Half for Source {
    fn on(&mut self, event: Event) -> Vec<Action> {
        Source::on(self, event)
    }

    fn is_over(&self) -> bool {
        Source::is_over(self)
    }
}

impl Half for Destination {
    fn on(&mut self, event: Event) -> Vec<Action> {
        Destination::on(self, event)
    }

    fn is_over(&self) -> bool {
        Destination::is_over(self)
    }
}

/// What a half acts on: the guest here, the journal, and the other host.
pub struct Executor {
    /// This host.
    pub host: Rc<Host>,
    /// The migration, as the journal names it.
    pub entry: Entry,
    /// The guest's VMM, if it is attached.
    pub guest: Option<Rc<Guest>>,
    /// The migration's own connection, while it lasts.
    pub link: Option<Link>,
    /// Where the answer to the word being dealt with goes, if it came another way.
    pub reply: Option<oneshot::Sender<Message>>,
    /// Why things went as they did, for the operator.
    pub reason: Option<String>,
    /// Time spent in making records durable.
    pub journal_time: Duration,
    /// Time that loading took, for the word that says so.
    pub load_time: Duration,
    /// Time that resuming took.
    pub resume_time: Duration,
    /// The migration has started the guest here.
    pub resumed: bool,
}

impl Executor {
    /// For a migration of `guest`.
    pub fn new(host: Rc<Host>, entry: Entry, guest: Option<Rc<Guest>>, link: Option<Link>) -> Self {
        Self {
            host,
            entry,
            guest,
            link,
            reply: None,
            reason: None,
            journal_time: Duration::ZERO,
            load_time: Duration::ZERO,
            resume_time: Duration::ZERO,
            resumed: false,
        }
    }

    /// Keeps the first reason that is given.
    pub fn blame(&mut self, reason: impl ToString) {
        self.reason.get_or_insert_with(|| reason.to_string());
    }

    /// Feeds `event` to `half` and does what it says, and so on until nothing is left to do.
    /// Returns what only the half's own task can do: copy, pause and report.
    pub async fn feed<H: Half>(&mut self, half: &mut H, event: Event) -> Vec<Action> {
        debug!(guest = %self.entry.guest, ?event, "handover");
        let actions = half.on(event);
        self.carry_out(half, actions).await
    }

    /// Does what a half said, as [`feed`](Self::feed) does.
    pub async fn carry_out<H: Half>(&mut self, half: &mut H, actions: Vec<Action>) -> Vec<Action> {
        let mut left = Vec::new();
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            debug!(guest = %self.entry.guest, ?action, "handover");
            match action {
                Action::Copy | Action::Pause | Action::Report(_) => left.push(action),
                _ => {
                    if let Some(event) = self.perform(action).await {
                        actions.extend(half.on(event));
                    }
                }
            }
        }
        self.reply = None;
        left
    }

    async fn perform(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Send(message) => return self.send(message).await,
            Action::Journal(record) => {
                let started = Instant::now();
                let written = self.host.journal.write(&self.entry, record).await;
                self.journal_time += started.elapsed();
                if let Err(failure) = written {
                    error!(guest = %self.entry.guest, %record, %failure, "cannot write to the journal");
                    self.blame(failure);
                    return Some(Event::JournalFailed(record));
                }
                self.entry.record = record;
                return Some(Event::Journalled(record));
            }
            Action::Forget => {
                if let Err(failure) = self.host.journal.forget(&self.entry).await {
                    warn!(guest = %self.entry.guest, %failure, "cannot tidy up the journal");
                }
            }
            Action::Relinquish => {
                let asked = match self.guest.clone() {
                    Some(guest) => guest.driver.relinquish(self.entry.migration).await,
                    None => Err(DriverError::Gone),
                };
                return Some(self.outcome(asked, Event::Relinquished, Event::Failed));
            }
            Action::Resume => return Some(self.resume().await),
            Action::Discard => {
                let asked = match self.guest.clone() {
                    Some(guest) => guest.driver.discard().await,
                    None => Ok(()),
                };
                return Some(self.outcome(asked, Event::Discarded, Event::VmmGone));
            }
            Action::Copy | Action::Pause | Action::Report(_) => {
                unreachable!("these are left to the half that has them")
            }
        }
        None
    }

    async fn resume(&mut self) -> Event {
        if self.resumed {
            return Event::Resumed;
        }
        let started = Instant::now();
        let asked = match self.guest.clone() {
            Some(guest) => guest.driver.resume().await,
            None => Err(DriverError::Gone),
        };
        self.resume_time = started.elapsed();
        self.resumed = asked.is_ok();
        if let Some(guest) = self.guest.clone().filter(|guest| guest.tracked.take())
            && let Err(failure) = guest.driver.stop_tracking().await
        {
            warn!(guest = %self.entry.guest, %failure, "cannot stop tracking; the guest may run slower");
        }
        self.outcome(asked, Event::Resumed, Event::ResumeFailed)
    }

    fn outcome(&mut self, asked: Result<(), DriverError>, done: Event, failed: Event) -> Event {
        match asked {
            Ok(()) => done,
            Err(failure) => {
                warn!(guest = %self.entry.guest, %failure, "the VMM did not do as it was asked");
                self.blame(&failure);
                // A VMM that does not answer may or may not have done it.
                if matches!(failure, DriverError::Failed { .. }) { failed } else { Event::VmmGone }
            }
        }
    }

    /// Sends a word where the other half will hear it: as the answer to its own, over the
    /// migration's connection, or over a new one, which then brings the answer.
    async fn send(&mut self, message: Message) -> Option<Event> {
        if let Some(reply) = self.reply.take() {
            let _ = reply.send(message);
            return None;
        }
        let word = self.word(message)?;
        if let Some(link) = &self.link {
            // A broken link is noticed by whoever listens to it.
            let _ = link.send(&word).await;
            return None;
        }
        match self.exchange(&word).await {
            Ok(answer) => answer.map(Event::Message),
            Err(failure) => {
                info!(guest = %self.entry.guest, peer = %self.entry.peer, %failure, "cannot reach the other host");
                None
            }
        }
    }

    async fn exchange(&self, word: &Control) -> Result<Option<Message>, crate::link::LinkError> {
        let Some(mut link) = self.host.connect(&self.entry.peer).await? else { return Ok(None) };
        link.send(word).await?;
        match tokio::time::timeout(ANSWER, link.receive()).await {
            Ok(Ok(Control::Handover { migration, message, .. })) if migration == self.entry.migration => {
                Ok(Some(message))
            }
            Ok(Err(failure)) => Err(failure),
            _ => Ok(None),
        }
    }

    fn word(&self, message: Message) -> Option<Control> {
        let time = match message {
            // These carry more than a word, and were sent where they were made.
            Message::Offer | Message::Accept | Message::Refuse => return None,
            Message::Ready => self.load_time,
            Message::Running => self.resume_time,
            _ => Duration::ZERO,
        };
        Some(Control::Handover {
            migration: self.entry.migration,
            message,
            nanoseconds: time.as_nanos() as u64,
            reason: self.reason.clone().unwrap_or_default(),
        })
    }
}
