//! A VMM's state passes from the VMM to the migration, and from the migration to the VMM, piece by piece: one VMM loads it
//! while the other still saves it.

use tokio::sync::mpsc;

/// A VMM's state is written here while it is saved. Whoever writes drops this when all of it is written.
pub type StateWriter = mpsc::UnboundedSender<Vec<u8>>;
/// A VMM's state is read here while it comes. It ends when all of it has come.
pub type StateReader = mpsc::UnboundedReceiver<Vec<u8>>;

/// Returns the two ends of a way for one VMM's state. Each side sees to it that no more than
/// [`MAX_STATE_BYTES`](memlane_protocol::wire::attach::MAX_STATE_BYTES) are on it.
pub fn state_pipe() -> (StateWriter, StateReader) {
    mpsc::unbounded_channel()
}
