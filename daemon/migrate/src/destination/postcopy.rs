//! Post-copy at the destination: what of the guest's memory is only at the source, from the source's offer to serve it
//! until the last page is here.

use std::future::pending;
use std::time::Duration;

use memlane_net::link::Link;
use memlane_protocol::handover::Event;
use memlane_protocol::wire::control::{Control, Refusal, RefusalKind};
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use crate::effects::Effects;
use crate::fetch::{FetchError, FetchSession, Fetching};
use crate::progress::Progress;

/// A record that cannot be written is tried again after this time.
const AGAIN: Duration = Duration::from_secs(1);

/// The post-copy of one guest, if there is one.
pub(crate) struct Postcopy {
    /// This receives connections over which the source offers to serve what is missing.
    links: mpsc::Receiver<Link>,
    /// This is present when the source has offered to serve what is missing, so that the guest is to run without all of
    /// its memory.
    fetching: Option<Fetching>,
    /// This is the source's session until the last page came. It is closed when the source has heard of that.
    fetched: Option<FetchSession>,
    /// If this is true, the last page is here, and the journal could not be told.
    unnoted: bool,
}

/// An event of post-copy.
pub(crate) enum PostcopyNews {
    /// The source offers to serve what is missing over this connection.
    Link(Link),
    /// All of the guest's memory is here, or it is not right.
    Fetched(Result<(), FetchError>),
}

impl Postcopy {
    /// Waits for offers of the source, which arrive by `links`.
    pub(crate) fn new(links: mpsc::Receiver<Link>) -> Self {
        Self { links, fetching: None, fetched: None, unnoted: false }
    }

    /// Returns what happens next. The caller awaits this again and again.
    pub(crate) async fn next(&mut self) -> PostcopyNews {
        let Self { links, fetching, unnoted, .. } = self;
        tokio::select! {
            biased;
            Some(link) = links.recv() => PostcopyNews::Link(link),
            whole = completes(fetching) => PostcopyNews::Fetched(whole),
            () = tokio::time::sleep(AGAIN), if *unnoted => PostcopyNews::Fetched(Ok(())),
        }
    }

    /// Returns the fetching, if the source has offered to serve.
    pub(super) fn fetching(&mut self) -> Option<&mut Fetching> {
        self.fetching.as_mut()
    }

    /// Takes the source's offer to serve what will be missing. Unless `may_begin`, only a guest that is being fetched
    /// already is served.
    pub(super) async fn offered(&mut self, effects: &mut Effects, mut link: Link, may_begin: bool) {
        if self.fetching.is_none()
            && may_begin
            && let Some(guest) = effects.guest().cloned()
        {
            match Fetching::open(effects.context.clone(), guest).await {
                Ok(fetching) => {
                    effects.placing = Some(fetching.placing().clone());
                    effects.entry.fetching = true;
                    self.fetching = Some(fetching);
                }
                Err(error) => {
                    warn!(guest = %effects.entry.guest, %error, "cannot fetch what would be missing");
                    let refusal = Refusal { what: RefusalKind::Host, reason: error.to_string() };
                    // The source ends it, and says why.
                    let _ = link.send(&Control::Refuse(vec![refusal])).await;
                    link.until_closed().await;
                    return;
                }
            }
        }
        self.served(effects, link).await;
    }

    /// Takes a connection over which the source serves what is missing. If nothing is, or the VMM is not here, the
    /// connection is closed, and the source tries again.
    pub(crate) async fn served(&mut self, effects: &mut Effects, link: Link) {
        if let Some(fetching) = &mut self.fetching {
            fetching.accept(link, &effects.entry.peer, effects.entry.migration).await;
        }
    }

    /// Goes on with what an earlier daemon was fetching, if the VMM that has attached again let it be found.
    pub(crate) fn take_up(&mut self, effects: &mut Effects) {
        if let Some(fetching) = effects.reopened.take() {
            self.fetching = Some(fetching);
        }
    }

    /// Notes that the last missing page is here. Returns the event that this is.
    pub(crate) async fn complete(&mut self, effects: &mut Effects) -> Option<Event> {
        match self.fetching.take() {
            Some(fetching) => self.end(fetching, effects).await,
            None if !self.unnoted => return None,
            None => {}
        }
        self.unnoted = !effects.whole().await;
        (!self.unnoted).then_some(Event::Complete)
    }

    async fn end(&mut self, fetching: Fetching, effects: &Effects) {
        let report;
        (report, self.fetched) = fetching.end().await;
        info!(guest = %effects.entry.guest, ?report, "all of the guest's memory is here");
        effects.handle.update(|progress| {
            progress.ram.pages_remaining = 0;
            let postcopy = progress.postcopy.get_or_insert_default();
            postcopy.report(&report);
            postcopy.waits_for = None;
        });
        // Ahead of the word that ends it. A broken link is noticed by the task that listens to it.
        match (&effects.link, &self.fetched) {
            (Some(link), _) => drop(link.send(&Control::Fetched(report)).await),
            (None, Some(session)) => session.tell(report).await,
            (None, None) => {}
        }
    }

    /// Notes that the operator gives up what is missing, if anything is. Returns the event that this is.
    pub(crate) async fn abandoned(&mut self, effects: &mut Effects) -> Option<Event> {
        if self.fetching.as_ref().is_some_and(|fetching| fetching.placing().remaining() == 0) {
            return self.complete(effects).await;
        }
        effects.blame("what was missing of the guest's memory was abandoned by the operator");
        Some(Event::Abandoned)
    }

    /// Makes accesses to what is missing fail from now on, because it will never come.
    pub(crate) async fn poison(&mut self, effects: &Effects) {
        let Some(fetching) = self.fetching.take() else { return };
        // Where the VMM is gone, no vCPU can touch what is missing.
        let Some(guest) = effects.guest() else { return };
        guest.incomplete.set(true);
        let name = &effects.entry.guest;
        match fetching.poison().await {
            Ok(pages) => {
                warn!(guest = %name, pages, "accesses to the guest's missing pages fail from now on")
            }
            Err(error) => {
                effects.context.guests.note_lost(name, guest.process.identity());
                error!(guest = %name, %error, "cannot have accesses to missing pages fail; they go on waiting");
            }
        }
    }

    /// Makes the VMM's memory as any other, because no guest comes after all.
    pub(super) async fn withdraw(&mut self, effects: &mut Effects) {
        if let Some(fetching) = self.fetching.take() {
            (effects.placing, effects.entry.fetching) = (None, false);
            fetching.withdraw().await;
        }
    }

    /// Shows how the fetching goes, from when the guest runs.
    pub(crate) fn show(&mut self, progress: &mut Progress) {
        let Some(fetching) = &mut self.fetching else { return };
        fetching.begin();
        let report = fetching.progress();
        progress.ram.pages_remaining = report.remaining_pages;
        let postcopy = progress.postcopy.get_or_insert_default();
        postcopy.report(&report);
        postcopy.waits_for = fetching.waits_for().map(str::to_owned);
    }

    /// Shows the lanes over which missing pages come, or `otherwise` if none do.
    pub(crate) fn show_lanes(&mut self, progress: &mut Progress, otherwise: impl FnOnce(&mut Progress)) {
        match (&mut self.fetching, &self.fetched) {
            (Some(fetching), _) => fetching.show(progress),
            (None, Some(_)) => {}
            (None, None) => otherwise(progress),
        }
    }
}

async fn completes(fetching: &mut Option<Fetching>) -> Result<(), FetchError> {
    match fetching {
        Some(fetching) => fetching.completes().await,
        None => pending().await,
    }
}
