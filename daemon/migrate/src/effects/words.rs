//! The two hosts exchange words of the handover over any connection that there is.

use std::time::Duration;

use memlane_net::journal::Entry;
use memlane_net::link::LinkError;
use memlane_net::task;
use memlane_protocol::handover::{Event, Message, POWERED_OFF};
use memlane_protocol::wire::control::Control;
use memlane_protocol::wire::hello::RECOVERS;
use tokio::sync::oneshot;

use super::Effects;
use crate::context::Context;
use crate::handle::Word;
use crate::progress::Role;

/// A destination says this of what it fetches, when the source has let go of it.
const GONE: &str = "the source does not have the guest's memory any more, and part of it is missing here";
/// The answer to a word that is sent over a connection of its own may take this long.
const ANSWER: Duration = Duration::from_secs(2);

impl Effects {
    /// Sends a word where the other side will hear it: as the answer to its own, over the migration's connection, or
    /// over a new one, which then brings the answer.
    pub(super) async fn send(&mut self, message: Message) -> Option<Event> {
        if let Some(reply) = self.reply.take() {
            let _ = reply.send((message, self.reason_of(message)));
            return None;
        }
        let word = self.word(message)?;
        if let Some(link) = &self.link
            && self.suspension.is_none()
        {
            // A broken link is noticed by the task that listens to it. One that takes nothing holds up nothing here:
            // a guest may be paused.
            let _ = tokio::time::timeout(ANSWER, link.send(&word)).await;
            return None;
        }
        self.exchange(word);
        None
    }

    /// Sends a word over a connection of its own. The answer arrives as words of other connections do.
    fn exchange(&self, word: Control) {
        if self.entry.peer == *self.context.name() {
            return; // a QEMU was paused, and for whom is not known
        }
        if self.exchanging.replace(true) {
            return; // the one before has not been answered, and is repeated
        }
        let (context, entry, handle) = (self.context.clone(), self.entry.clone(), self.handle.clone());
        let (exchanging, silence) = (self.exchanging.clone(), self.silence.clone());
        task::spawn("word over a connection of its own", async move {
            match ask(&context, &entry, &word).await {
                Ok(Some((message, reason))) => {
                    silence.broken(&entry, message);
                    // No answer to an answer is waited for.
                    let (reply, _) = oneshot::channel();
                    let _ = handle.words.send(Word { message, reason, reply }).await;
                }
                Ok(None) if context.peer(&entry.peer).is_none() => {
                    silence.goes_on(&entry, "no peer of this name is configured; add it as [[peer]]")
                }
                Ok(None) => silence.goes_on(&entry, "it has no answer yet"),
                Err(failure) => silence.goes_on(&entry, failure),
            }
            exchanging.set(false);
        });
    }

    /// Notes why a word was said, if it is bad news.
    pub(crate) fn heard(&mut self, message: Message, reason: &str) {
        let other = match self.handle.progress.borrow().role {
            Role::Source => "destination",
            Role::Destination => "source",
        };
        match message {
            Message::Abort | Message::Declined if reason.is_empty() => {
                self.blame(format!("the {other} gave up"));
            }
            Message::Abort | Message::Declined => self.blame(format!("the {other} gave up: {reason}")),
            Message::Lost => self.blame(format!("the {other} says that the guest is lost: {reason}")),
            Message::Gone => self.blame(GONE),
            Message::Running if other == "destination" => {
                if let Some(how) = reason.strip_prefix(POWERED_OFF) {
                    self.powered_off = true;
                    self.reason = Some(how.to_owned());
                }
            }
            _ => {}
        }
    }

    fn word(&self, message: Message) -> Option<Control> {
        let time = match message {
            // These carry more than a word, and were sent where they were made.
            Message::Offer | Message::Accept | Message::Refuse => return None,
            Message::Ready => self.times.load,
            Message::Running | Message::Fetching => self.times.resume,
            _ => Duration::ZERO,
        };
        Some(Control::Handover {
            migration: self.entry.migration,
            message,
            nanoseconds: time.as_nanos() as u64,
            reason: self.reason_of(message),
        })
    }

    /// Returns what goes with a word as its reason.
    fn reason_of(&self, message: Message) -> String {
        let why = self.why().unwrap_or_default();
        match message {
            Message::Running if self.powered_off => format!("{POWERED_OFF}{why}"),
            _ => why,
        }
    }
}

/// Asks the other host, over a connection of its own.
async fn ask(
    context: &Context,
    entry: &Entry,
    word: &Control,
) -> Result<Option<(Message, String)>, LinkError> {
    let Some(mut link) = context.connect(&entry.peer).await? else {
        return Ok(None);
    };
    if matches!(word, Control::Handover { message: Message::Recovering, .. }) && link.version() < RECOVERS {
        return Ok(None);
    }
    link.send(word).await?;
    match tokio::time::timeout(ANSWER, link.receive()).await {
        Ok(Ok(Control::Handover { migration, message, reason, .. })) if migration == entry.migration => {
            Ok(Some((message, reason)))
        }
        Ok(Err(LinkError::Closed)) | Err(_) | Ok(Ok(_)) => Ok(None),
        Ok(Err(failure)) => Err(failure),
    }
}
