//! The protocol between daemons spoken by hand, well or badly.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use memlane_lab::HostId;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::control::{Control, HEADER_BYTES, decode_header};
use memlane_protocol::wire::hello::{ANSWER_BYTES, Answer, HELLO_BYTES, Hello, Purpose, VERSIONS};
use memlaned::config::{CONTROL_PORT, LANE_PORT};

use super::{LONG, Stage};

/// A control connection after its greeting, held by a test in place of a daemon. Pings are
/// answered until [`Peer::fall_silent`].
pub struct Peer {
    pub stream: TcpStream,
    messages: mpsc::Receiver<Control>,
    silent: Arc<AtomicBool>,
}

/// A lane's connection after its greeting, held by a test in place of a daemon.
pub struct Lane(pub TcpStream);

impl Peer {
    /// Calls host B as host A's daemon would.
    pub fn call(stage: &Stage) -> Self {
        let mut stream = connect(stage, CONTROL_PORT);
        let answer = greet(&mut stream, &hello(host_a(), Purpose::Control)).unwrap();
        assert!(matches!(answer, Answer::Welcome { .. }), "{answer:?}");
        Self::over(stream)
    }

    /// Over a connection whose greeting is done.
    pub fn over(stream: TcpStream) -> Self {
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
                    Control::Pong(_) => Ok(()),
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
    pub fn send(&mut self, message: &Control) {
        self.stream.write_all(&message.encode()).unwrap();
    }

    /// The next message that is no ping.
    pub fn receive(&self) -> Control {
        self.messages.recv_timeout(LONG).expect("the daemon has something to say")
    }

    /// The next message that is no ping; `None` if the daemon hangs up first.
    pub fn hear(&self) -> Option<Control> {
        self.messages.recv_timeout(LONG).ok()
    }

    /// Answers no more pings.
    pub fn fall_silent(&self) {
        self.silent.store(true, Ordering::Relaxed);
    }

    /// Waits until the daemon has closed the connection.
    pub fn wait_for_hang_up(&self) {
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
    pub fn wait_for_hang_up(mut self) {
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
pub fn host_a() -> Label {
    "host-a".parse().unwrap()
}

/// A greeting in our own versions.
pub fn hello(host: Label, purpose: Purpose) -> Hello {
    let (oldest, newest) = VERSIONS;
    Hello { oldest, newest, host, purpose }
}

/// Connects from host A to the control port of host B, or, for [`LANE_PORT`], to its first port.
pub fn connect(stage: &Stage, port: u16) -> TcpStream {
    let host = stage.rig.lab().host(HostId::B);
    let control = SocketAddr::new(IpAddr::V4(host.control_address()), port);
    let address = if port == LANE_PORT { lane_address(stage) } else { control };
    let connected = stage.rig.lab().host(HostId::A).run_in(|| TcpStream::connect(address));
    let stream = connected.unwrap().unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

/// Where lanes to host B connect, on its first port.
pub fn lane_address(stage: &Stage) -> SocketAddr {
    let port = &stage.rig.lab().host(HostId::B).ports()[0];
    SocketAddr::new(IpAddr::V4(port.address), LANE_PORT)
}

/// Says hello, and reads the answer.
pub fn greet(stream: &mut TcpStream, hello: &Hello) -> io::Result<Answer> {
    stream.write_all(&hello.encode())?;
    let mut bytes = read(stream, ANSWER_BYTES)?;
    let text = Answer::text_bytes(&bytes).map_err(io::Error::other)?;
    bytes.extend(read(stream, text)?);
    Answer::decode(&bytes).map_err(io::Error::other)
}

/// Reads a hello, and welcomes whoever said it.
pub fn welcome(stream: &mut TcpStream) -> io::Result<Hello> {
    let hello = Hello::decode(&read(stream, HELLO_BYTES)?).map_err(io::Error::other)?;
    stream.write_all(&Answer::Welcome { version: VERSIONS.1 }.encode())?;
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
