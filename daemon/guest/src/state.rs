//! A VMM's state passes from the VMM to the migration, and from the migration to the VMM, piece by piece: one VMM loads it
//! while the other still saves it.

use std::rc::Rc;

use tokio::sync::{mpsc, watch};

/// A VMM's state is written here while it is saved. Whoever writes drops this when all of it is written.
pub struct StateWriter {
    pieces: mpsc::UnboundedSender<Vec<u8>>,
    backlog: Rc<watch::Sender<usize>>,
    most: usize,
}

/// A VMM's state is read here while it comes. It ends when all of it has come.
pub struct StateReader {
    pieces: mpsc::UnboundedReceiver<Vec<u8>>,
    backlog: Rc<watch::Sender<usize>>,
    /// The piece that was read last had so many bytes.
    reading: usize,
}

/// The reader of a state is not there any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nobody reads the state any more")]
pub struct NotRead;

/// Returns the two ends of a way for one VMM's state. Each side sees to it that no more than
/// [`MAX_STATE_BYTES`](memlane_protocol::wire::attach::MAX_STATE_BYTES) are on it.
pub fn state_pipe() -> (StateWriter, StateReader) {
    narrow_state_pipe(usize::MAX)
}

/// Returns the two ends of a way on which a writer who can wait has no more than `most` bytes unread.
pub fn narrow_state_pipe(most: usize) -> (StateWriter, StateReader) {
    let ((sender, pieces), backlog) = (mpsc::unbounded_channel(), Rc::new(watch::Sender::new(0)));
    let writer = StateWriter { pieces: sender, backlog: backlog.clone(), most };
    (writer, StateReader { pieces, backlog, reading: 0 })
}

impl StateWriter {
    /// Writes the next piece, whether or not there is room for it.
    ///
    /// # Errors
    ///
    /// Fails if nobody reads it any more.
    pub fn send(&self, piece: Vec<u8>) -> Result<(), NotRead> {
        self.backlog.send_modify(|backlog| *backlog += piece.len());
        self.pieces.send(piece).map_err(|_| NotRead)
    }

    /// Returns when there is room, or nobody reads any more.
    pub async fn room(&self) {
        let mut backlog = self.backlog.subscribe();
        tokio::select! {
            _ = backlog.wait_for(|backlog| *backlog < self.most) => {}
            () = self.pieces.closed() => {}
        }
    }
}

impl StateReader {
    /// Returns the next piece; the one before it is done with. Returns `None` after the last one.
    pub async fn recv(&mut self) -> Option<Vec<u8>> {
        let done = std::mem::take(&mut self.reading);
        self.backlog.send_modify(|backlog| *backlog -= done);
        let piece = self.pieces.recv().await;
        self.reading = piece.as_ref().map_or(0, Vec::len);
        piece
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_writer_waits_until_what_it_wrote_is_done_with() {
        let (writer, mut reader) = narrow_state_pipe(3);
        let has_room = async |writer: &StateWriter| {
            tokio::time::timeout(Duration::from_millis(10), writer.room()).await.is_ok()
        };
        writer.send(vec![1, 2]).unwrap();
        assert!(has_room(&writer).await);
        writer.send(vec![3]).unwrap();
        assert!(!has_room(&writer).await);
        assert_eq!(reader.recv().await.unwrap(), [1, 2]);
        assert!(!has_room(&writer).await, "it may still be on its way");
        assert_eq!(reader.recv().await.unwrap(), [3]);
        assert!(has_room(&writer).await);
        writer.send(vec![0; 9]).unwrap();
        drop(reader);
        assert!(has_room(&writer).await && writer.send(vec![4]) == Err(NotRead));
    }
}
