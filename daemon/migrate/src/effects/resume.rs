//! This module tries to reach the other host again when the migration's own connection is lost while the guest is copied,
//! and goes on over another connection.

use std::future::pending;
use std::pin::Pin;
use std::rc::Rc;
use std::time::{Duration, Instant};

use memlane_net::journal::Entry;
use memlane_net::link::{Link, LinkError};
use memlane_net::task;
use memlane_protocol::wire::control::{Control, Refusal, RefusalKind};
use tracing::{debug, info, warn};

use super::Effects;
use crate::context::Context;
use crate::progress::Role;

/// The other host is tried again in these intervals.
const AGAIN: Duration = Duration::from_millis(500);
/// The other host may take this long to answer.
const ANSWER: Duration = Duration::from_secs(3);

/// The time in which a lost connection is made again.
pub(crate) struct Suspension {
    /// The connection is lost since this moment.
    since: Instant,
    /// This is why it was lost.
    reason: String,
    /// At the source, this connects again.
    reconnecting: Option<Reconnecting>,
}

type Reconnecting = Pin<Box<dyn Future<Output = Result<(Link, u64), String>>>>;

/// What comes of the wait for another connection.
pub(crate) enum Reunion {
    /// The other host is there. It has received so many messages.
    Connected(Link, u64),
    /// The other host does not know the migration any more, or the wait is over, for this reason.
    Parted(String),
}

impl Effects {
    /// Begins to wait for another connection in place of the migration's own, which is lost. Returns whether there may be
    /// one.
    pub(crate) fn suspend(&mut self, error: &LinkError) -> bool {
        let Some(link) = self.link.as_mut().filter(|link| link.can_resume()) else { return false };
        if self.patience.is_zero() || !error.is_loss() {
            return false;
        }
        link.suspend();
        let (guest, peer, patience) = (&self.entry.guest, &self.entry.peer, self.patience);
        warn!(%guest, %peer, %error, ?patience, "lost the other host; the guest runs on, and the migration waits for it");
        let is_source = self.handle.progress.borrow().role == Role::Source;
        let reconnecting: Option<Reconnecting> = is_source.then(|| {
            Box::pin(reconnect(self.context.clone(), self.entry.clone(), link.received())) as Reconnecting
        });
        self.suspension = Some(Suspension { since: Instant::now(), reason: error.to_string(), reconnecting });
        self.handle.suspended.set(true);
        true
    }

    /// Goes on over another connection. A source comes by itself to a destination that has not noticed the loss.
    ///
    /// # Errors
    ///
    /// Fails if messages were lost for good.
    pub(crate) async fn resume(&mut self, link: Link, received: u64) -> Result<(), String> {
        let is_source = self.handle.progress.borrow().role == Role::Source;
        let Some(own) = &mut self.link else {
            refuse_to_resume(link);
            return Ok(());
        };
        if !is_source {
            // That it is broken as well is noticed by the task that listens to it.
            let _ = link.send(&Control::Resumed(own.received())).await;
        }
        own.resume(link, received).map_err(|error| error.to_string())?;
        let took = self.suspension.take().map(|suspension| suspension.since.elapsed());
        self.handle.suspended.set(false);
        info!(guest = %self.entry.guest, peer = %self.entry.peer, ?took, "the other host is there again; the migration goes on");
        Ok(())
    }

    /// Returns in words what a suspended migration waits for.
    pub(super) fn waits_for_peer(&self) -> Option<String> {
        let Suspension { reason, .. } = self.suspension.as_ref()?;
        let (peer, patience) = (&self.entry.peer, self.patience);
        Some(format!("{peer} to be reached again, for up to {patience:.0?}: {reason}; the guest runs on"))
    }
}

impl Suspension {
    /// Returns what comes of the wait, which lasts for `patience`. The caller awaits this again and again.
    pub(crate) async fn ends(&mut self, patience: Duration) -> Reunion {
        let reason = format!("{}, and has not come back within {patience:.0?}", self.reason);
        let reconnected = async {
            match &mut self.reconnecting {
                Some(reconnecting) => reconnecting.await,
                None => pending().await,
            }
        };
        tokio::select! {
            connected = reconnected => match connected {
                Ok((link, received)) => Reunion::Connected(link, received),
                Err(refusal) => Reunion::Parted(refusal),
            },
            () = tokio::time::sleep_until((self.since + patience).into()) => Reunion::Parted(reason),
        }
    }
}

/// Tells a source that its migration is not under way here. Nothing waits for that.
pub(crate) fn refuse_to_resume(mut link: Link) {
    let reason = "the migration is not under way any more; was the daemon started anew?".to_owned();
    task::spawn("refusal to resume", async move {
        let _ = link.send(&Control::Refuse(vec![Refusal { what: RefusalKind::Busy, reason }])).await;
        link.until_closed().await;
    });
}

/// Connects to the destination again, and tells it that this host has received `received` messages. Returns the connection
/// and how many messages the destination has received.
///
/// # Errors
///
/// Fails if the destination does not know the migration any more.
async fn reconnect(context: Rc<Context>, entry: Entry, received: u64) -> Result<(Link, u64), String> {
    let (peer, migration) = (&entry.peer, entry.migration);
    loop {
        let error = match open(&context, &entry, &Control::Resume { migration, received }).await {
            Ok((link, Control::Resumed(count))) => return Ok((link, count)),
            Ok((_, Control::Refuse(refusals))) => {
                let reasons: Vec<String> = refusals.into_iter().map(|refusal| refusal.reason).collect();
                return Err(format!("{peer} was lost, and does not go on: {}", reasons.join("; ")));
            }
            Ok((_, other)) => LinkError::Unexpected { expected: "resumed", found: other.name() },
            Err(error) => error,
        };
        debug!(guest = %entry.guest, %peer, %error, "the other host cannot be reached yet");
        tokio::time::sleep(AGAIN).await;
    }
}

async fn open(context: &Context, entry: &Entry, first: &Control) -> Result<(Link, Control), LinkError> {
    let mut link = context.connect(&entry.peer).await?.ok_or(LinkError::Closed)?;
    link.send(first).await?;
    let answer = tokio::time::timeout(ANSWER, link.receive()).await;
    let answer = answer.map_err(|_| LinkError::Silent(ANSWER))??;
    Ok((link, answer))
}
