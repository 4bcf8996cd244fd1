//! This host's certificate and key, and the authorities that sign the peers' certificates.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use memlane_protocol::wire::Label;
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{UnbufferedClientConnection, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{UnbufferedServerConnection, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig};
use webpki::EndEntityCert;
use x509_parser::parse_x509_certificate;

use crate::identity::{self, Authority, IdentityError};
use crate::verify::ShortChains;
use crate::{Established, Handshake, TlsError};

const AUTHORITY: &str = "the authority's certificate";
/// A file of certificates or keys is never longer than this.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The files of a host's keys, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFiles {
    /// The certificate of this host, and behind it the certificates that lead to the authority, if there are any.
    pub certificate: PathBuf,
    /// The private key of the certificate.
    pub key: PathBuf,
    /// The certificates of the authorities that sign the certificates of peers.
    pub ca: PathBuf,
}

/// A peer, and the authority that signs its certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAuthority {
    /// The name of the peer, which its certificate must contain as a DNS name.
    pub name: Label,
    /// The file with the certificates of the peer's own authorities. If it is `None`, those of [`KeyFiles::ca`] apply.
    pub ca: Option<PathBuf>,
}

/// The reason why keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("cannot read {what} {}: {source}{}", file.display(), advice(source))]
    Read {
        /// What the file is.
        what: &'static str,
        /// The file.
        file: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// Every user of this host may read the private key, or change a file.
    #[error(
        "every user may {what} {} (mode {mode:04o}); chmod it to 0600, and make new keys if others were here",
        file.display()
    )]
    Exposed {
        /// What every user may do with the file.
        what: &'static str,
        /// The file.
        file: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A file does not contain what it should.
    #[error("{what} {} cannot be used: {reason}", file.display())]
    Contents {
        /// What the file is.
        what: &'static str,
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The name of a host cannot stand in a certificate.
    #[error(
        "{0:?} cannot be the name of a certificate; a host that encrypts needs a name like host-a or host-a.example"
    )]
    Name(Label),
}

/// Says what to do about a file that cannot be read.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "; make the keys of this host with `memlanectl keys init` and `memlanectl keys issue`, or write \
             insecure = true where only trusted hosts share the migration networks"
        }
        io::ErrorKind::PermissionDenied => "; give the file to the user that the daemon runs as",
        _ => "",
    }
}

/// This host's certificate and key, and what it knows of its peers' certificates.
pub struct Credentials {
    expires: SystemTime,
    server: Arc<ServerConfig>,
    /// The rules for the certificate of each peer, and the settings for connections to it.
    peers: HashMap<Label, (Authority, Arc<ClientConfig>)>,
}

impl Credentials {
    /// Reads the keys of `host`, and the authorities of its peers. A certificate that is expired, or not valid yet, is
    /// accepted: peers refuse it.
    ///
    /// # Errors
    ///
    /// Fails if a file cannot be read or is not what it should be, if the key does not belong to the certificate, if the
    /// certificate is of another host, or if every user may read the key.
    pub fn load(files: &KeyFiles, host: &Label, peers: &[PeerAuthority]) -> Result<Self, CredentialsError> {
        let chain = certificates("the certificate", &files.certificate)?;
        let key = private_key(&files.key)?;
        let wrong = |reason: String| CredentialsError::Contents {
            what: "the certificate",
            file: files.certificate.clone(),
            reason,
        };
        let certificate = EndEntityCert::try_from(&chain[0]).map_err(|error| wrong(error.to_string()))?;
        let names: Vec<_> = certificate.valid_dns_names().collect();
        if certificate.verify_is_valid_for_subject_name(&server_name(host)?).is_err() {
            let names = names.join(", ");
            return Err(wrong(format!("it is of {names:?}, and this host is {host}")));
        }
        let expires = expiry_and_uses(&chain[0]).map_err(wrong)?;
        let provider = Arc::new(provider());
        let own = CertifiedKey::from_der(chain.clone(), key, &provider)
            .map_err(|error| wrong(format!("{error}; is {} its key?", files.key.display())))?;
        let own = Arc::new(SingleCertAndKey::from(own));
        let fleet = Arc::new(roots(&files.ca)?);
        let mut all = RootCertStore::clone(&fleet);
        let mut known = HashMap::new();
        for peer in peers {
            let roots = match &peer.ca {
                Some(file) => Arc::new(roots(file)?),
                None => fleet.clone(),
            };
            all.extend(roots.roots.iter().cloned());
            let failed = |reason| CredentialsError::Contents {
                what: AUTHORITY,
                file: peer.ca.clone().unwrap_or_else(|| files.ca.clone()),
                reason,
            };
            let client = client(&provider, roots.clone(), own.clone()).map_err(failed)?;
            let authority = Authority { name: server_name(&peer.name)?, roots };
            known.insert(peer.name.clone(), (authority, Arc::new(client)));
        }
        let server = server(&provider, all, own).map_err(|reason| CredentialsError::Contents {
            what: AUTHORITY,
            file: files.ca.clone(),
            reason,
        })?;
        Ok(Self { expires, server: Arc::new(server), peers: known })
    }

    /// Returns when this host's certificate expires.
    pub fn expires(&self) -> SystemTime {
        self.expires
    }

    /// Begins the handshake of a connection to this peer.
    ///
    /// # Errors
    ///
    /// Fails if there is no such peer, or if the random number generator fails.
    pub fn connect(&self, peer: &Label) -> Result<Handshake, TlsError> {
        let (authority, client) = self.peer(peer)?;
        let connection = UnbufferedClientConnection::new(client.clone(), authority.name.clone())?;
        Ok(Handshake::client(connection))
    }

    /// Begins the handshake of a connection that a host has made to this one.
    ///
    /// # Errors
    ///
    /// Fails if the random number generator fails.
    pub fn accept(&self) -> Result<Handshake, TlsError> {
        Ok(Handshake::server(UnbufferedServerConnection::new(self.server.clone())?))
    }

    /// Checks that a connection leads to the peer which was called. A handshake has looked at the certificate already,
    /// unless it was shortened: then the certificate is looked at here.
    ///
    /// # Errors
    ///
    /// Fails if the certificate is that of another host, or is not valid now under the authority of that peer.
    pub fn check_called(&self, peer: &Label, established: &Established) -> Result<(), TlsError> {
        if !established.resumed {
            return Ok(());
        }
        let (authority, _) = self.peer(peer)?;
        identity::check_called(&established.certificates, peer, authority)
            .map_err(|error| TlsError::Certificate(error.to_string()))
    }

    fn peer(&self, name: &Label) -> Result<&(Authority, Arc<ClientConfig>), TlsError> {
        self.peers.get(name).ok_or_else(|| TlsError::NoPeer(name.clone()))
    }

    /// Returns the settings for connections to a peer, for a test with rustls at this end.
    #[cfg(test)]
    pub(crate) fn client_settings(&self, peer: &Label) -> Arc<ClientConfig> {
        self.peers[peer].1.clone()
    }

    /// Returns the peer whose certificate this is, the first of `chain`.
    ///
    /// # Errors
    ///
    /// Fails if the certificate is of no peer, or not valid now under the authority of its peer.
    pub fn peer_of(&self, chain: &[CertificateDer<'_>]) -> Result<Label, IdentityError> {
        let peers = self.peers.iter().map(|(name, (authority, _))| (name, authority));
        identity::peer_of(chain, peers)
    }
}

/// Returns ring's cryptography, with AES-128-GCM first: processors with instructions for AES seal more than twice as
/// much with it in a second as with ChaCha20.
fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider.cipher_suites.retain(|suite| suite.version().version == TLS13.version);
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

fn client(
    provider: &Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    own: Arc<SingleCertAndKey>,
) -> Result<ClientConfig, String> {
    let verifier: Arc<dyn ServerCertVerifier> =
        WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|error| error.to_string())?;
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites of TLS 1.3")
        // As every verifier of one's own is said to be; this one refuses more than webpki's.
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ShortChains(verifier)))
        .with_client_cert_resolver(own);
    config.enable_secret_extraction = true;
    Ok(config)
}

fn server(
    provider: &Arc<CryptoProvider>,
    roots: RootCertStore,
    own: Arc<SingleCertAndKey>,
) -> Result<ServerConfig, String> {
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|error| error.to_string())?;
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites of TLS 1.3")
        .with_client_cert_verifier(Arc::new(ShortChains(verifier)))
        .with_cert_resolver(own);
    config.enable_secret_extraction = true;
    Ok(config)
}

fn server_name(host: &Label) -> Result<ServerName<'static>, CredentialsError> {
    match ServerName::try_from(host.to_string()) {
        Ok(name @ ServerName::DnsName(_)) => Ok(name),
        _ => Err(CredentialsError::Name(host.clone())),
    }
}

fn roots(file: &Path) -> Result<RootCertStore, CredentialsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(AUTHORITY, file)? {
        roots.add(certificate).map_err(|error| CredentialsError::Contents {
            what: AUTHORITY,
            file: file.to_owned(),
            reason: error.to_string(),
        })?;
    }
    Ok(roots)
}

fn certificates(what: &'static str, file: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let bytes = read(what, file)?;
    let wrong = |reason: String| CredentialsError::Contents { what, file: file.to_owned(), reason };
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<_, _>>()
        .map_err(|error| wrong(error.to_string()))?;
    if certificates.is_empty() {
        return Err(wrong("it contains no certificate in PEM".into()));
    }
    Ok(certificates)
}

fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, CredentialsError> {
    const WHAT: &str = "the private key";
    const OTHERS_READ: u32 = 0o004;
    let bytes = read(WHAT, file)?;
    check_mode(WHAT, file, "read", OTHERS_READ)?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| CredentialsError::Contents {
        what: WHAT,
        file: file.to_owned(),
        reason: error.to_string(),
    })
}

fn read(what: &'static str, file: &Path) -> Result<Vec<u8>, CredentialsError> {
    const OTHERS_WRITE: u32 = 0o002;
    let mut bytes = Vec::new();
    let read = File::open(file).and_then(|open| open.take(MAX_FILE_BYTES).read_to_end(&mut bytes));
    read.map_err(|source| CredentialsError::Read { what, file: file.to_owned(), source })?;
    check_mode(what, file, "change", OTHERS_WRITE)?;
    Ok(bytes)
}

/// Checks that not every user may do something with a file.
fn check_mode(
    what: &'static str,
    file: &Path,
    doing: &'static str,
    others: u32,
) -> Result<(), CredentialsError> {
    let failed = |source| CredentialsError::Read { what, file: file.to_owned(), source };
    let mode = fs::metadata(file).map_err(failed)?.permissions().mode() & 0o7777;
    match mode & others {
        0 => Ok(()),
        _ => Err(CredentialsError::Exposed { what: doing, file: file.to_owned(), mode }),
    }
}

/// Returns when a certificate expires, and checks that it may be used by a host that calls and by one that is called.
fn expiry_and_uses(certificate: &CertificateDer<'_>) -> Result<SystemTime, String> {
    let (_, parsed) = parse_x509_certificate(certificate).map_err(|error| error.to_string())?;
    let uses = parsed.extended_key_usage().map_err(|error| error.to_string())?;
    if uses.is_some_and(|uses| !(uses.value.any || uses.value.server_auth && uses.value.client_auth)) {
        return Err("it must be issued for both uses, serverAuth and clientAuth".into());
    }
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}
