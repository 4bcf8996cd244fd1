//! A connection between two hosts, encrypted unless the configuration says otherwise.

use std::cell::RefCell;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream as StdStream};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use memlane_protocol::wire::Label;
use memlane_protocol::wire::hello::is_hello;
use memlane_tls::{Credentials, Established, Handshake, IdentityError, Records, Step};
use socket2::SockRef;
use tokio::sync::Semaphore;
use tokio_uring::buf::BoundedBuf;
use tokio_uring::net::TcpStream;

use crate::error::LinkError;
use crate::task;

/// One read takes at most this many bytes.
const READ_BYTES: usize = 32 << 10;
/// The alert `insufficient_security` (RFC 8446, section 6), by which a host that takes plain connections answers one
/// that wants to encrypt.
const INSUFFICIENT_SECURITY: [u8; 7] = [21, 3, 3, 0, 2, 2, 71];
/// The type of a record of the handshake protocol: the first byte of a connection that wants to encrypt.
const HANDSHAKE: u8 = 22;

/// This many handshakes are computed at a time. Any local user of a peer's host can have this host compute, so it is done
/// beside the control thread, and takes no more than these threads.
static COMPUTING: Semaphore = Semaphore::const_new(2);

/// How this host protects its connections to others: with these credentials, or not at all.
#[derive(Clone, Default)]
pub struct Protection {
    current: Rc<RefCell<Option<Arc<Credentials>>>>,
}

/// A connection to another host, on the control thread.
pub struct Channel {
    stream: Rc<TcpStream>,
    records: Option<RefCell<Box<Records>>>,
    /// These bytes came before it was known whether the connection is encrypted.
    ahead: RefCell<Vec<u8>>,
    owner: Owner,
}

/// This tells whose certificate came with a connection.
enum Owner {
    /// The connection is not encrypted, and need not be.
    Unasked,
    /// The connection is not encrypted, and should be.
    Missing,
    /// The certificate is that of this peer.
    Peer(Label),
    /// The certificate is that of no peer.
    Stranger(IdentityError),
}

impl fmt::Debug for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.credentials().is_some() { "TLS" } else { "none" })
    }
}

impl Protection {
    /// Protects connections with these credentials from now on. With `None`, connections are not encrypted.
    pub fn new(credentials: Option<Credentials>) -> Self {
        Self { current: Rc::new(RefCell::new(credentials.map(Arc::new))) }
    }

    /// Uses other credentials from now on. Connections that exist stay as they are.
    pub fn replace(&self, credentials: Credentials) {
        *self.current.borrow_mut() = Some(Arc::new(credentials));
    }

    /// Returns the credentials for new connections, or `None` if these are not encrypted.
    pub fn credentials(&self) -> Option<Arc<Credentials>> {
        self.current.borrow().clone()
    }
}

impl Channel {
    /// Makes a channel that is not encrypted.
    pub fn plain(stream: Rc<TcpStream>) -> Self {
        Self { stream, records: None, ahead: RefCell::default(), owner: Owner::Unasked }
    }

    /// Makes a channel of a connection that this host has made to `peer`.
    ///
    /// # Errors
    ///
    /// Fails if the connection breaks, or if the two hosts do not accept each other's certificates.
    pub async fn connect(
        stream: Rc<TcpStream>,
        peer: &Label,
        credentials: Option<&Credentials>,
    ) -> Result<Self, LinkError> {
        let Some(credentials) = credentials else { return Ok(Self::plain(stream)) };
        let established = shake(&stream, credentials.connect(peer)?, Vec::new()).await?;
        credentials.check_called(peer, &established)?;
        Ok(Self::encrypted(stream, established.records, Owner::Peer(peer.clone())))
    }

    /// Makes a channel of a connection that another host has made to this one, and on which `first` has come. The caller
    /// then [checks](Self::check_host) that the other host is who it says it is.
    ///
    /// # Errors
    ///
    /// Fails if the connection breaks, if no authority that is known here has signed the other host's certificate, or if
    /// only one of the two hosts encrypts.
    pub async fn accept(
        stream: Rc<TcpStream>,
        first: Vec<u8>,
        credentials: Option<Arc<Credentials>>,
    ) -> Result<Self, LinkError> {
        match (credentials, first.first()) {
            (None, Some(&HANDSHAKE)) => {
                stream.write_all(INSUFFICIENT_SECURITY.to_vec()).await.0?;
                Err(LinkError::EncryptedThere)
            }
            (None, _) => Ok(Self { ahead: RefCell::new(first), ..Self::plain(stream) }),
            // The caller answers it, and so refuses it with words.
            (Some(_), _) if is_hello(&first) => {
                Ok(Self { ahead: RefCell::new(first), owner: Owner::Missing, ..Self::plain(stream) })
            }
            (Some(credentials), _) => {
                let Established { records, certificates, .. } =
                    shake(&stream, credentials.accept()?, first).await?;
                let owner = match computed(move || credentials.peer_of(&certificates)).await {
                    Ok(peer) => Owner::Peer(peer),
                    Err(error) => Owner::Stranger(error),
                };
                Ok(Self::encrypted(stream, records, owner))
            }
        }
    }

    /// Makes a channel of a lane: a connection that was opened, greeted and answered elsewhere. Writing waits until nearly all
    /// of what was written before is on its way, so that the writer knows what is not.
    pub fn of_lane(socket: OwnedFd, records: Option<Box<Records>>) -> Self {
        const UNSENT_BYTES: u32 = 128 << 10;
        // Without it, the kernel's buffer is what is on its way, too.
        let _ = SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT_BYTES);
        let stream = Rc::new(TcpStream::from_std(StdStream::from(socket)));
        Self { records: records.map(RefCell::new), ..Self::plain(stream) }
    }

    fn encrypted(stream: Rc<TcpStream>, records: Box<Records>, owner: Owner) -> Self {
        Self { stream, records: Some(RefCell::new(records)), ahead: RefCell::default(), owner }
    }

    /// Checks that the host at the other end is `host`, as its certificate says. An insecure host believes it.
    ///
    /// # Errors
    ///
    /// Fails with the reason, for the operator of the other host.
    pub fn check_host(&self, host: &Label) -> Result<(), String> {
        match &self.owner {
            Owner::Unasked => Ok(()),
            Owner::Missing => Err(format!(
                "{host} did not encrypt the connection, and the called host takes no others; give {host} keys \
                 (`memlanectl keys`), and take insecure = true out of its configuration"
            )),
            Owner::Peer(peer) if peer == host => Ok(()),
            Owner::Peer(peer) => {
                Err(format!("the certificate is that of {peer}, and the caller says it is {host}"))
            }
            Owner::Stranger(error) => Err(error.to_string()),
        }
    }

    /// Reads `count` bytes. `heard` is called for each part of them that comes, as a sign of life.
    ///
    /// # Errors
    ///
    /// Fails if the connection ends or breaks before they have come.
    pub async fn read_exactly(&self, count: usize, heard: impl Fn()) -> Result<Vec<u8>, LinkError> {
        let mut bytes = Vec::with_capacity(count);
        loop {
            self.take(count, &mut bytes)?;
            if bytes.len() == count {
                return Ok(bytes);
            }
            let came = read_some(&self.stream).await?;
            match &self.records {
                Some(records) => records.borrow_mut().append(&came),
                None => self.ahead.borrow_mut().extend(came),
            }
            heard();
        }
    }

    /// Reads what has come, and waits for it if need be. What comes is lost if the returned future is dropped.
    ///
    /// # Errors
    ///
    /// Fails if the connection ends or breaks before.
    pub async fn read_some(&self) -> Result<Vec<u8>, LinkError> {
        let mut bytes = Vec::new();
        loop {
            if let Some(records) = &self.records {
                records.borrow_mut().read(usize::MAX, &mut bytes)?;
                if !bytes.is_empty() {
                    return Ok(bytes);
                }
            }
            let came = read_some(&self.stream).await?;
            match &self.records {
                Some(records) => records.borrow_mut().append(&came),
                // Without the room for what has not come.
                None => return Ok(came.into_boxed_slice().into_vec()),
            }
        }
    }

    /// Takes what has come, until there are `count` bytes.
    fn take(&self, count: usize, bytes: &mut Vec<u8>) -> Result<(), LinkError> {
        let Some(records) = &self.records else {
            let mut ahead = self.ahead.borrow_mut();
            let now = ahead.len().min(count - bytes.len());
            bytes.extend(ahead.drain(..now));
            return Ok(());
        };
        Ok(records.borrow_mut().read(count - bytes.len(), bytes)?)
    }

    /// Writes all of these bytes. The caller must not call it again before it has returned.
    ///
    /// # Errors
    ///
    /// Fails if the connection breaks.
    pub async fn write_all(&self, bytes: Vec<u8>) -> io::Result<()> {
        let bytes = match &self.records {
            Some(records) => records.borrow_mut().sealed(&bytes).map_err(io::Error::other)?,
            None => bytes,
        };
        self.stream.write_all(bytes).await.0
    }

    /// Ends the connection; a read that is under way ends with it.
    pub fn shut_down(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Returns what seals and opens the bytes of the connection. It is `None` if the connection is not encrypted.
    ///
    /// # Errors
    ///
    /// Fails if the connection is not encrypted and the other host did not wait for the answer to its greeting: what it
    /// has sent would be lost.
    pub fn into_records(self) -> Result<Option<Box<Records>>, LinkError> {
        if self.ahead.borrow().is_empty() {
            return Ok(self.records.map(RefCell::into_inner));
        }
        Err(LinkError::Unexpected { expected: "nothing until the greeting is answered", found: "data" })
    }
}

/// Does a part of a handshake beside the control thread, when it is its turn.
async fn computed<T: Send + 'static>(part: impl FnOnce() -> T + Send + 'static) -> T {
    let _turn = COMPUTING.acquire().await.expect("it is never closed");
    task::aside(part).await
}

async fn shake(
    stream: &TcpStream,
    mut handshake: Handshake,
    first: Vec<u8>,
) -> Result<Established, LinkError> {
    handshake.received(&first)?;
    loop {
        let step;
        (step, handshake) = computed(move || (handshake.step(), handshake)).await;
        let outgoing = handshake.outgoing();
        if !outgoing.is_empty() {
            let sent = stream.write_all(outgoing).await.0;
            // What went wrong before is the reason, whether or not the other host hears of it.
            if step.is_ok() {
                sent?;
            }
        }
        match step? {
            Step::Exchange => handshake.received(&read_some(stream).await?)?,
            Step::Done => return Ok(handshake.finish()?),
        }
    }
}

/// Makes the handshake of a connection to `peer`, and blocks the calling thread until `deadline` at the latest.
///
/// # Errors
///
/// Fails if the connection breaks, or if the two hosts do not accept each other's certificates.
pub(crate) fn shake_blocking(
    stream: &mut StdStream,
    peer: &Label,
    credentials: &Credentials,
    deadline: Instant,
) -> io::Result<Box<Records>> {
    let mut handshake = credentials.connect(peer).map_err(io::Error::other)?;
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let step = handshake.step();
        let sent = stream.write_all(&handshake.outgoing());
        match step.map_err(io::Error::other)? {
            Step::Exchange => {
                sent?;
                let count = read_until(stream, &mut buffer, deadline)?;
                handshake.received(&buffer[..count]).map_err(io::Error::other)?;
            }
            Step::Done => {
                sent?;
                let established = handshake.finish().map_err(io::Error::other)?;
                credentials.check_called(peer, &established).map_err(io::Error::other)?;
                return Ok(established.records);
            }
        }
    }
}

/// Reads what has come, and waits for it until `deadline` at the latest.
///
/// # Errors
///
/// Fails if nothing comes until then, or if the connection ends or breaks.
pub(crate) fn read_until(stream: &mut StdStream, buffer: &mut [u8], deadline: Instant) -> io::Result<usize> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    stream.set_read_timeout(Some(left))?;
    match stream.read(buffer)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        count => Ok(count),
    }
}

/// Reads what has come, and waits for it if need be.
pub(crate) async fn read_some(stream: &TcpStream) -> Result<Vec<u8>, LinkError> {
    let (result, buffer) = stream.read(Vec::with_capacity(READ_BYTES).slice(..)).await;
    match result? {
        0 => Err(LinkError::Closed),
        _ => Ok(buffer.into_inner()),
    }
}
