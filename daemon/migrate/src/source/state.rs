//! The state of the VMM travels while the VMM still writes it.

use std::future::pending;

use memlane_guest::{StateReader, StateWriter, narrow_state_pipe};
use memlane_net::resumable::ResumableSender;
use memlane_protocol::wire::attach::MAX_STATE_BYTES;
use memlane_protocol::wire::control::{Control, LAST_ITERATION, MAX_STATE_CHUNK_BYTES};
use tokio::sync::watch;

use super::error::CopyError;
use super::transfer::LAST_WORDS;
use crate::state_lane::StateLane;

/// So much of a state may wait to be sent before the guest is paused: the pause would wait for it.
const BACKLOG_BYTES: usize = 256 << 10;
/// So much of a state is on its way or in buffers when the guest is paused, or is written then, where the state is sent as
/// it is written.
pub(super) const IN_PAUSE_BYTES: u64 = 1 << 20;

/// Sends the state of a VMM to the destination.
///
/// The VMM there loads it while it comes. Without the last byte it cannot come to an end: that byte is sent when everything
/// else that was written of the guest is there. Whether saving the state wrote more is found out before the commit.
pub(super) struct StateSender {
    /// This much may be sent by now.
    release: watch::Sender<Release>,
    /// This is true when everything is sent.
    sent: watch::Sender<bool>,
    passing: Option<Passing>,
}

/// What sending a state needs.
struct Passing {
    link: ResumableSender,
    /// All but the last byte goes over this, if there is one.
    lane: Option<StateLane>,
    pieces: StateReader,
    release: watch::Receiver<Release>,
    sent: watch::Sender<bool>,
    offset: u64,
}

/// How much of the state may be sent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Release {
    /// Nothing yet: no VMM may look at the guest's memory at the destination.
    Nothing,
    /// Everything but the last byte. It is what the VMM writes before the guest is paused.
    AllButLast,
    /// The same, and the destination is told that the guest is paused.
    Paused,
    /// The same, and the destination is told that it has the guest's memory.
    WithMemory,
    /// Everything, of which there are so many bytes.
    All(u64),
}

impl StateSender {
    /// Prepares to send a state over `lane`, and its end over `link`; without a lane, all of it over `link`. If this is
    /// `at_once`, the VMM at the destination loads it while the rest of the guest still comes. Returns where the VMM's state
    /// is to be written.
    pub(super) fn new(link: ResumableSender, lane: Option<StateLane>, at_once: bool) -> (Self, StateWriter) {
        // What is not sent at once must not hold up the VMM.
        let (first, most) =
            if at_once { (Release::AllButLast, BACKLOG_BYTES) } else { (Release::Nothing, usize::MAX) };
        let (writer, pieces) = narrow_state_pipe(most);
        let ((release, released), sent) = (watch::channel(first), watch::Sender::new(false));
        let passing = Passing { link, lane, pieces, release: released, sent: sent.clone(), offset: 0 };
        (Self { release, sent, passing: Some(passing) }, writer)
    }

    /// Sends what may be sent. The returned future ends only if that fails, and must be waited for while the state is
    /// saved: a part that was being sent is lost with it.
    pub(super) fn pass_on(&mut self) -> impl Future<Output = CopyError> + use<> {
        let passing = self.passing.take().expect("a state is sent once");
        async move {
            match passing.run().await {
                Ok(()) => pending().await,
                Err(error) => {
                    tokio::time::sleep(LAST_WORDS).await;
                    error
                }
            }
        }
    }

    /// Notes that the guest is paused. Where nothing is sent at once, that changes nothing.
    pub(super) fn note_pause(&self) {
        self.release.send_modify(|release| {
            if *release == Release::AllButLast {
                *release = Release::Paused;
            }
        });
    }

    /// Notes that the destination has all of the guest's memory, but for what the VMM may write while it saves its state.
    pub(super) fn note_memory(&self) {
        self.release.send_modify(|release| *release = (*release).max(Release::WithMemory));
    }

    /// Has the whole state sent, which has so many bytes. Returns when that is done.
    pub(super) async fn finish(&self, total: u64) {
        self.release.send_replace(Release::All(total));
        // Its sender is not dropped before this.
        let _ = self.sent.subscribe().wait_for(|sent| *sent).await;
    }
}

impl Passing {
    async fn run(mut self) -> Result<(), CopyError> {
        self.until(|release| release >= Release::AllButLast).await;
        let (mut held, mut told, mut release) = (Vec::new(), Release::AllButLast, self.release.clone());
        loop {
            let piece = tokio::select! {
                biased;
                reached = reaches(&mut release, |release| release > told), if told < Release::WithMemory => {
                    told = reached.min(Release::WithMemory);
                    self.tell(told).await?;
                    continue;
                }
                piece = self.pieces.recv() => piece,
            };
            let Some(piece) = piece else { break };
            held.extend(piece);
            let last = held.pop();
            for part in held.chunks(MAX_STATE_CHUNK_BYTES) {
                self.send(part, None).await?;
            }
            held = Vec::from_iter(last);
        }
        let released = self.until(|release| matches!(release, Release::All(_))).await;
        if let Release::All(total) = released {
            self.send(&held, Some(total)).await?;
            self.sent.send_replace(true);
        }
        Ok(())
    }

    /// Returns how much may be sent, when it is enough.
    async fn until(&mut self, is_enough: impl Fn(Release) -> bool) -> Release {
        reaches(&mut self.release, is_enough).await
    }

    /// Tells the destination what it may do with the state that it has.
    async fn tell(&mut self, release: Release) -> Result<(), CopyError> {
        match release {
            // A destination of before such lanes takes this for one more iteration.
            Release::Paused if self.lane.is_some() => {
                Ok(self.link.send(&Control::Iteration { number: LAST_ITERATION, pages: 0 }).await?)
            }
            Release::WithMemory => self.send(&[], None).await,
            _ => Ok(()),
        }
    }

    /// Sends a part of the state. It is the last one if it is known how long the state is in `total`.
    async fn send(&mut self, part: &[u8], total: Option<u64>) -> Result<(), CopyError> {
        let offset = self.offset;
        self.offset += part.len() as u64;
        match &self.lane {
            Some(lane) if !part.is_empty() && total.is_none() => {
                lane.send(part).await.map_err(CopyError::StateLane)
            }
            _ => {
                let total = total.unwrap_or(MAX_STATE_BYTES);
                Ok(self.link.send(&Control::State { total, offset, bytes: part.to_vec() }).await?)
            }
        }
    }
}

/// Returns how much may be sent, when it is enough.
async fn reaches(release: &mut watch::Receiver<Release>, is_enough: impl Fn(Release) -> bool) -> Release {
    match release.wait_for(|release| is_enough(*release)).await {
        Ok(release) => *release,
        // Nobody is there any more who would have anything sent.
        Err(_) => pending().await,
    }
}
