//! What QEMU's own migration writes is read, and passed on.

use std::io;

use memlane_net::task;
use memlane_protocol::wire::attach::MAX_STATE_BYTES;
use rustix::io::Errno;
use tokio::io::AsyncReadExt;
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
    mut channel: UnixStream,
    passed_on: StateWriter,
    mut everything: oneshot::Receiver<()>,
) -> io::Result<Vec<u8>> {
    let (mut bytes, mut piece, mut is_written) = (Vec::new(), vec![0; PIECE_BYTES], false);
    loop {
        let count = if is_written {
            // Of the kernel itself: what tokio knows of the socket may be older than what is there.
            match rustix::io::read(&channel, &mut piece) {
                Err(Errno::AGAIN) => return Ok(bytes),
                count => count?,
            }
        } else {
            tokio::select! {
                count = async {
                    // Before the guest is paused, QEMU writes no faster than the state travels: the pause would wait for it.
                    passed_on.room().await;
                    channel.read(&mut piece).await
                } => count?,
                _ = &mut everything => {
                    is_written = true;
                    continue;
                }
            }
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::state_pipe;

    #[test]
    fn what_was_written_last_is_read_before_the_end_is_believed() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let (mut theirs, ours) = std::os::unix::net::UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let (writer, mut reader) = state_pipe();
            let reading = Reading::begin((UnixStream::from_std(ours).unwrap(), writer));
            theirs.write_all(b"before").unwrap();
            assert_eq!(reader.recv().await.unwrap(), b"before");
            tokio::task::yield_now().await;
            // The runtime has not looked at the socket since, and QEMU leaves its end open.
            theirs.write_all(b" and after").unwrap();
            assert_eq!(reading.finish().await.unwrap(), b"before and after");
            assert_eq!(reader.recv().await.unwrap(), b" and after");
            assert!(reader.recv().await.is_none());
        });
    }
}
