//! The traffic of a link: messages in both directions, and pings ahead of them.
//!
//! A peer whose host is busy may be slow to deal with messages, and is there all the same. So its pings are answered by
//! the tasks here, ahead of every message that waits to be written. Messages that no task has dealt with yet are read
//! ahead up to [`READ_AHEAD_BYTES`]. While reading stops at that limit, silence is not counted against the peer.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memlane_protocol::wire::control::{Control, HEADER_BYTES, decode_header};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use crate::channel::Channel;
use crate::error::LinkError;

/// The round trips of this many pings are remembered.
const ROUND_TRIPS: usize = 8;
/// This many bytes of messages are read ahead of the task that deals with them: post-copy of a guest of 256 GiB begins
/// with that many.
pub(super) const READ_AHEAD_BYTES: usize = 8 << 20;
/// The other side may take this long to take a message: it may be busy with the one before.
const TAKING: Duration = Duration::from_secs(30);

/// A message on its way out, and the channel that reports that it is written.
pub(super) type Outgoing = (Vec<u8>, oneshot::Sender<io::Result<()>>);

/// A message that was read, or the reason why there are no more.
pub(super) struct Received {
    /// This is the message.
    pub message: Result<Control, LinkError>,
    /// This is its length on the wire.
    pub bytes: usize,
    /// This is the room that it takes until it is dealt with.
    _room: Option<OwnedSemaphorePermit>,
}

/// The state that the tasks of a link share.
pub(super) struct Shared {
    /// A ping and a pong may be due. A later one takes the place of one that is not written yet.
    ping: Cell<Option<u64>>,
    pong: Cell<Option<u64>>,
    /// This is notified when a ping or pong becomes due.
    due: Notify,
    /// This is when bytes last came.
    last_heard: Cell<Instant>,
    /// This is true while reading waits for room.
    held_up: Cell<bool>,
    /// This counts the room for messages that are read ahead.
    room: Arc<Semaphore>,
    pinged_at: Cell<Option<(u64, Instant)>>,
    /// These are the round trips of the last pings, oldest first.
    round_trips: RefCell<VecDeque<Duration>>,
    /// This is why this side has ended the connection, if it has.
    verdict: Cell<Option<LinkError>>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            ping: Cell::default(),
            pong: Cell::default(),
            due: Notify::new(),
            last_heard: Cell::new(Instant::now()),
            held_up: Cell::default(),
            room: Arc::new(Semaphore::new(READ_AHEAD_BYTES)),
            pinged_at: Cell::default(),
            round_trips: RefCell::default(),
            verdict: Cell::default(),
        }
    }
}

impl Shared {
    /// Returns the shortest round trip of the last pings, once there was one.
    pub(super) fn round_trip(&self) -> Option<Duration> {
        self.round_trips.borrow().iter().min().copied()
    }

    fn note_round_trip(&self, took: Duration) {
        let mut last = self.round_trips.borrow_mut();
        if last.len() == ROUND_TRIPS {
            last.pop_front();
        }
        last.push_back(took);
    }

    /// Takes the ping or pong that is due, if there is one.
    fn take_due(&self) -> Option<Control> {
        if let Some(number) = self.pong.take() {
            return Some(Control::Pong(number));
        }
        let number = self.ping.take()?;
        self.pinged_at.set(Some((number, Instant::now())));
        Some(Control::Ping(number))
    }

    /// Waits until there is room for a message of so many bytes on the wire.
    async fn room_for(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let most = READ_AHEAD_BYTES.min(bytes + size_of::<Received>()) as u32;
        if let Ok(room) = self.room.clone().try_acquire_many_owned(most) {
            return Some(room);
        }
        self.held_up.set(true);
        let room = self.room.clone().acquire_many_owned(most).await;
        self.last_heard.set(Instant::now());
        self.held_up.set(false);
        room.ok()
    }

    /// Ends the connection from this side.
    fn end(&self, channel: &Channel, why: LinkError) {
        self.verdict.set(Some(why));
        // Ends the read that is under way, whose task tells why.
        channel.shut_down();
    }
}

/// Writes messages, each whole and in the order in which they come, and the pings and pongs that are due ahead of them.
pub(super) async fn write(channel: Rc<Channel>, shared: Rc<Shared>, mut outgoing: mpsc::Receiver<Outgoing>) {
    loop {
        let (bytes, written) = match shared.take_due() {
            Some(due) => (due.encode(), None),
            None => tokio::select! {
                biased;
                () = shared.due.notified() => continue,
                message = outgoing.recv() => match message {
                    Some((bytes, written)) => (bytes, Some(written)),
                    None => return,
                },
            },
        };
        let Ok(result) = timeout(TAKING, channel.write_all(bytes)).await else {
            return shared.end(&channel, LinkError::Stuck(TAKING));
        };
        if let Some(written) = written {
            // The task that sent it may have given up waiting.
            let _ = written.send(result);
        }
    }
}

/// Reads messages, deals with pings, and passes on the rest until the connection ends.
pub(super) async fn read(
    channel: Rc<Channel>,
    shared: Rc<Shared>,
    messages: mpsc::UnboundedSender<Received>,
) {
    loop {
        let (message, bytes) = match read_message(&channel, &shared).await {
            Ok(read) => read,
            Err(error) => {
                let error = shared.verdict.take().unwrap_or(error);
                let _ = messages.send(Received { message: Err(error), bytes: 0, _room: None });
                return;
            }
        };
        match message {
            Control::Ping(number) => {
                shared.pong.set(Some(number));
                shared.due.notify_one();
            }
            Control::Pong(number) => {
                let pinged = shared.pinged_at.take();
                match pinged {
                    Some((sent, at)) if sent == number => shared.note_round_trip(at.elapsed()),
                    other => shared.pinged_at.set(other),
                }
            }
            message => {
                let room = shared.room_for(bytes).await;
                if messages.send(Received { message: Ok(message), bytes, _room: room }).is_err() {
                    return;
                }
            }
        }
    }
}

/// Sends pings, and ends the link when nothing has been heard for `silence`.
pub(super) async fn watch(channel: Rc<Channel>, shared: Rc<Shared>, silence: Duration) {
    let pause = (silence / 5).min(Duration::from_secs(1));
    for number in 0.. {
        shared.ping.set(Some(number));
        shared.due.notify_one();
        let slept = Instant::now();
        tokio::time::sleep(pause).await;
        // A task that could not listen has heard nothing: what came meanwhile is read first.
        let listened = !shared.held_up.get() && slept.elapsed() < 2 * pause;
        if listened && shared.last_heard.get().elapsed() > silence {
            return shared.end(&channel, LinkError::Silent(silence));
        }
    }
}

/// Reads the next message. Returns it and its length in bytes.
async fn read_message(channel: &Channel, shared: &Shared) -> Result<(Control, usize), LinkError> {
    let heard = || shared.last_heard.set(Instant::now());
    let (kind, bytes) = decode_header(&channel.read_exactly(HEADER_BYTES, heard).await?)?;
    let message = Control::decode(kind, &channel.read_exactly(bytes, heard).await?)?;
    Ok((message, HEADER_BYTES + bytes))
}
