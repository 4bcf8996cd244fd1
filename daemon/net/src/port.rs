//! This module opens lanes on the network ports that are lent to migration, and listens for lanes of other hosts.

pub mod congestion;
mod connection_limiter;
mod path;
mod rendezvous;

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpStream as StdStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memlane_kvm::descriptors::{explain, is_exhaustion};
use memlane_lane::socket::shortest_round_trip;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::hello::{ANSWER_BYTES, Answer, Hello, Purpose, VERSIONS};
use memlane_tls::{Credentials, Records};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio_uring::net::TcpListener;

use self::congestion::Congestion;
use crate::channel::{read_until, shake_blocking};
use crate::config::PortConfig;

pub use connection_limiter::{ConnectionLimiter, ConnectionSlot};
pub use rendezvous::{ArrivedLane, LaneKind, Rendezvous, serve};

/// A lane may take this long to connect, and again for the greeting.
const CONNECT: Duration = Duration::from_secs(2);
/// The kernel holds this many connections ready to be accepted: a crowd must not make a lane try twice.
const BACKLOG: i32 = 1024;

/// These are the bytes that lanes have sent and received on each port since the daemon started.
#[derive(Default)]
pub struct Traffic {
    ports: RefCell<HashMap<Label, (u64, u64)>>,
}

impl Traffic {
    /// Adds the bytes that lanes have sent and received on a port.
    pub fn add(&self, port: &Label, sent: u64, received: u64) {
        let mut ports = self.ports.borrow_mut();
        let totals = ports.entry(port.clone()).or_default();
        (totals.0, totals.1) = (totals.0 + sent, totals.1 + received);
    }

    /// Returns the bytes that a port has sent and received.
    pub fn of(&self, port: &Label) -> (u64, u64) {
        self.ports.borrow().get(port).copied().unwrap_or_default()
    }
}

/// Binds a listener. If the address is in use, tries again for 3 seconds: the kernel closes the sockets that an
/// io_uring waits for only a moment after the end of a daemon that was killed.
///
/// # Errors
///
/// Fails if the address is still in use after that, or if it is none of this host.
pub async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    const PATIENCE: Duration = Duration::from_secs(3);
    const LOOK: Duration = Duration::from_millis(20);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match bind(address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                tokio::time::sleep(LOOK).await;
            }
            bound => return bound,
        }
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from_std(socket.into()))
}

/// A connection of a lane or a probe from a port of this host to one of another host.
pub struct Opened {
    /// This is the connected socket.
    pub socket: OwnedFd,
    /// This seals and opens what flows there. It is `None` if the connection is not encrypted.
    pub records: Option<Box<Records>>,
    /// This is the address of this end.
    pub local: SocketAddr,
    /// This is the shortest round trip of the connection, as the kernel has measured it.
    pub round_trip: Duration,
}

/// A connection from a port of this host could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The kernel refused a step of it, or the other host did not answer.
    #[error("cannot {doing} from port {port} ({address}) to {remote}: {source}")]
    Failed {
        /// This is the step that failed.
        doing: &'static str,
        /// This is the name of the port here.
        port: Label,
        /// This is the port's own address.
        address: IpAddr,
        /// This is the address that the connection was to go to.
        remote: SocketAddr,
        /// This is what the kernel said.
        source: io::Error,
    },
    /// The two hosts do not accept each other's certificates, or the connection broke in the handshake.
    #[error("cannot encrypt a connection from port {port} ({address}) to {remote}: {source}")]
    Encryption {
        /// This is the name of the port here.
        port: Label,
        /// This is the port's own address.
        address: IpAddr,
        /// This is the address that the connection was to go to.
        remote: SocketAddr,
        /// This is what went wrong.
        source: io::Error,
    },
    /// Large packets do not arrive, and nobody says so.
    #[error(
        "packets with {bytes} bytes of data do not get from port {port} ({address}) to {remote}, and smaller ones do: a \
         switch or tunnel between them has a smaller MTU"
    )]
    Mtu {
        /// This is the name of the port here.
        port: Label,
        /// This is the port's own address.
        address: IpAddr,
        /// This is the address that they do not get to.
        remote: SocketAddr,
        /// This is the number of bytes of data in such a packet.
        bytes: u32,
    },
    /// The other host answered the greeting and refused the connection.
    #[error("{remote} refuses a connection from port {port}: {reason}")]
    Refused {
        /// This is the address that refused it.
        remote: SocketAddr,
        /// This is the name of the port here.
        port: Label,
        /// This is the reason in the other host's own words.
        reason: String,
    },
}

/// Tells who calls, and who is called.
#[derive(Clone)]
pub struct Caller {
    /// This is the name of this host.
    pub host: Label,
    /// This is the host that is called.
    pub peer: Label,
    /// The connection is protected with these. With `None` it is not encrypted.
    pub credentials: Option<Arc<Credentials>>,
}

/// Connects from `port` to `remote` and greets. A probe also finds out whether large packets arrive. It blocks the calling thread for a few seconds at the most.
///
/// # Errors
///
/// Fails if the port cannot be used, if the other host does not answer in time, or if it refuses the connection.
pub fn open(
    port: &PortConfig,
    remote: SocketAddr,
    caller: &Caller,
    purpose: Purpose,
) -> Result<Opened, OpenError> {
    let failed = |doing: &'static str| {
        let (port, address) = (port.name.clone(), port.address);
        move |source| OpenError::Failed { doing, port, address, remote, source: explain(source) }
    };
    let socket =
        Socket::new(Domain::for_address(remote), Type::STREAM, None).map_err(failed("open a socket"))?;
    if let Some(interface) = &port.interface {
        socket.bind_device(Some(interface.as_bytes())).map_err(failed("use the interface"))?;
    }
    let congestion = Congestion::choose(&socket, port.congestion_control.as_deref())
        .map_err(failed("use the congestion control that is configured"))?;
    socket.bind(&SockAddr::from(SocketAddr::new(port.address, 0))).map_err(failed("bind"))?;
    socket.connect_timeout(&remote.into(), CONNECT).map_err(failed("connect"))?;
    congestion.settle(&socket);
    socket.set_tcp_nodelay(true).map_err(failed("prepare a connection"))?;
    let (oldest, newest) = VERSIONS;
    let hello = Hello { oldest, newest, host: caller.host.clone(), purpose };
    let mut stream = StdStream::from(socket);
    stream.set_write_timeout(Some(CONNECT)).map_err(failed("prepare a connection"))?;
    let (name, address) = (port.name.clone(), port.address);
    let not_encrypted = |source| OpenError::Encryption { port: name, address, remote, source };
    let records = caller.credentials.as_deref();
    let deadline = Instant::now() + CONNECT;
    let records = records.map(|credentials| shake_blocking(&mut stream, &caller.peer, credentials, deadline));
    let mut records = records.transpose().map_err(not_encrypted)?;
    let greeted = Instant::now();
    let answer = greet(&mut stream, &mut records, &hello).map_err(failed("greet"))?;
    // The answer waits until the other host has looked at the certificate: the kernel knows the round trip better.
    let round_trip = shortest_round_trip(&stream).unwrap_or(Duration::MAX).min(greeted.elapsed());
    if let Answer::Refused { reason } = answer {
        return Err(OpenError::Refused { remote, port: port.name.clone(), reason });
    }
    if purpose == Purpose::Probe
        && let Some(bytes) = path::swallowed(&mut stream)
    {
        return Err(OpenError::Mtu { port: port.name.clone(), address: port.address, remote, bytes });
    }
    stream.set_read_timeout(None).map_err(failed("prepare a connection"))?;
    stream.set_write_timeout(None).map_err(failed("prepare a connection"))?;
    let local = stream.local_addr().map_err(failed("look at a connection"))?;
    Ok(Opened { socket: stream.into(), records, local, round_trip })
}

fn greet(stream: &mut StdStream, records: &mut Option<Box<Records>>, hello: &Hello) -> io::Result<Answer> {
    let broken = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut bytes = hello.encode();
    if let Some(records) = records {
        bytes = records.sealed(&bytes).map_err(io::Error::other)?;
    }
    stream.write_all(&bytes)?;
    let deadline = Instant::now() + CONNECT;
    let mut read = |count| read_exactly(stream, records, count, deadline);
    let mut bytes = read(ANSWER_BYTES)?;
    bytes.extend(read(Answer::text_bytes(&bytes).map_err(broken)?)?);
    Answer::decode(&bytes).map_err(broken)
}

fn read_exactly(
    stream: &mut StdStream,
    records: &mut Option<Box<Records>>,
    count: usize,
    deadline: Instant,
) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(count);
    loop {
        let left = count - bytes.len();
        if let Some(records) = records {
            records.read(left, &mut bytes).map_err(io::Error::other)?;
        }
        if bytes.len() == count {
            return Ok(bytes);
        }
        match records {
            Some(records) => {
                let came = read_until(stream, records.room(), deadline)?;
                records.received(came);
            }
            None => {
                let mut part = vec![0; left];
                let came = read_until(stream, &mut part, deadline)?;
                bytes.extend_from_slice(&part[..came]);
            }
        }
    }
}

/// Tells whether this host has the address.
///
/// # Errors
///
/// Fails if that cannot be found out, because file descriptors or memory are exhausted.
pub fn holds(address: IpAddr) -> io::Result<bool> {
    match std::net::UdpSocket::bind((address, 0)) {
        Ok(_) => Ok(true),
        Err(error) if is_exhaustion(&error) => Err(explain(error)),
        Err(_) => Ok(false),
    }
}

/// Returns whether an interface has a carrier, and the speed that it reports in bits per second.
pub fn interface_state(interface: &str) -> (bool, Option<u64>) {
    let read = |file: &str| std::fs::read_to_string(format!("/sys/class/net/{interface}/{file}")).ok();
    let up = read("carrier").is_some_and(|carrier| carrier.trim() == "1");
    let megabits: Option<u64> = read("speed").and_then(|speed| speed.trim().parse().ok());
    (up, megabits.map(|megabits| megabits * 1_000_000))
}
