//! A peer with a certificate that is valid, and with records of its own making.

use std::fs;
use std::sync::{Arc, OnceLock};

use memlane_keys::{Authority, CERTIFICATE, KEY, Validity};
use memlane_tls::{Credentials, Handshake, KeyFiles, PeerAuthority, Records, Step};
use ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey,
};
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, ConnectionTrafficSecrets, RootCertStore};

use super::{APPLICATION_DATA, TAG_BYTES};

const HEADER_BYTES: usize = 5;
/// The name of the host that is called.
const CALLED: &str = "host-a";
/// The name of the peer that calls it.
const PEER: &str = "host-b";

/// The peer's end of a connection.
pub(super) struct Peer {
    sealing: Key,
    opening: Key,
}

/// The handshakes that the host takes part in: one as the called host, and one as the caller.
pub(super) fn handshakes() -> [Handshake; 2] {
    let host = &hosts().host;
    let peer = PEER.parse().expect("a name");
    [host.accept().expect("random numbers"), host.connect(&peer).expect("a peer that is known")]
}

/// Makes a connection from the peer to the host, and returns both ends.
pub(super) fn connection() -> (Peer, Box<Records>) {
    let Hosts { host, settings } = hosts();
    let mut called = host.accept().expect("random numbers");
    let name = CALLED.try_into().expect("a name");
    let mut caller = ClientConnection::new(settings.clone(), name).expect("random numbers");
    loop {
        let mut wire = Vec::new();
        while caller.wants_write() {
            caller.write_tls(&mut wire).expect("memory takes all");
        }
        called.received(&wire).expect("a handshake is short");
        let step = called.step().expect("a certificate that is valid");
        let answer = called.outgoing();
        let mut rest = &answer[..];
        while !rest.is_empty() {
            caller.read_tls(&mut rest).expect("memory gives all");
            caller.process_new_packets().expect("a host that keeps the rules");
        }
        if step == Step::Done && !caller.is_handshaking() {
            break;
        }
    }
    let records = called.finish().expect("it is done").records;
    let secrets = caller.dangerous_extract_secrets().expect("it is done");
    (Peer { sealing: Key::new(secrets.tx), opening: Key::new(secrets.rx) }, records)
}

impl Peer {
    /// Seals a record with these contents, which have their type and zeros at the end.
    pub(super) fn seal(&mut self, inner: &[u8]) -> Vec<u8> {
        let [high, low] = ((inner.len() + TAG_BYTES) as u16).to_be_bytes();
        let header = [APPLICATION_DATA, 3, 3, high, low];
        let mut sealed = inner.to_vec();
        let nonce = self.sealing.next();
        let done = self.sealing.key.seal_in_place_append_tag(nonce, Aad::from(header), &mut sealed);
        done.expect("a record is far below the length that a cipher seals");
        [&header[..], &sealed].concat()
    }

    /// Opens records that the host has sealed, which must all be data.
    pub(super) fn open(&mut self, mut sealed: &[u8]) -> Vec<u8> {
        let mut data = Vec::new();
        while let Some((header, rest)) = sealed.split_first_chunk::<HEADER_BYTES>() {
            let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
            let (body, rest) = rest.split_at(length);
            sealed = rest;
            let (nonce, mut body) = (self.opening.next(), body.to_vec());
            let opened = self.opening.key.open_in_place(nonce, Aad::from(*header), &mut body);
            let (content, part) = opened.expect("it opens").split_last().expect("a type");
            assert_eq!(*content, APPLICATION_DATA);
            data.extend_from_slice(part);
        }
        data
    }
}

struct Key {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl Key {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Self {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            other => panic!("no cipher of TLS 1.3: {:?}", std::mem::discriminant(other)),
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).expect("a key of its cipher's length");
        let iv: &[u8] = iv.as_ref();
        let iv = iv.try_into().expect("a nonce of its cipher's length");
        Self { key: LessSafeKey::new(key), iv, sequence }
    }

    /// Returns the nonce of the next record (RFC 8446, section 5.3).
    fn next(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, number) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

struct Hosts {
    host: Credentials,
    settings: Arc<ClientConfig>,
}

/// Returns the keys of both hosts, which are made once.
fn hosts() -> &'static Hosts {
    static HOSTS: OnceLock<Hosts> = OnceLock::new();
    HOSTS.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory for keys");
        let authority = Authority::new("fuzz").expect("random numbers");
        for host in [CALLED, PEER] {
            let directory = directory.path().join(host);
            authority.issue_to(&directory, host, Validity::days(3650)).expect("keys");
        }
        let files = KeyFiles {
            certificate: directory.path().join(CALLED).join(CERTIFICATE),
            key: directory.path().join(CALLED).join(KEY),
            ca: directory.path().join(CALLED).join(memlane_keys::CA),
        };
        let known = [PeerAuthority { name: PEER.parse().expect("a name"), ca: None }];
        let host = Credentials::load(&files, &CALLED.parse().expect("a name"), &known);
        let read = |file| fs::read(directory.path().join(PEER).join(file)).expect("a file that was made");
        let settings = settings(authority.certificate().as_bytes(), &read(CERTIFICATE), &read(KEY));
        Hosts { host: host.expect("keys that fit"), settings: Arc::new(settings) }
    })
}

/// Returns rustls's settings for the peer. Each connection is made anew, so that none depends on those before.
fn settings(ca: &[u8], certificate: &[u8], key: &[u8]) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca).expect("PEM")).expect("an authority");
    let chain = vec![CertificateDer::from_pem_slice(certificate).expect("PEM")];
    let key = PrivateKeyDer::from_pem_slice(key).expect("PEM");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let settings = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .expect("ring has suites of TLS 1.3")
        .with_root_certificates(roots);
    let mut settings = settings.with_client_auth_cert(chain, key).expect("a key that fits");
    settings.enable_secret_extraction = true;
    settings.resumption = Resumption::disabled();
    settings
}
