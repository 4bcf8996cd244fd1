//! The protocol between daemons spoken by hand over an encrypted connection, with keys of the test's choice.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;

use memlane_keys::{Authority, CA, CERTIFICATE, KEY, Validity};
use memlane_lab::HostId;
use memlane_net::config::CONTROL_PORT;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::control::{Control, HEADER_BYTES, decode_header};
use memlane_protocol::wire::hello::{ANSWER_BYTES, Answer, Hello, Purpose, VERSIONS};
use memlane_tls::{Credentials, KeyFiles, PeerAuthority, Records, Step};

use super::{LONG, Stage, lane_address};

/// Writes the keys of `name` to the directory of a lab's host, where its daemon looks for them.
pub(crate) fn write_keys(stage: &Stage, id: HostId, keys: (&Authority, &str, Validity), trusted: &Authority) {
    let (authority, name, validity) = keys;
    let (certificate, key) = authority.issue(name, validity).unwrap();
    let host = stage.rig.lab().host(id);
    for (file, text) in [(CERTIFICATE, &certificate[..]), (KEY, &key), (CA, trusted.certificate())] {
        host.write_secret(&host.directory().join(file), text).unwrap();
    }
}

/// A connection to host B's daemon that the test encrypts itself.
pub(crate) struct Secure {
    stream: TcpStream,
    records: Box<Records>,
}

impl Secure {
    /// Connects from host A to the control port of host B, or to its first port if `lane` is true, with keys in
    /// `directory` that are those of `owner`.
    pub(crate) fn connect(stage: &Stage, directory: &Path, owner: &str, lane: bool) -> io::Result<Self> {
        let host = stage.rig.lab().host(HostId::B);
        let control = SocketAddr::new(IpAddr::V4(host.control_address()), CONTROL_PORT);
        let address = if lane { lane_address(stage) } else { control };
        let connected = stage.rig.lab().host(HostId::A).run_in(|| TcpStream::connect(address));
        let mut stream = connected.map_err(io::Error::other)??;
        stream.set_read_timeout(Some(LONG))?;
        let peer: Label = host.name().parse().unwrap();
        let file = |name: &str| directory.join(name);
        let files = KeyFiles { certificate: file(CERTIFICATE), key: file(KEY), ca: file(CA) };
        let authority = PeerAuthority { name: peer.clone(), ca: None };
        let credentials = Credentials::load(&files, &owner.parse().unwrap(), &[authority]).unwrap();
        let mut handshake = credentials.connect(&peer).map_err(io::Error::other)?;
        let mut buffer = [0; 4096];
        while handshake.step().map_err(io::Error::other)? == Step::Exchange {
            stream.write_all(&handshake.outgoing())?;
            match stream.read(&mut buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => handshake.received(&buffer[..count]).map_err(io::Error::other)?,
            }
        }
        stream.write_all(&handshake.outgoing())?;
        let records = handshake.finish().map_err(io::Error::other)?.records;
        Ok(Self { stream, records })
    }

    /// Says hello as `host`, and returns the answer.
    pub(crate) fn greet(&mut self, host: &str, purpose: Purpose) -> io::Result<Answer> {
        // As an older daemon, which does not resume connections.
        let (oldest, newest) = (VERSIONS.0, VERSIONS.0);
        self.write(&Hello { oldest, newest, host: host.parse().unwrap(), purpose }.encode())?;
        let mut bytes = self.read(ANSWER_BYTES)?;
        bytes.extend(self.read(Answer::text_bytes(&bytes).map_err(io::Error::other)?)?);
        Answer::decode(&bytes).map_err(io::Error::other)
    }

    /// Says something on a control connection.
    pub(crate) fn send(&mut self, message: &Control) {
        self.write(&message.encode()).unwrap();
    }

    /// The next message that is no ping. Pings are answered.
    pub(crate) fn receive(&mut self) -> Control {
        loop {
            let (kind, length) = decode_header(&self.read(HEADER_BYTES).unwrap()).unwrap();
            match Control::decode(kind, &self.read(length).unwrap()).unwrap() {
                Control::Ping(number) => self.send(&Control::Pong(number)),
                Control::Pong(_) => {}
                other => return other,
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let sealed = self.records.sealed(bytes).map_err(io::Error::other)?;
        self.stream.write_all(&sealed)
    }

    fn read(&mut self, count: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        loop {
            self.records.read(count - bytes.len(), &mut bytes).map_err(io::Error::other)?;
            if bytes.len() == count {
                return Ok(bytes);
            }
            match self.stream.read(self.records.room())? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                came => self.records.received(came),
            }
        }
    }
}
