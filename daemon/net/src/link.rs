//! The control connection to another daemon.
//!
//! The tasks in `traffic` read, write and ping, so that a link notices within the configured silence that the other
//! side is gone, even if this side is busy: pings are answered ahead of all messages that wait, and every byte that
//! comes is a sign of life.

mod traffic;

use std::fmt;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use memlane_kvm::descriptors::explain;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::control::Control;
use memlane_protocol::wire::hello::{
    ANSWER_BYTES, Answer, HELLO_BYTES, Hello, Purpose, VERSIONS, common_version,
};
use memlane_tls::Credentials;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_uring::net::TcpStream;

use self::traffic::{Outgoing, Received, Shared};
use crate::channel::{Channel, Protection, read_some};
use crate::config::PeerConfig;
pub use crate::error::LinkError;
use crate::task;

/// Connecting may take this long, and again the answer to a greeting.
const GREETING: Duration = Duration::from_secs(3);
/// A host that has connected must have sent its greeting within this time.
const HELLO: Duration = Duration::from_millis(500);
/// This many messages may wait to be written.
const WRITE_AHEAD: usize = 16;

/// One end of a control connection. Dropping it closes the connection.
pub struct Link {
    channel: Rc<Channel>,
    version: u16,
    sender: LinkSender,
    messages: mpsc::UnboundedReceiver<Received>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// The sending side of a [`Link`], for tasks that only send.
#[derive(Clone)]
pub struct LinkSender {
    /// Messages go through one task, so that none is torn when a sender gives up waiting.
    outgoing: mpsc::Sender<Outgoing>,
    shared: Rc<Shared>,
}

impl Link {
    /// Connects this host, `host`, to a peer and agrees on the version of the protocol. Without `credentials` the
    /// connection is not encrypted. `silence` is how long the link then waits for a sign of life before it ends.
    ///
    /// # Errors
    ///
    /// Fails if the peer cannot be reached, does not answer in time, or refuses the connection.
    pub async fn connect(
        peer: &PeerConfig,
        host: &Label,
        credentials: Option<&Credentials>,
        silence: Duration,
    ) -> Result<Self, LinkError> {
        let address = peer.control;
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        let refused = |source| LinkError::Connect { address, source: explain(source) };
        let stream = timeout(GREETING, TcpStream::connect(address)).await.map_err(late);
        let stream = stream.and_then(|stream| stream).map_err(refused)?;
        stream.set_nodelay(true).map_err(refused)?;
        let stream = Rc::new(stream);
        let channel = timeout(GREETING, Channel::connect(stream.clone(), &peer.name, credentials)).await;
        let channel = match channel.unwrap_or_else(|_| Err(given_up(&stream, GREETING))) {
            Err(LinkError::Tls(source)) => return Err(LinkError::Encryption { address, source }),
            Err(LinkError::Io(source)) => return Err(refused(source)),
            Err(LinkError::Closed) => return Err(refused(io::ErrorKind::ConnectionReset.into())),
            channel => channel?,
        };
        let (oldest, newest) = VERSIONS;
        let hello = Hello { oldest, newest, host: host.clone(), purpose: Purpose::Control };
        match timeout(GREETING, greet(&channel, &hello)).await {
            Ok(Ok(Answer::Welcome { version })) => Ok(Self::over(channel, version, silence)),
            Ok(Ok(Answer::Refused { reason })) => Err(LinkError::Refused { address, reason }),
            // A daemon that ends just now is as good as none; so is one to which this host is a stranger.
            Ok(Err(LinkError::Io(source))) => Err(refused(source)),
            Ok(Err(LinkError::Closed)) => Err(refused(io::ErrorKind::ConnectionReset.into())),
            // A host that refuses a certificate says so only now: its own part of the handshake was done before.
            Ok(Err(LinkError::Tls(source))) => Err(LinkError::Encryption { address, source }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(given_up(&stream, GREETING)),
        }
    }

    /// Makes a link of a connection whose greeting is done. Both sides speak `version` of the protocol.
    pub fn over(channel: Channel, version: u16, silence: Duration) -> Self {
        let channel = Rc::new(channel);
        let shared = Rc::new(Shared::default());
        let (outgoing, to_write) = mpsc::channel(WRITE_AHEAD);
        let (sender, messages) = mpsc::unbounded_channel();
        let tasks = vec![
            task::spawn("link writer", traffic::write(channel.clone(), shared.clone(), to_write)),
            task::spawn("link reader", traffic::read(channel.clone(), shared.clone(), sender)),
            task::spawn("link watcher", traffic::watch(channel.clone(), shared.clone(), silence)),
        ];
        Self { channel, version, sender: LinkSender { outgoing, shared }, messages, tasks }
    }

    /// Returns the next message that is no ping.
    ///
    /// # Errors
    ///
    /// Fails, now and from then on, when the link has ended.
    pub async fn receive(&mut self) -> Result<Control, LinkError> {
        self.receive_with_length().await.map(|(message, _)| message)
    }

    /// Returns the next message that is no ping, with its length on the wire in bytes.
    ///
    /// # Errors
    ///
    /// Fails, now and from then on, when the link has ended.
    pub(crate) async fn receive_with_length(&mut self) -> Result<(Control, usize), LinkError> {
        match self.messages.recv().await {
            // There is room for another one now.
            Some(Received { message, bytes, .. }) => message.map(|message| (message, bytes)),
            None => Err(LinkError::Closed),
        }
    }

    /// Returns the version of the protocol that both sides speak.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// Sends a message if there is room for it, and waits for nothing.
    pub(crate) fn post(&self, message: &Control) {
        let (written, _) = oneshot::channel();
        let _ = self.sender.outgoing.try_send((message.encode(), written));
    }

    /// Waits, for a few seconds, until the other side closes the connection: the side that closes first may lose its
    /// own last messages.
    pub async fn until_closed(&mut self) {
        let closed = async { while self.receive().await.is_ok() {} };
        let _ = timeout(GREETING, closed).await;
    }

    /// Sends a message, and returns when it is written to the socket.
    ///
    /// # Errors
    ///
    /// Fails if the link has ended.
    pub async fn send(&self, message: &Control) -> Result<(), LinkError> {
        self.sender.send(message).await
    }

    /// Returns the sending side.
    pub fn sender(&self) -> LinkSender {
        self.sender.clone()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Ends the reader's pending read; it then lets go of the stream by itself.
        self.channel.shut_down();
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

impl LinkSender {
    /// Sends a message, and returns when it is written to the socket.
    ///
    /// # Errors
    ///
    /// Fails if the link has ended.
    pub async fn send(&self, message: &Control) -> Result<(), LinkError> {
        self.send_noted(message.encode(), |_| ()).await
    }

    /// Sends the bytes of a message, and returns when they are written to the socket. From when `note` is called with them
    /// on, they will be written, unless the link ends.
    ///
    /// # Errors
    ///
    /// Fails if the link has ended.
    pub(crate) async fn send_noted(&self, bytes: Vec<u8>, note: impl FnOnce(&[u8])) -> Result<(), LinkError> {
        let (written, done) = oneshot::channel();
        let room = self.outgoing.reserve().await.map_err(|_| LinkError::Closed)?;
        note(&bytes);
        room.send((bytes, written));
        done.await.map_err(|_| LinkError::Closed)??;
        Ok(())
    }

    /// Returns the shortest round trip of the last pings, once there was one. The shortest shows what the network
    /// takes, without the time that one of the daemons was busy with other work.
    pub fn round_trip(&self) -> Option<Duration> {
        self.shared.round_trip()
    }
}

/// A connection of another host whose greeting was accepted.
pub struct Greeted {
    /// This is the greeting.
    pub hello: Hello,
    /// This is the version of the protocol that both hosts speak.
    pub version: u16,
    /// This is the connection.
    pub channel: Channel,
}

/// Answers the greeting of a host that has connected. The host must be who it says it is, if `protection` asks for that.
/// `judge` decides whether the connection may go on, and the other host is told the text of its refusal.
///
/// # Errors
///
/// Fails if the connection is refused or cannot be encrypted, if the greeting does not come in time or is not
/// understood, and if the connection breaks.
pub async fn answer_greeting<R: fmt::Display>(
    stream: &Rc<TcpStream>,
    protection: &Protection,
    judge: impl FnOnce(&Hello) -> Result<(), R>,
) -> Result<Greeted, LinkError> {
    let credentials = protection.credentials();
    let greeting = async {
        let silent = || Err(given_up(stream, HELLO));
        let first = within(HELLO, read_some(stream)).await.unwrap_or_else(silent)?;
        let channel = Channel::accept(stream.clone(), first, credentials).await?;
        let hello = within(HELLO, channel.read_exactly(HELLO_BYTES, || ())).await;
        let hello = Hello::decode(&hello.unwrap_or_else(silent)?)?;
        let known = channel.check_host(&hello.host);
        let answer = match known.and_then(|()| versions_fit(&hello)) {
            Ok(version) => match judge(&hello) {
                Ok(()) => Answer::Welcome { version },
                Err(refusal) => Answer::Refused { reason: refusal.to_string() },
            },
            Err(reason) => Answer::Refused { reason },
        };
        channel.write_all(answer.encode()).await?;
        match answer {
            Answer::Welcome { version } => Ok(Greeted { hello, version, channel }),
            Answer::Refused { reason } => Err(LinkError::TurnedAway { host: hello.host, reason }),
        }
    };
    let answered = timeout(GREETING, greeting).await;
    answered.unwrap_or_else(|_| Err(given_up(stream, GREETING)))
}

/// Returns the version of the protocol that both hosts speak, or tells which host to upgrade.
fn versions_fit(hello: &Hello) -> Result<u16, String> {
    let ours = VERSIONS;
    common_version(ours, (hello.oldest, hello.newest)).ok_or_else(|| {
        format!(
            "this host speaks versions {} to {} of the protocol and {} speaks {} to {}; upgrade the older one",
            ours.0, ours.1, hello.host, hello.oldest, hello.newest
        )
    })
}

/// Ends a connection whose greeting took too long: a read that is under way would otherwise keep it open for as long as
/// the other side says nothing.
fn given_up(stream: &TcpStream, waited: Duration) -> LinkError {
    let _ = stream.shutdown(std::net::Shutdown::Both);
    LinkError::Silent(waited)
}

/// Returns what comes within `limit`. If this thread was busy for that long, what has come meanwhile counts: it is
/// looked at before the wait is given up.
async fn within<T>(limit: Duration, coming: impl Future<Output = T>) -> Option<T> {
    const LOOK: Duration = Duration::from_millis(20);
    let mut coming = pin!(coming);
    if let Ok(came) = timeout(limit, &mut coming).await {
        return Some(came);
    }
    timeout(LOOK, coming).await.ok()
}

async fn greet(channel: &Channel, hello: &Hello) -> Result<Answer, LinkError> {
    channel.write_all(hello.encode()).await?;
    let mut bytes = channel.read_exactly(ANSWER_BYTES, || ()).await?;
    bytes.extend(channel.read_exactly(Answer::text_bytes(&bytes)?, || ()).await?);
    Ok(Answer::decode(&bytes)?)
}

#[cfg(test)]
pub(crate) mod tests;
