//! The state of the VMM travels over a lane of its own: a control network may be slow, and the guest waits.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use memlane_net::channel::Channel;
use memlane_net::link::LinkError;
use memlane_net::port::Traffic;
use memlane_net::task;
use memlane_protocol::wire::Label;
use tokio::sync::mpsc;

use crate::context::Context;
use crate::lanes::LaneEnd;

/// So many bytes are written at once.
const PART_BYTES: usize = 64 << 10;
/// This many pieces of a state are read ahead.
const AHEAD: usize = 16;

/// One end of the lane that carries the state of a VMM. Dropping it ends the connection.
pub(crate) struct StateLane {
    port: Label,
    channel: Channel,
    traffic: Rc<Traffic>,
    /// A part may take this long to be written.
    silence: Duration,
}

/// The pieces of a state as they come, and then the reason why no more do.
pub(crate) type StatePieces = mpsc::Receiver<Result<Vec<u8>, LinkError>>;

impl StateLane {
    /// Makes a lane of one end of its connection. What it carries is counted as traffic of its port.
    pub(crate) fn over(end: LaneEnd, context: &Context) -> Self {
        let (traffic, silence) = (context.traffic.clone(), context.limits().silence);
        Self { port: end.port, channel: Channel::of_lane(end.socket, end.records), traffic, silence }
    }

    /// Returns the name of the port of this host.
    pub(crate) fn port(&self) -> &Label {
        &self.port
    }

    /// Sends a piece of the state.
    ///
    /// # Errors
    ///
    /// Fails if the connection breaks, or takes nothing for as long as a host may be silent.
    pub(crate) async fn send(&self, piece: &[u8]) -> io::Result<()> {
        for part in piece.chunks(PART_BYTES) {
            let written = tokio::time::timeout(self.silence, self.channel.write_all(part.to_vec())).await;
            let silent = |_| {
                let text =
                    format!("the other end has not answered for {:.1?} on port {}", self.silence, self.port);
                io::Error::new(io::ErrorKind::TimedOut, text)
            };
            written.map_err(silent)??;
            self.traffic.add(&self.port, part.len() as u64, 0);
        }
        Ok(())
    }

    /// Reads the state as it comes, until the returned end is dropped.
    pub(crate) fn receive(self) -> StatePieces {
        let (pieces, receiver) = mpsc::channel(AHEAD);
        task::spawn("state lane", async move {
            let read = async {
                loop {
                    let piece = self.channel.read_some().await;
                    let (bytes, is_over) = (piece.as_ref().map_or(0, Vec::len), piece.is_err());
                    self.traffic.add(&self.port, 0, bytes as u64);
                    if pieces.send(piece).await.is_err() || is_over {
                        return;
                    }
                }
            };
            tokio::select! {
                () = read => {}
                () = pieces.closed() => {}
            }
        });
        receiver
    }
}

impl Drop for StateLane {
    fn drop(&mut self) {
        self.channel.shut_down();
    }
}
