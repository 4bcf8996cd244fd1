//! The protocol between daemons spoken by hand, well or badly.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use memlane_lab::{HostId, wait_for};
use memlane_net::config::{CONTROL_PORT, LANE_PORT};
use memlane_protocol::handover::Message;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::MigrationId;
use memlane_protocol::wire::control::{Accept, Control, HEADER_BYTES, Offer, decode_header};
use memlane_protocol::wire::hello::{ANSWER_BYTES, Answer, HELLO_BYTES, Hello, Purpose, VERSIONS};

use super::{LONG, Stage, Tap};

/// How many migrations we have offered ourselves.
static OFFERED: AtomicU64 = AtomicU64::new(0);

/// The identity of the migration that we have offered last.
pub(crate) fn ours() -> MigrationId {
    let number = OFFERED.load(Ordering::Relaxed).to_le_bytes();
    std::array::from_fn(|index| if index < 8 { 0xaa } else { number[index - 8] })
}

/// A control connection after its greeting, held by a test in place of a daemon. Pings are
/// answered until [`Peer::fall_silent`].
pub(crate) struct Peer {
    pub stream: TcpStream,
    messages: mpsc::Receiver<Control>,
    silent: Arc<AtomicBool>,
}

/// A lane's connection after its greeting, held by a test in place of a daemon.
pub(crate) struct Lane(pub TcpStream);

impl Peer {
    /// Calls host B as host A's daemon would.
    pub(crate) fn call(stage: &Stage) -> Self {
        let mut stream = connect(stage, CONTROL_PORT);
        let answer = greet(&mut stream, &hello(host_a(), Purpose::Control)).unwrap();
        assert!(matches!(answer, Answer::Welcome { .. }), "{answer:?}");
        let mut peer = Self::over(stream);
        let ports = stage.rig.lab().host(HostId::A).ports();
        peer.send(&Control::LanesFrom(ports.iter().map(|port| port.address.into()).collect()));
        peer
    }

    /// Over a connection whose greeting is done.
    pub(crate) fn over(stream: TcpStream) -> Self {
        let (sender, messages) = mpsc::channel();
        let silent = Arc::new(AtomicBool::new(false));
        let (mut reading, quiet) = (stream.try_clone().unwrap(), silent.clone());
        std::thread::spawn(move || {
            while let Ok(message) = read_message(&mut reading) {
                let passed = match message {
                    Control::Ping(_) if quiet.load(Ordering::Relaxed) => Ok(()),
                    Control::Ping(number) => {
                        reading.write_all(&Control::Pong(number).encode()).map_err(|_| ())
                    }
                    Control::Pong(_) | Control::LanesFrom(_) => Ok(()),
                    other => sender.send(other).map_err(|_| ()),
                };
                if passed.is_err() {
                    break;
                }
            }
        });
        Self { stream, messages, silent }
    }

    /// Says something.
    pub(crate) fn send(&mut self, message: &Control) {
        self.stream.write_all(&message.encode()).unwrap();
    }

    /// The next message that is no ping.
    pub(crate) fn receive(&self) -> Control {
        self.messages.recv_timeout(LONG).expect("the daemon has something to say")
    }

    /// The next message that is no ping; `None` if the daemon hangs up first.
    pub(crate) fn hear(&self) -> Option<Control> {
        self.messages.recv_timeout(LONG).ok()
    }

    /// Answers no more pings.
    pub(crate) fn fall_silent(&self) {
        self.silent.store(true, Ordering::Relaxed);
    }

    /// Waits until the daemon has closed the connection.
    pub(crate) fn wait_for_hang_up(&self) {
        loop {
            match self.messages.recv_timeout(LONG) {
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("the daemon has not closed the connection"),
            }
        }
    }
}

impl Lane {
    /// Waits until the daemon has closed the connection.
    pub(crate) fn wait_for_hang_up(mut self) {
        self.0.set_read_timeout(Some(LONG)).unwrap();
        let mut bytes = [0; 4096];
        loop {
            match self.0.read(&mut bytes) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    panic!("the daemon has not closed the lane")
                }
                // A connection that was reset is closed too.
                Err(_) => return,
            }
        }
    }
}

/// The name that host B knows host A by.
pub(crate) fn host_a() -> Label {
    "host-a".parse().unwrap()
}

/// A greeting in our own versions.
pub(crate) fn hello(host: Label, purpose: Purpose) -> Hello {
    // As an older daemon, which does not resume connections.
    let (oldest, newest) = (VERSIONS.0, VERSIONS.0);
    Hello { oldest, newest, host, purpose }
}

/// Connects from host A to the control port of host B, or, for [`LANE_PORT`], to its first port.
pub(crate) fn connect(stage: &Stage, port: u16) -> TcpStream {
    let host = stage.rig.lab().host(HostId::B);
    let control = SocketAddr::new(IpAddr::V4(host.control_address()), port);
    let address = if port == LANE_PORT { lane_address(stage) } else { control };
    if port == LANE_PORT {
        announce(stage);
    }
    let connected = stage.rig.lab().host(HostId::A).run_in(|| TcpStream::connect(address));
    let stream = connected.unwrap().unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

/// Has host B know where lanes of host A come from.
pub(crate) fn announce(stage: &Stage) {
    let mut peer = Peer::call(stage);
    let (migration, nanoseconds, reason) = ([0xbb; 16], 0, String::new());
    // Answered at once, after that was heard: nothing is known of it.
    peer.send(&Control::Handover { migration, message: Message::Withdraw, nanoseconds, reason });
    peer.receive();
}

/// Where lanes to host B connect, on its first port.
pub(crate) fn lane_address(stage: &Stage) -> SocketAddr {
    let port = &stage.rig.lab().host(HostId::B).ports()[0];
    SocketAddr::new(IpAddr::V4(port.address), LANE_PORT)
}

/// Says hello, and reads the answer.
pub(crate) fn greet(stream: &mut TcpStream, hello: &Hello) -> io::Result<Answer> {
    stream.write_all(&hello.encode())?;
    let mut bytes = read(stream, ANSWER_BYTES)?;
    let text = Answer::text_bytes(&bytes).map_err(io::Error::other)?;
    bytes.extend(read(stream, text)?);
    Answer::decode(&bytes).map_err(io::Error::other)
}

/// Reads a hello, and welcomes whoever said it.
pub(crate) fn welcome(stream: &mut TcpStream) -> io::Result<Hello> {
    let hello = Hello::decode(&read(stream, HELLO_BYTES)?).map_err(io::Error::other)?;
    stream.write_all(&Answer::Welcome { version: VERSIONS.0 }.encode())?;
    Ok(hello)
}

fn read_message(stream: &mut TcpStream) -> io::Result<Control> {
    let (kind, length) = decode_header(&read(stream, HEADER_BYTES)?).map_err(io::Error::other)?;
    Control::decode(kind, &read(stream, length)?).map_err(io::Error::other)
}

fn read(stream: &mut TcpStream, count: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The offer that host A's daemon makes, to be made by hand.
pub(crate) fn captured(stage: &mut Stage) -> Offer {
    let tap = Tap::install(stage);
    stage.wait_for_standing(HostId::A, "web1", "running");
    stage.wait_for_standing(HostId::B, "web1", "incoming");
    let answer = stage.rig.ctl(HostId::A, &["check", "web1", "host-b"]).unwrap();
    assert_eq!(answer.code, 0, "{}", answer.text);
    let mut offer = tap.offer().expect("an offer has passed the tap");
    offer.check_only = false;
    tap.remove(stage);
    stage.wait_for_standing(HostId::B, "web1", "incoming");
    offer
}

/// Offers the guest to host B, in a migration of its own; host B accepts.
pub(crate) fn offered(stage: &Stage, offer: &Offer) -> (Peer, Accept) {
    let mut peer = Peer::call(stage);
    OFFERED.fetch_add(1, Ordering::Relaxed);
    peer.send(&Control::Offer(Offer { migration: ours(), ..offer.clone() }));
    match peer.receive() {
        Control::Accept(accept) => (peer, accept),
        other => panic!("the offer is answered with {other:?}"),
    }
}

/// Opens a lane to host B.
pub(crate) fn lane(stage: &Stage, accept: &Accept, number: u16) -> Lane {
    let mut stream = connect(stage, LANE_PORT);
    let hello = hello(host_a(), Purpose::Lane { token: accept.token, lane: number });
    let answer = greet(&mut stream, &hello).unwrap();
    assert!(matches!(answer, Answer::Welcome { .. }), "{answer:?}");
    Lane(stream)
}

impl Stage {
    /// Waits until host B has given up the last migration of guest `web1`, for the reason `why`.
    pub(crate) fn wait_for_end_of_ours(&mut self, why: &str) {
        let ended = self.wait_until(HostId::B, "web1", "the end", |migration| migration.outcome.is_some());
        let reason = ended.reason.clone().unwrap_or_default();
        assert!(reason.contains(why), "{why:?} is not why it ended: {ended:?}");
        wait_for("the VMM to be free again", LONG, || {
            let guests = self.rig.ctl(HostId::B, &["guests"]).ok()?;
            guests.text.contains("\"incoming\"").then_some(())
        })
        .unwrap();
    }
}
