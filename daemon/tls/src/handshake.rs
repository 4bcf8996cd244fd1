//! The handshake of a connection, by rustls: bytes in, bytes out.

use rustls::HandshakeKind;
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::CertificateDer;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};

use crate::TlsError;
use crate::records::{Kernel, Records};

/// The other host may send this many bytes before the handshake is done. A chain of certificates is a few thousand.
const MAX_BYTES: usize = 64 << 10;

/// A handshake that is under way.
///
/// The caller calls [`step`](Self::step) until it returns [`Step::Done`] or an error, and does what it returns. In either
/// case, it sends what [`outgoing`](Self::outgoing) has then.
pub struct Handshake {
    side: Side,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// This came along with the last message of the handshake, and is decrypted already.
    ahead: Vec<u8>,
    /// The other host has sent this many bytes.
    bytes: usize,
}

/// What the caller of a [`Handshake`] has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// To send what is [outgoing](Handshake::outgoing), then to receive bytes and hand them [in](Handshake::received).
    Exchange,
    /// To send what is outgoing, and to [finish](Handshake::finish) the handshake.
    Done,
}

/// A connection whose handshake is done.
pub struct Established {
    /// This seals and opens what flows from now on.
    pub records: Box<Records>,
    /// The certificate of the other host, and those that lead to its authority.
    pub certificates: Vec<CertificateDer<'static>>,
    /// Whether the handshake was shortened, with what an earlier one had left.
    pub resumed: bool,
}

enum Side {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

enum Turn {
    Again,
    Blocked,
    Done,
}

impl Handshake {
    pub(crate) fn client(connection: UnbufferedClientConnection) -> Self {
        Self::new(Side::Client(connection))
    }

    pub(crate) fn server(connection: UnbufferedServerConnection) -> Self {
        Self::new(Side::Server(connection))
    }

    fn new(side: Side) -> Self {
        Self { side, incoming: Vec::new(), outgoing: Vec::new(), ahead: Vec::new(), bytes: 0 }
    }

    /// Goes on until bytes of the other host are needed, or the handshake is done.
    ///
    /// # Errors
    ///
    /// Fails if the other host's certificate is refused, or the handshake is not valid. What is outgoing then tells the
    /// other host so.
    pub fn step(&mut self) -> Result<Step, TlsError> {
        loop {
            match self.turn() {
                Ok(Turn::Again) => {}
                Ok(Turn::Blocked) => return Ok(Step::Exchange),
                Ok(Turn::Done) => return Ok(Step::Done),
                Err(error) => {
                    // The alert that names the error to the other host is the only thing that is left to encode.
                    let _ = self.turn();
                    return Err(error);
                }
            }
        }
    }

    /// Takes the bytes that are to be sent.
    pub fn outgoing(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.outgoing)
    }

    /// Hands in bytes of the other host.
    ///
    /// # Errors
    ///
    /// Fails if these are more than a handshake takes.
    pub fn received(&mut self, bytes: &[u8]) -> Result<(), TlsError> {
        self.bytes += bytes.len();
        if self.bytes > MAX_BYTES {
            return Err(TlsError::Protocol("its handshake is too long"));
        }
        self.incoming.extend_from_slice(bytes);
        Ok(())
    }

    /// Ends the handshake.
    ///
    /// # Errors
    ///
    /// Fails if the handshake is not [`Step::Done`].
    pub fn finish(self) -> Result<Established, TlsError> {
        let certificates = match &self.side {
            Side::Client(connection) => connection.peer_certificates(),
            Side::Server(connection) => connection.peer_certificates(),
        };
        let certificates = certificates.unwrap_or_default().iter().map(|der| der.clone().into_owned());
        let certificates = certificates.collect();
        let kind = match &self.side {
            Side::Client(connection) => connection.handshake_kind(),
            Side::Server(connection) => connection.handshake_kind(),
        };
        let (secrets, kernel) = match self.side {
            Side::Client(connection) => {
                let (secrets, kernel) = connection.dangerous_into_kernel_connection()?;
                (secrets, Kernel::Client(kernel))
            }
            Side::Server(connection) => {
                let (secrets, kernel) = connection.dangerous_into_kernel_connection()?;
                (secrets, Kernel::Server(kernel))
            }
        };
        let records = Box::new(Records::new(secrets, kernel, &self.ahead, &self.incoming)?);
        Ok(Established { records, certificates, resumed: kind == Some(HandshakeKind::Resumed) })
    }

    fn turn(&mut self) -> Result<Turn, TlsError> {
        let (outgoing, ahead) = (&mut self.outgoing, &mut self.ahead);
        let (discard, turn) = match &mut self.side {
            Side::Client(connection) => {
                deal_with(connection.process_tls_records(&mut self.incoming), outgoing, ahead)
            }
            Side::Server(connection) => {
                deal_with(connection.process_tls_records(&mut self.incoming), outgoing, ahead)
            }
        };
        self.incoming.drain(..discard);
        turn
    }
}

/// Deals with what rustls wants, and returns how many bytes it has read.
fn deal_with<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Vec<u8>,
    ahead: &mut Vec<u8>,
) -> (usize, Result<Turn, TlsError>) {
    let mut discard = status.discard;
    let turn = match status.state {
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            let begin = outgoing.len();
            if let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut []) {
                outgoing.resize(begin + size.required_size, 0);
                // It is as long as it was said to be.
                let _ = data.encode(&mut outgoing[begin..]);
            }
            Ok(Turn::Again)
        }
        // The caller sends it before it receives anything.
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Ok(Turn::Again)
        }
        Ok(ConnectionState::ReadTraffic(mut traffic)) => {
            while let Some(Ok(record)) = traffic.next_record() {
                discard += record.discard;
                ahead.extend_from_slice(record.payload);
            }
            Ok(Turn::Again)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Turn::Blocked),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Turn::Done),
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Err(TlsError::Closed),
        Ok(_) => Err(TlsError::Protocol("it sent data before the handshake was done")),
        Err(error) => Err(error.into()),
    };
    (discard, turn)
}
