//! Scripts of what comes over an encrypted connection.

use std::sync::Arc;

use rustls::crypto::{
    ActiveKeyExchange, CryptoProvider, GetRandomFailed, SecureRandom, SharedSecret, SupportedKxGroup,
};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, Error, NamedGroup, RootCertStore};

use super::{Seeds, named};

/// A step of a script: the number of its kind, and its bytes.
type Step<'a> = (u8, &'a [u8]);

const DATA: u8 = 0;
const INNER: u8 = 1;
const LONG: u8 = 2;
const HANDSHAKE: u8 = 3;
const CHANGED: u8 = 4;
const UNSEALED: u8 = 5;
const AGAIN: u8 = 6;
const DISORDER: u8 = 7;

fn script(piece: u8, steps: &[Step<'_>]) -> Vec<u8> {
    let steps = steps.iter().flat_map(|(kind, bytes)| [&[*kind, bytes.len() as u8], *bytes].concat());
    [piece].into_iter().chain(steps).collect()
}

pub(super) fn tls() -> Seeds {
    named([
        ("nothing", script(255, &[])),
        ("data", script(255, &[(DATA, b"hello"), (DATA, b""), (DATA, b"web1")])),
        ("data-in-pieces", script(3, &[(LONG, &[7; 200]), (DATA, b"end")])),
        ("data-appended", script(64, &[(LONG, &[7; 252]), (DATA, b"end")])),
        ("too-long", script(255, &[(DATA, b"before"), (LONG, &[7; 254])])),
        ("padded", script(255, &[(INNER, b"data\x17\0\0\0\0\0\0\0\0"), (DATA, b"more")])),
        ("no-type", script(255, &[(INNER, &[0; 20])])),
        ("closed", script(255, &[(DATA, b"bye"), (INNER, b"\x01\x00\x15")])),
        ("alert", script(255, &[(INNER, b"\x02\x28\x15")])),
        ("key-update", script(255, &[(DATA, b"old"), (HANDSHAKE, &[24, 0, 0, 1, 0]), (DATA, b"not new")])),
        ("key-update-in-pieces", script(5, &[(HANDSHAKE, &[24, 0]), (HANDSHAKE, &[0, 1, 1])])),
        ("ticket", script(255, &[(HANDSHAKE, &[4, 0, 0, 2, 0, 0])])),
        ("changed", script(255, &[(DATA, b"whole"), (CHANGED, b"\x09\x03changed"), (DATA, b"behind")])),
        ("changed-length", script(255, &[(CHANGED, b"\x04\x01changed"), (DATA, b"behind")])),
        ("unsealed", script(255, &[(UNSEALED, b"\x17\x03\x03\x00\x20")])),
        ("again", script(255, &[(AGAIN, b"once")])),
        ("disorder", script(255, &[(DISORDER, b"first")])),
        ("plain-alert", script(255, &[(UNSEALED, b"\x15\x03\x03\x00\x02\x02\x28")])),
        ("greeting", [&[0][..], &greeting()].concat()),
        ("greeting-cut", [&[0][..], &greeting()[..40]].concat()),
        ("no-greeting", b"\0MLN\0\x03\0\x03\0\x01\0\0\0".to_vec()),
    ])
}

/// Returns the first message of a caller, a ClientHello.
fn greeting() -> Vec<u8> {
    let provider = CryptoProvider {
        kx_groups: vec![&Fixed],
        secure_random: &Fixed,
        ..rustls::crypto::ring::default_provider()
    };
    let settings = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let mut caller = ClientConnection::new(Arc::new(settings), "host-a".try_into().unwrap()).unwrap();
    let mut wire = Vec::new();
    caller.write_tls(&mut wire).unwrap();
    wire
}

/// The numbers of a greeting that are the same each time, in place of random ones.
#[derive(Debug)]
struct Fixed;

impl SecureRandom for Fixed {
    fn fill(&self, bytes: &mut [u8]) -> Result<(), GetRandomFailed> {
        bytes.fill(7);
        Ok(())
    }
}

impl SupportedKxGroup for Fixed {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        Ok(Box::new(Self))
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::X25519
    }
}

impl ActiveKeyExchange for Fixed {
    fn complete(self: Box<Self>, _: &[u8]) -> Result<SharedSecret, Error> {
        Err(Error::General("only the greeting is sent".to_owned()))
    }

    fn pub_key(&self) -> &[u8] {
        &[9; 32]
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::X25519
    }
}
