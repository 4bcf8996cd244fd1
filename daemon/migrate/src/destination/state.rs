//! The state of the VMM that the guest comes from is loaded while it comes.

use std::future::pending;

use memlane_guest::{LoadedState, StateWriter};
use memlane_net::link::LinkError;
use memlane_net::task;
use memlane_protocol::wire::attach::MAX_STATE_BYTES;
use tokio::task::JoinHandle;

use super::receive::ReceiveError;
use crate::state_lane::StatePieces;

/// Pieces that wait are kept together up to this many bytes.
const PIECE_BYTES: usize = 256 << 10;

/// The state of a guest's VMM, as far as it has come.
#[derive(Default)]
pub(super) struct IncomingState {
    /// So many bytes have come.
    bytes: u64,
    /// If this is true, they are all.
    whole: bool,
    /// If this is true, the guest is paused at the source.
    paused: bool,
    /// If this is true, the guest's memory has come.
    with_memory: bool,
    /// The state comes from there, but for its end.
    lane: Option<StatePieces>,
    /// This is the number of the latest lane.
    lane_number: Option<u16>,
    /// If this is true, the source has closed the lane: nothing more comes over it.
    lane_closed: bool,
    /// This is the end of the state, and the byte at which it begins. What comes before it is still on the lane.
    end: Option<(u64, Vec<u8>)>,
    /// These pieces came before they were to be loaded.
    waiting: Vec<Vec<u8>>,
    loading: Option<Loading>,
}

/// What has become of a state that comes and is loaded.
pub(super) enum StateNews {
    /// A piece has come over the lane.
    Piece(Vec<u8>),
    /// The lane is lost, with a part of the state.
    Lost(ReceiveError),
    /// Loading has ended.
    Loaded(Result<LoadedState, ReceiveError>),
}

/// A VMM loads a state, until this is dropped.
struct Loading {
    /// If this is true, it has got the first of it.
    begun: bool,
    /// The rest of the state goes there. It is `None` once there is no rest.
    writer: Option<StateWriter>,
    /// This is `None` once it is known what has become of it.
    task: Option<JoinHandle<Result<LoadedState, ReceiveError>>>,
}

impl IncomingState {
    /// Has the state come over lane number `number`, unless a later one is there: this one was late then, and the source does
    /// not use it.
    ///
    /// # Errors
    ///
    /// Fails if a part of the state has come already: no other lane has the rest.
    pub(super) fn come_over(&mut self, number: u16, lane: StatePieces) -> Result<(), ReceiveError> {
        if self.lane_number.is_some_and(|latest| latest > number) {
            return Ok(());
        }
        if self.bytes > 0 {
            return Err(ReceiveError::StateLanes);
        }
        (self.lane, self.lane_number) = (Some(lane), Some(number));
        Ok(())
    }

    /// Takes a piece of the state that came over the control connection. It begins at byte `offset` of at most `total`, and
    /// is the next one, or the last one, which may come before what is on the lane. One without any bytes says that the
    /// guest's memory has come.
    ///
    /// # Errors
    ///
    /// Fails if it is neither, or comes after the last.
    pub(super) fn take(&mut self, total: u64, offset: u64, piece: Vec<u8>) -> Result<(), ReceiveError> {
        let is_last = offset.checked_add(piece.len() as u64) == Some(total);
        if piece.is_empty() && !is_last && !self.whole {
            // What is on the lane may have been before it or after.
            self.with_memory = true;
            return Ok(());
        }
        let is_next = offset == self.bytes || (self.lane.is_some() && is_last && offset > self.bytes);
        if !is_next && self.lane_closed {
            return Err(ReceiveError::StateLane(LinkError::Closed));
        }
        if !is_next || self.whole || self.end.is_some() {
            return Err(ReceiveError::StateGap { offset, expected: self.bytes });
        }
        self.with_memory |= is_last;
        if is_last {
            self.end = Some((offset, piece));
        } else {
            self.append(piece);
        }
        self.append_end();
        Ok(())
    }

    /// Takes the next piece of the state, which came over the lane.
    ///
    /// # Errors
    ///
    /// Fails if it goes beyond where the end of the state begins, or the state becomes too large.
    pub(super) fn take_next(&mut self, piece: Vec<u8>) -> Result<(), ReceiveError> {
        let limit = self.end.as_ref().map_or(MAX_STATE_BYTES, |(begins, _)| *begins);
        if self.whole || piece.len() as u64 > limit.saturating_sub(self.bytes) {
            return Err(ReceiveError::StateGap { offset: self.bytes, expected: limit });
        }
        self.append(piece);
        self.append_end();
        Ok(())
    }

    fn append(&mut self, piece: Vec<u8>) {
        self.bytes += piece.len() as u64;
        match self.waiting.last_mut() {
            // A peer that sends it byte by byte is not to have this host keep a buffer for each.
            Some(last) if last.len() + piece.len() <= PIECE_BYTES => last.extend(piece),
            _ if piece.is_empty() => {}
            _ => self.waiting.push(piece),
        }
    }

    /// Appends the end of the state when everything before it is there.
    fn append_end(&mut self) {
        if let Some((_, piece)) = self.end.take_if(|(begins, _)| *begins == self.bytes) {
            self.append(piece);
            self.whole = true;
            self.lane = None;
        }
    }

    /// Returns what becomes of the state next. The caller awaits this again and again.
    pub(super) async fn news(&mut self) -> StateNews {
        loop {
            let Self { lane, loading, .. } = self;
            let coming = async {
                match lane {
                    Some(lane) => lane.recv().await,
                    None => pending().await,
                }
            };
            tokio::select! {
                biased;
                loaded = loaded(loading) => return StateNews::Loaded(loaded),
                piece = coming => {
                    let error = match piece {
                        Some(Ok(piece)) => return StateNews::Piece(piece),
                        Some(Err(error)) => error,
                        None => LinkError::Closed,
                    };
                    self.lane = None;
                    self.lane_closed = matches!(error, LinkError::Closed) && self.bytes > 0;
                    // A lane on which nothing has come yet is replaced by another.
                    let is_missed = self.end.is_some() || self.bytes > 0 && !self.lane_closed;
                    if is_missed {
                        return StateNews::Lost(ReceiveError::StateLane(error));
                    }
                }
            }
        }
    }

    /// Has `load` prepare the VMM, and wait at the other end of `writer` for what is [passed on](Self::pass_on).
    pub(super) fn begin(
        &mut self,
        writer: StateWriter,
        load: impl Future<Output = Result<LoadedState, ReceiveError>> + 'static,
    ) {
        let task = task::spawn("loading a state", load);
        self.loading = Some(Loading { begun: false, writer: Some(writer), task: Some(task) });
    }

    /// Passes on what has come: the VMM begins to load it.
    pub(super) fn pass_on(&mut self) {
        let Some(loading) = &mut self.loading else { return };
        let Some(writer) = &loading.writer else { return };
        // A state may have no bytes at all.
        loading.begun |= self.whole || !self.waiting.is_empty();
        for piece in self.waiting.drain(..) {
            // A VMM that does not want it any more says why.
            let _ = writer.send(piece);
        }
        loading.writer.take_if(|_| self.whole);
    }

    /// Ends loading where it has come to. The VMM is of no use then, unless it has not begun.
    pub(super) fn stop(&mut self) {
        self.loading = None;
    }

    /// Tells whether the VMM is prepared for the state, or is about to be.
    pub(super) fn is_expected(&self) -> bool {
        self.loading.is_some()
    }

    /// Tells whether the VMM has begun to load the state.
    pub(super) fn is_loading(&self) -> bool {
        self.loading.as_ref().is_some_and(|loading| loading.begun)
    }

    /// Notes that the guest is paused at the source.
    pub(super) fn note_pause(&mut self) {
        self.paused = true;
    }

    /// Tells whether the guest is paused at the source, as far as that has said so.
    pub(super) fn is_in_pause(&self) -> bool {
        self.paused
    }

    /// Tells whether the source is done with the guest's memory, but for what the VMM may write while it saves its state.
    pub(super) fn is_with_memory(&self) -> bool {
        self.with_memory
    }

    /// Tells whether all of the state has come.
    pub(super) fn is_whole(&self) -> bool {
        self.whole
    }

    /// Returns how many bytes of it have come.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Returns what has become of loading the state, once, when that has ended.
async fn loaded(loading: &mut Option<Loading>) -> Result<LoadedState, ReceiveError> {
    let task = loading.as_mut().and_then(|loading| loading.task.as_mut());
    let Some(task) = task else { return pending().await };
    let loaded = task.await.expect("loading a state does not panic");
    if let Some(loading) = loading {
        loading.task = None;
    }
    loaded
}

impl Drop for Loading {
    fn drop(&mut self) {
        // Before the writer: what was cut off must not be taken for all.
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use memlane_guest::state_pipe;
    use tokio::sync::mpsc;
    use tokio::task::LocalSet;

    use super::*;

    const NOTHING: LoadedState = LoadedState { took: std::time::Duration::ZERO, stays: None };

    async fn read(mut reader: memlane_guest::StateReader, to: std::rc::Rc<std::cell::RefCell<Vec<u8>>>) {
        while let Some(piece) = reader.recv().await {
            to.borrow_mut().extend(piece);
        }
    }

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, test);
    }

    #[test]
    fn what_came_before_and_what_comes_later_is_loaded_in_order() {
        run(async {
            let (mut state, seen) = (IncomingState::default(), std::rc::Rc::default());
            state.take(100, 0, vec![1, 2]).unwrap();
            assert!(!state.is_with_memory());
            state.take(100, 2, Vec::new()).unwrap();
            assert!(state.is_with_memory() && !state.is_whole());
            let (writer, reader) = state_pipe();
            let reading = read(reader, std::rc::Rc::clone(&seen));
            state.begin(writer, async move {
                reading.await;
                Ok(NOTHING)
            });
            assert!(state.is_expected() && !state.is_loading());
            state.pass_on();
            assert!(state.is_loading());
            state.take(100, 2, vec![3]).unwrap();
            state.pass_on();
            tokio::task::yield_now().await;
            assert_eq!(*seen.borrow(), [1, 2, 3]);
            state.take(4, 3, vec![4]).unwrap();
            assert!(state.is_whole());
            state.pass_on();
            assert_eq!(loaded(&mut state.loading).await.unwrap(), NOTHING);
            assert_eq!((seen.borrow().as_slice(), state.bytes()), (&[1, 2, 3, 4][..], 4));
        });
    }

    #[test]
    fn a_state_of_no_bytes_is_loaded() {
        run(async {
            let mut state = IncomingState::default();
            state.take(100, 0, Vec::new()).unwrap();
            let (writer, reader) = state_pipe();
            let reading = read(reader, std::rc::Rc::default());
            state.begin(writer, async move {
                reading.await;
                Ok(NOTHING)
            });
            state.pass_on();
            assert!(!state.is_loading());
            state.take(0, 0, Vec::new()).unwrap();
            state.pass_on();
            assert!(state.is_loading() && state.is_whole());
            assert_eq!(loaded(&mut state.loading).await.unwrap(), NOTHING);
        });
    }

    #[test]
    fn a_piece_out_of_turn_is_refused() {
        let mut state = IncomingState::default();
        assert!(state.take(9, 1, vec![1]).is_err());
        state.take(1, 0, vec![1]).unwrap();
        assert!(state.take(2, 1, vec![1]).is_err(), "after the last");
    }

    #[test]
    fn what_was_cut_off_is_not_taken_for_all() {
        run(async {
            let (mut state, ended) =
                (IncomingState::default(), std::rc::Rc::new(std::cell::Cell::new(false)));
            let (writer, reader) = state_pipe();
            let (reading, noted) = (read(reader, std::rc::Rc::default()), ended.clone());
            state.begin(writer, async move {
                reading.await;
                noted.set(true);
                Ok(NOTHING)
            });
            state.take(9, 0, vec![1]).unwrap();
            state.pass_on();
            tokio::task::yield_now().await;
            state.stop();
            tokio::task::yield_now().await;
            assert!(!ended.get() && !state.is_loading());
        });
    }

    #[test]
    fn what_comes_over_the_lane_goes_before_the_end_of_the_state() {
        run(async {
            let mut state = IncomingState::default();
            let (old, lane) = mpsc::channel(8);
            state.come_over(2, lane).unwrap();
            let (pieces, lane) = mpsc::channel(8);
            // Nothing has come over the first one.
            state.come_over(3, lane).unwrap();
            assert!(old.is_closed());
            // One that was late.
            let (late, lane) = mpsc::channel(8);
            state.come_over(1, lane).unwrap();
            assert!(late.is_closed() && !pieces.is_closed());
            state.take(100, 2, Vec::new()).unwrap();
            assert!(state.is_with_memory(), "though what comes before is still on its way");
            state.take(4, 3, vec![4]).unwrap();
            assert!(!state.is_whole() && state.take(4, 3, vec![4]).is_err());
            pieces.send(Ok(vec![1, 2])).await.unwrap();
            pieces.send(Ok(vec![3])).await.unwrap();
            for _ in 0..2 {
                let StateNews::Piece(piece) = state.news().await else { panic!("no piece") };
                state.take_next(piece).unwrap();
            }
            assert!(state.is_whole() && state.waiting.concat() == [1, 2, 3, 4]);
            assert!(state.take_next(vec![5]).is_err() && state.come_over(4, mpsc::channel(1).1).is_err());
        });
    }

    #[test]
    fn a_lane_that_ends_is_missed_only_if_something_is_still_to_come_over_it() {
        run(async {
            let broken = || LinkError::Silent(std::time::Duration::from_secs(1));
            for (brought, error, is_missed) in [
                (0, broken(), false),
                (3, broken(), true),
                (0, LinkError::Closed, false),
                (3, LinkError::Closed, false),
            ] {
                let mut state = IncomingState::default();
                let (pieces, lane) = mpsc::channel(8);
                state.come_over(7, lane).unwrap();
                if brought > 0 {
                    state.take_next(vec![7; brought]).unwrap();
                }
                pieces.send(Err(error)).await.unwrap();
                let waited = tokio::time::timeout(std::time::Duration::from_millis(10), state.news()).await;
                assert_eq!(matches!(waited, Ok(StateNews::Lost(ReceiveError::StateLane(_)))), is_missed);
                // What is missing nobody brings any more.
                let error = state.take(10, 9, vec![0]).unwrap_err();
                assert!(brought == 0 || is_missed || matches!(error, ReceiveError::StateLane(_)), "{error}");
                assert_eq!(state.come_over(7, mpsc::channel(8).1).is_ok(), brought == 0);
            }
            // The source has nothing left to say over it, and its end is still on its way.
            let mut state = IncomingState::default();
            let (pieces, lane) = mpsc::channel(8);
            state.come_over(7, lane).unwrap();
            state.take_next(vec![7; 3]).unwrap();
            drop(pieces);
            assert!(tokio::time::timeout(std::time::Duration::from_millis(10), state.news()).await.is_err());
            state.take(4, 3, vec![0]).unwrap();
            assert!(state.is_whole());
        });
    }

    #[test]
    fn a_lane_that_brings_more_than_there_is_is_refused() {
        let mut state = IncomingState::default();
        state.come_over(7, mpsc::channel(1).1).unwrap();
        state.take(4, 3, vec![4]).unwrap();
        assert!(state.take_next(vec![0; 4]).is_err());
        let mut state = IncomingState { bytes: MAX_STATE_BYTES - 1, ..IncomingState::default() };
        assert!(state.take_next(vec![0; 2]).is_err());
    }
}
