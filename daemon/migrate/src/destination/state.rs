//! The state of the VMM that the guest comes from is loaded while it comes.

use std::future::pending;

use memlane_guest::{LoadedState, StateWriter};
use memlane_net::task;
use tokio::task::JoinHandle;

use super::receive::ReceiveError;

/// The state of a guest's VMM, as far as it has come.
#[derive(Default)]
pub(super) struct IncomingState {
    /// So many bytes have come.
    bytes: u64,
    /// If this is true, they are all.
    whole: bool,
    /// If this is true, the guest's memory has come.
    with_memory: bool,
    /// These pieces came before they were to be loaded.
    waiting: Vec<Vec<u8>>,
    loading: Option<Loading>,
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
    /// Takes the next piece of the state, which begins at byte `offset` of at most `total`.
    ///
    /// # Errors
    ///
    /// Fails if it is not the next one, or comes after the last.
    pub(super) fn take(&mut self, total: u64, offset: u64, piece: Vec<u8>) -> Result<(), ReceiveError> {
        if offset != self.bytes || self.whole {
            return Err(ReceiveError::StateGap { offset, expected: self.bytes });
        }
        self.bytes += piece.len() as u64;
        self.whole = self.bytes == total;
        self.with_memory |= piece.is_empty() || self.whole;
        if !piece.is_empty() {
            self.waiting.push(piece);
        }
        Ok(())
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

    /// Returns what has become of loading the state, when that has ended. The caller awaits this again and again.
    pub(super) async fn loaded(&mut self) -> Result<LoadedState, ReceiveError> {
        let task = self.loading.as_mut().and_then(|loading| loading.task.as_mut());
        let Some(task) = task else { return pending().await };
        let loaded = task.await.expect("loading a state does not panic");
        if let Some(loading) = &mut self.loading {
            loading.task = None;
        }
        loaded
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
            assert_eq!(state.loaded().await.unwrap(), NOTHING);
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
            assert_eq!(state.loaded().await.unwrap(), NOTHING);
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
}
