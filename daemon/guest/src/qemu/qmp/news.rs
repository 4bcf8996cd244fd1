//! What QEMU says: answers to commands, and events, of which the latest are remembered.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use memlane_qmp::{Answer, Decoder, Event, Message, Refusal};
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{oneshot, watch};
use tracing::{debug, warn};

use crate::Farewell;
use crate::qemu::farewell;

/// Bytes that are read at once.
const READ_BYTES: usize = 8 << 10;

/// Takes the answer to the command of this number.
type Waiting = (u64, oneshot::Sender<Result<Value, Refusal>>);

/// The reading task tells the others this.
#[derive(Default)]
pub(super) struct News {
    /// A task waits for this answer.
    pub waiting: RefCell<Option<Waiting>>,
    /// This is the state of QEMU's own migration, by its last event.
    pub migration: watch::Sender<String>,
    /// This is when the guest was last paused, as Unix time.
    pub stopped: Cell<Option<Duration>>,
    /// This is when the guest was last let go on, as Unix time.
    pub resumed: Cell<Option<Duration>>,
    /// This is how QEMU said that it comes to its end, or would, had it not been told to stay (`-no-shutdown`).
    pub farewell: RefCell<Option<Farewell>>,
    /// This is true once the connection is lost.
    pub gone: watch::Sender<bool>,
}

/// What QEMU says, as it comes.
pub(super) struct Messages {
    reader: OwnedReadHalf,
    decoder: Decoder,
    buffer: Vec<u8>,
}

impl Messages {
    pub(super) fn new(reader: OwnedReadHalf) -> Self {
        Self { reader, decoder: Decoder::default(), buffer: vec![0; READ_BYTES] }
    }

    /// The next message; `None` at the end.
    pub(super) async fn next(&mut self) -> io::Result<Option<Message>> {
        loop {
            let message = self.decoder.next_message();
            if let Some(message) =
                message.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?
            {
                return Ok(Some(message));
            }
            match self.reader.read(&mut self.buffer).await? {
                0 => return Ok(None),
                count => self.decoder.push(&self.buffer[..count]),
            }
        }
    }
}

/// Takes note of what QEMU says, until it ends or its connection does.
pub(super) async fn read(mut messages: Messages, news: Rc<News>) {
    loop {
        match messages.next().await {
            Ok(Some(Message::Event(event))) => news.event(event),
            Ok(Some(Message::Answer(answer))) => news.answer(answer),
            Ok(Some(Message::Greeting(_))) => {}
            Ok(None) => break,
            Err(error) => {
                warn!(%error, "cannot read from QEMU; the connection is given up");
                break;
            }
        }
    }
    news.gone.send_replace(true);
    news.waiting.borrow_mut().take();
}

impl News {
    fn event(&self, event: Event) {
        debug!(event = event.name, data = %event.data, "QEMU");
        match event.name.as_str() {
            "STOP" => self.stopped.set(event.at),
            "RESUME" => {
                self.resumed.set(event.at);
                self.farewell.take();
            }
            "SHUTDOWN" => {
                let mut said = self.farewell.borrow_mut();
                // One that has shut itself down, and was kept (-no-shutdown), is ended by somebody else later.
                if !matches!(*said, Some(Farewell::PoweredOff(_))) {
                    *said = Some(farewell::of(&event.data));
                }
            }
            "RESET" => drop(self.farewell.take()),
            "MIGRATION" => {
                let status = event.data["status"].as_str().unwrap_or_default();
                self.migration.send_replace(status.to_owned());
            }
            _ => {}
        }
    }

    fn answer(&self, answer: Answer) {
        let mut waiting = self.waiting.borrow_mut();
        // Whoever asked may have given up meanwhile.
        let Some((_, sender)) = waiting.take_if(|(id, _)| answer.is_to(*id)) else { return };
        let _ = sender.send(answer.outcome);
    }
}
