//! The destination does what the source says while it copies.

use std::io;
use std::ops::Range;
use std::time::Duration;

use memlane_guest::{DriverError, LoadedState, state_pipe};
use memlane_lane::digest::digest_all;
use memlane_net::link::LinkError;
use memlane_protocol::handover::{Destination, Event};
use memlane_protocol::wire::attach::RunState;
use memlane_protocol::wire::control::{Control, LAST_ITERATION, MAX_DIGESTS};

use super::DestinationRole;
use crate::drive::Session;
use crate::fetch::FetchError;
use crate::progress::{Iteration as IterationView, Phase as PhaseView};

/// A source may have this host wait for it this long at most.
const MOST_PATIENCE: Duration = Duration::from_secs(600);

/// The guest cannot be received.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
    /// The source named missing pages before it offered to serve them.
    #[error("the source says what is missing before it offers to serve it")]
    NotServed,
    /// A part of the VMM's state is missing, or came twice.
    #[error("state from byte {offset} came where byte {expected} is next")]
    StateGap {
        /// The part begins at this byte of the state.
        offset: u64,
        /// This byte of the state is due.
        expected: u64,
    },
    /// The lane that carries the VMM's state broke.
    #[error("the lane that carries the VMM's state is lost: {0}; see `memlanectl ports`")]
    StateLane(LinkError),
    /// The source opened another lane for a state of which a part has come.
    #[error("a second lane for the VMM's state came in the middle of it")]
    StateLanes,
    /// The source sent a message that is not due.
    #[error("the source sent `{0}` out of turn")]
    OutOfTurn(&'static str),
    /// The source named pages as holes that the guest does not have.
    #[error("the source sent the hole {hole:?} of a guest of {pages} pages")]
    NoSuchHole {
        /// These are the numbers of the pages.
        hole: Range<u64>,
        /// The guest has this many pages.
        pages: u64,
    },
    /// The memory that the guest would have is not there any more.
    #[error("{0}")]
    Memory(io::Error),
    /// Memory cannot be looked at.
    #[error("cannot digest memory: {0}")]
    Digest(io::Error),
    /// Memory cannot be given back.
    #[error("cannot make pages zero: {0}")]
    Hole(io::Error),
    /// The VMM does not do as it is asked.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The source cannot be answered.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// What is missing cannot be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

impl DestinationRole {
    /// Does what the source says while it copies.
    pub(super) async fn obey(
        &mut self,
        session: &mut Session<Destination>,
        message: Control,
    ) -> Result<Option<Event>, ReceiveError> {
        match message {
            Control::Iteration { number: LAST_ITERATION, .. } => {
                self.state.note_pause();
                if self.state.is_expected() {
                    return self.state_came(session).await;
                }
            }
            Control::Iteration { number, pages } => {
                self.handle.update(|progress| {
                    progress.ram.iterations.push(IterationView { number, pages, ..IterationView::default() });
                    // A source that counts forever must not fill this host's memory.
                    if progress.ram.iterations.len() > 1000 {
                        progress.ram.iterations.remove(0);
                    }
                });
            }
            Control::Patience { milliseconds } => {
                session.effects.patience = Duration::from_millis(milliseconds.into()).min(MOST_PATIENCE);
            }
            Control::LaneLost(lane) => {
                self.lanes.close_lane(lane).await;
                self.guest.ram.intact().map_err(ReceiveError::Memory)?;
                answer(session, Control::LaneClosed(lane)).await?;
            }
            Control::Holes(holes) => {
                self.make_holes(holes).await?;
                answer(session, Control::HolesDone).await?;
            }
            Control::Verify => {
                let ram = self.guest.ram.clone();
                let digests = tokio::task::spawn_blocking(move || digest_all(&ram)).await;
                let digests = digests.expect("digesting does not panic");
                let digests = digests.map_err(ReceiveError::Digest)?;
                let mut rest = digests.as_slice();
                loop {
                    let (digests, later) = rest.split_at(rest.len().min(MAX_DIGESTS));
                    rest = later;
                    let last = rest.is_empty();
                    answer(session, Control::Digests { digests: digests.to_vec(), last }).await?;
                    if last {
                        break;
                    }
                }
            }
            Control::Missing(missing) => {
                let Some(fetching) = self.postcopy.fetching() else {
                    return Err(ReceiveError::NotServed);
                };
                let last = missing.last;
                fetching.add(missing).await?;
                if last {
                    answer(session, Control::MissingDone).await?;
                }
            }
            Control::State { total, offset, bytes } => {
                // The source opens the lane for the state before it sends this, which may be read first.
                while let Ok(lane) = self.arriving.try_recv() {
                    self.start(session, lane)?;
                }
                self.state.take(total, offset, bytes)?;
                return self.state_came(session).await;
            }
            other => return Err(ReceiveError::OutOfTurn(other.name())),
        }
        Ok(None)
    }

    /// Takes a piece of the VMM's state that came over the lane for it.
    pub(super) async fn take_state(
        &mut self,
        session: &mut Session<Destination>,
        piece: Vec<u8>,
    ) -> Result<Option<Event>, ReceiveError> {
        self.state.take_next(piece)?;
        self.state_came(session).await
    }

    /// Has the VMM load what has come of its state, as far as it may by now.
    async fn state_came(
        &mut self,
        session: &mut Session<Destination>,
    ) -> Result<Option<Event>, ReceiveError> {
        if !self.state.is_expected() {
            self.load(session).await;
        }
        if self.state.is_with_memory() {
            // No page is on its way any more. That takes a moment, and the rest of the state comes meanwhile.
            drop(self.lanes.close());
        }
        if self.state.is_whole() {
            self.let_go_of_memory().await?;
        }
        // A VMM that others started waits for another try if the move fails before the pause. A VMM that links Memlane loads
        // only the whole of it, and has longer.
        let loads_early = self.guest.driver.qemu().is_some() && self.state.is_in_pause();
        let before = self.state.is_loading();
        if self.guest.launched_for_migration.get() || self.state.is_with_memory() || loads_early {
            self.state.pass_on();
        }
        Ok((self.state.is_loading() && !before).then_some(Event::Loading))
    }

    async fn make_holes(&self, holes: Vec<Range<u64>>) -> Result<(), ReceiveError> {
        let (ram, pages) = (self.guest.ram.clone(), self.guest.ram.pages());
        if let Some(hole) = holes.iter().find(|hole| hole.start >= hole.end || hole.end > pages) {
            return Err(ReceiveError::NoSuchHole { hole: hole.clone(), pages });
        }
        let count: u64 = holes.iter().map(|hole| hole.end - hole.start).sum();
        self.handle.update(|progress| {
            let holes = &mut progress.ram.hole_pages;
            *holes = holes.saturating_add(count);
        });
        let punching = move || holes.into_iter().try_for_each(|hole| ram.punch(hole));
        let punched = tokio::task::spawn_blocking(punching).await.expect("punching does not panic");
        punched.map_err(ReceiveError::Hole)
    }

    /// Has the VMM load the state while it comes.
    async fn load(&mut self, session: &Session<Destination>) {
        let mut seen = None;
        if let Some(fetching) = self.postcopy.fetching() {
            // Device models look at the guest's memory while they load, and wait for what is missing.
            fetching.all_known().await;
            seen = Some(fetching.verify_holes());
        }
        let (writer, reader) = state_pipe();
        let (guest, bond) = (self.guest.clone(), session.effects.bond());
        self.state.begin(writer, async move {
            let loaded = guest.driver.load(reader, &bond).await;
            if let Some(seen) = seen {
                seen.await?;
            }
            Ok(loaded?)
        });
    }

    /// Has the last lane let go of the guest's memory, before the VMM has all of its state.
    async fn let_go_of_memory(&mut self) -> Result<(), ReceiveError> {
        self.lanes.close().await;
        self.show_lanes();
        // All that came is the guest's.
        self.guest.ram.check().map_err(ReceiveError::Memory)
    }

    /// Takes note that the VMM has loaded its state, or has not. Returns the event that this is.
    pub(super) fn note_loaded(
        &mut self,
        session: &mut Session<Destination>,
        loaded: Result<LoadedState, ReceiveError>,
    ) -> Option<Event> {
        match loaded {
            Ok(LoadedState { took, stays }) => {
                self.guest.run_state.set(RunState::Loaded);
                session.effects.times.load = took;
                self.handle.update(|progress| {
                    progress.status.phase = PhaseView::SwitchingOver;
                    progress.pause.vmm_state_bytes = Some(self.state.bytes());
                    progress.pause.load_seconds = Some(took.as_secs_f64());
                    progress.pause.guest_stays = stays;
                });
                Some(Event::Loaded)
            }
            Err(error) => {
                if let ReceiveError::Driver(DriverError::Failed { .. }) = error {
                    // Nothing was loaded.
                    self.state.stop();
                }
                self.fail(session, error)
            }
        }
    }
}

async fn answer(session: &Session<Destination>, message: Control) -> Result<(), LinkError> {
    match &session.effects.link {
        Some(link) => link.send(&message).await,
        None => Ok(()),
    }
}
