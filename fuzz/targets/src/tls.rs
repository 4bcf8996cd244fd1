//! What comes over an encrypted connection: the handshake of a stranger, and the records of a peer that breaks the rules.

mod peer;

use std::iter;
use std::ops::ControlFlow;

use memlane_protocol::wire::is_obeyed;
use memlane_tls::{Handshake, MAX_RECORD_BYTES, Records, Step, sealed_bytes};

use self::peer::{Peer, connection, handshakes};

const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const TAG_BYTES: usize = 16;
/// A record has at most this many bytes behind its header.
const MAX_SEALED_BYTES: usize = MAX_RECORD_BYTES + 256;
/// So many records in a row may come without data.
const MAX_EMPTY: u32 = 32;

/// Does what the bytes say. A script that begins with 0 is sent in place of a handshake. Any other number is the size of
/// the pieces in which records arrive, and steps follow that say what is in these records: a number for the kind of the
/// step, the length of its bytes, and these bytes.
pub fn tls(script: &[u8]) {
    match script.split_first() {
        None => {}
        Some((0, bytes)) => handshakes().into_iter().for_each(|handshake| greet(handshake, bytes)),
        Some((piece, steps)) => talk(usize::from(*piece), steps),
    }
}

/// Sends bytes in place of a handshake: nobody gets through without a key.
fn greet(mut handshake: Handshake, bytes: &[u8]) {
    for piece in iter::once(&[][..]).chain(bytes.chunks(97)) {
        if handshake.received(piece).is_err() {
            return;
        }
        match handshake.step() {
            Ok(step) => assert_eq!(step, Step::Exchange, "a connection without a certificate"),
            Err(error) => return assert!(!error.to_string().contains(is_obeyed), "{error}"),
        }
        assert!(handshake.outgoing().len() < 16 << 10, "a few bytes bring many");
    }
}

/// What a peer has said, and what must come of it.
#[derive(Default)]
struct Said {
    /// The data of all records that are valid, up to the first one that is not.
    data: Vec<u8>,
    /// A record was not valid, so nothing behind it counts.
    broken: bool,
    /// A message of the handshake came: whether the records behind it are valid depends on it.
    unsure: bool,
    /// So many records without data came in a row.
    empty: u32,
}

fn talk(piece: usize, mut steps: &[u8]) {
    let (mut peer, mut records) = connection();
    let (mut said, mut found) = (Said::default(), Vec::new());
    while let [kind, length, rest @ ..] = steps {
        let (bytes, rest) = rest.split_at(rest.len().min(usize::from(*length)));
        steps = rest;
        let sealed = said.step(&mut peer, *kind, bytes);
        if let Err(error) = deliver(&mut records, &sealed, piece, &mut found) {
            assert!(said.broken || said.unsure, "{error}");
            assert!(!error.to_string().contains(is_obeyed), "{error}");
            return assert!(said.data.starts_with(&found), "data that nobody has sent");
        }
    }
    assert!(said.data.starts_with(&found), "data that nobody has sent");
    if !said.broken && !said.unsure {
        assert!(found == said.data, "data is missing");
        let answer = records.sealed(&found).expect("keys that are new");
        assert!(answer.len() <= sealed_bytes(found.len()));
        assert!(peer.open(&answer) == found, "the peer reads another answer");
    }
}

impl Said {
    /// Returns the bytes of one step, and notes what they mean.
    fn step(&mut self, peer: &mut Peer, kind: u8, bytes: &[u8]) -> Vec<u8> {
        let data = |bytes: &[u8]| [bytes, &[APPLICATION_DATA]].concat();
        match kind % 8 {
            // Contents, and what they are.
            0 => self.record(peer, &data(bytes)),
            1 => self.record(peer, bytes),
            2 => self.record(peer, &data(&bytes.repeat(65))),
            3 => self.record(peer, &[bytes, &[HANDSHAKE]].concat()),
            // A record that was changed on the way.
            4 => {
                let mut sealed = peer.seal(&data(bytes));
                let [place, bit] = [0, 1].map(|at| bytes.get(at).copied().map_or(0, usize::from));
                let place = place % sealed.len();
                sealed[place] ^= 1 << (bit % 8);
                self.broken = true;
                sealed
            }
            // Bytes that nobody has sealed.
            5 => {
                self.broken |= !bytes.is_empty();
                bytes.to_vec()
            }
            // A record that comes again.
            6 => {
                let sealed = self.record(peer, &data(bytes));
                let again = [&sealed[..], &sealed].concat();
                self.broken = true;
                again
            }
            // Records in another order.
            _ => {
                let (first, second) = (peer.seal(&data(bytes)), peer.seal(&data(b"second")));
                self.broken = true;
                [second, first].concat()
            }
        }
    }

    /// Seals a record with these contents, the type behind them, and perhaps zeros behind that.
    fn record(&mut self, peer: &mut Peer, inner: &[u8]) -> Vec<u8> {
        let sealed = peer.seal(inner);
        if !self.broken && self.mean(inner).is_break() {
            self.broken = true;
        }
        sealed
    }

    /// Notes what a record means; breaks if it ends the connection.
    fn mean(&mut self, inner: &[u8]) -> ControlFlow<()> {
        let Some(end) = inner.iter().rposition(|byte| *byte != 0) else { return ControlFlow::Break(()) };
        let (data, content) = (&inner[..end], inner[end]);
        if inner.len() + TAG_BYTES > MAX_SEALED_BYTES || data.len() > MAX_RECORD_BYTES {
            return ControlFlow::Break(());
        }
        match content {
            APPLICATION_DATA if !data.is_empty() => self.empty = 0,
            APPLICATION_DATA => self.empty += 1,
            HANDSHAKE if !data.is_empty() => (self.empty, self.unsure) = (self.empty + 1, true),
            _ => return ControlFlow::Break(()),
        }
        if self.empty > MAX_EMPTY {
            return ControlFlow::Break(());
        }
        if content == APPLICATION_DATA {
            self.data.extend_from_slice(data);
        }
        ControlFlow::Continue(())
    }
}

/// Hands in bytes in pieces of so many, an even number of bytes as though they had been received elsewhere. Appends all data
/// to `found`.
fn deliver(
    records: &mut Records,
    mut sealed: &[u8],
    piece: usize,
    found: &mut Vec<u8>,
) -> Result<(), memlane_tls::TlsError> {
    while !sealed.is_empty() {
        let mut count = piece.min(sealed.len());
        if piece.is_multiple_of(2) {
            records.append(&sealed[..count]);
        } else {
            let room = records.room();
            count = count.min(room.len());
            assert!(count > 0, "no room although all data was taken");
            room[..count].copy_from_slice(&sealed[..count]);
            records.received(count);
        }
        sealed = &sealed[count..];
        assert!(records.unopened_bytes() <= MAX_SEALED_BYTES + 5 + piece);
        records.read(usize::MAX, found)?;
    }
    Ok(())
}
