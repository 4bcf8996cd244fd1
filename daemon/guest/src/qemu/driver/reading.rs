//! What QEMU's own migration writes is read, and passed on.

use std::io;

use memlane_net::task;
use memlane_protocol::wire::attach::MAX_STATE_BYTES;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::StateWriter;

/// This many bytes are read at once.
const PIECE_BYTES: usize = 256 << 10;

/// A task reads what QEMU's migration writes, until this is dropped.
pub(super) struct Reading {
    /// It is told by this that QEMU has written everything.
    written: Option<oneshot::Sender<()>>,
    task: JoinHandle<io::Result<Vec<u8>>>,
}

impl Reading {
    /// Begins to read the state that QEMU writes at the other end, and to pass it on.
    pub(super) fn begin((channel, passed_on): (UnixStream, StateWriter)) -> Self {
        let (written, everything) = oneshot::channel();
        let task = task::spawn("state of a QEMU", read(channel, passed_on, everything));
        Self { written: Some(written), task }
    }

    /// Reads the rest, of a QEMU that has written everything. Returns the whole state.
    ///
    /// # Errors
    ///
    /// Fails if the state is too large, or cannot be read.
    pub(super) async fn finish(mut self) -> io::Result<Vec<u8>> {
        if let Some(written) = self.written.take() {
            let _ = written.send(());
        }
        (&mut self.task).await.map_err(io::Error::other)?
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Reads a state and passes it on. `everything` tells that QEMU has written all of it: it closes its end only a while later.
/// Returns what the state was.
async fn read(
    channel: UnixStream,
    passed_on: StateWriter,
    mut everything: oneshot::Receiver<()>,
) -> io::Result<Vec<u8>> {
    let (mut bytes, mut piece, mut is_written) = (Vec::new(), vec![0; PIECE_BYTES], false);
    loop {
        let count = match channel.try_read(&mut piece) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && is_written => return Ok(bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                tokio::select! {
                    readable = channel.readable() => readable?,
                    _ = &mut everything => is_written = true,
                }
                continue;
            }
            count => count?,
        };
        if count == 0 {
            return Ok(bytes);
        }
        if (bytes.len() + count) as u64 > MAX_STATE_BYTES {
            let text = format!("the state of its devices has more than {MAX_STATE_BYTES} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        bytes.extend_from_slice(&piece[..count]);
        // Nobody may want it any more.
        let _ = passed_on.send(piece[..count].to_vec());
    }
}
