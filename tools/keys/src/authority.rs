//! An authority, and the certificates that it signs.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SerialNumber,
};
use ring::rand::{SecureRandom, SystemRandom};
use time::OffsetDateTime;

use crate::{CA, CA_KEY, CERTIFICATE, KEY, KeysError, files};

/// The authority's own certificate is valid for so many days: ten years.
const AUTHORITY_DAYS: u64 = 3653;
/// Certificates are valid from so long ago, for hosts whose clocks are behind.
const BEHIND: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// An authority: its certificate, and the key that signs with it.
pub struct Authority {
    certificate: String,
    key: String,
    issuer: Issuer<'static, KeyPair>,
}

/// The time for which a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// The certificate is valid from this moment on.
    pub from: SystemTime,
    /// The certificate is valid until this moment.
    pub until: SystemTime,
}

impl Validity {
    /// Returns the time from now on for so many days. It begins an hour ago, for hosts whose clocks are behind.
    pub fn days(days: u64) -> Self {
        let now = SystemTime::now();
        Self { from: now - BEHIND, until: now + DAY * u32::try_from(days).unwrap_or(u32::MAX) }
    }
}

impl Authority {
    /// Makes a new authority, whose certificate bears `name`.
    ///
    /// # Errors
    ///
    /// Fails if the random number generator fails.
    pub fn new(name: &str) -> Result<Self, KeysError> {
        let mut params = params(Vec::new(), name, Validity::days(AUTHORITY_DAYS))?;
        // It signs the certificates of hosts, and no other authorities.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pair = KeyPair::generate()?;
        let (certificate, key) = (params.self_signed(&pair)?.pem(), pair.serialize_pem());
        Ok(Self { issuer: Issuer::new(params, pair), certificate, key })
    }

    /// Reads the authority in a directory.
    ///
    /// # Errors
    ///
    /// Fails if there is none, or if its files cannot be read or used.
    pub fn open(directory: &Path) -> Result<Self, KeysError> {
        let (certificate_path, key_path) = (directory.join(CA), directory.join(CA_KEY));
        if !key_path.exists() && !certificate_path.exists() {
            return Err(KeysError::NoAuthority(directory.to_owned()));
        }
        let (certificate, key) = (files::read(&certificate_path)?, files::read(&key_path)?);
        let wrong = |path: &Path| {
            let path = path.to_owned();
            move |error: rcgen::Error| KeysError::Contents { path, reason: error.to_string() }
        };
        let pair = KeyPair::from_pem(&key).map_err(wrong(&key_path))?;
        let issuer = Issuer::from_ca_cert_pem(&certificate, pair).map_err(wrong(&certificate_path))?;
        Ok(Self { certificate, key, issuer })
    }

    /// Returns the authority's certificate in PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Writes the authority to a directory, which is made if need be. Nothing that is there is replaced.
    ///
    /// # Errors
    ///
    /// Fails if there is an authority, or if a file cannot be made.
    pub fn save(&self, directory: &Path) -> Result<(), KeysError> {
        files::make_directory(directory)?;
        files::check_free(directory, &[CA, CA_KEY])?;
        files::make(&directory.join(CA_KEY), &self.key)?;
        files::make(&directory.join(CA), &self.certificate)
    }

    /// Makes a key and a certificate for a host, and returns both in PEM: the certificate first.
    ///
    /// # Errors
    ///
    /// Fails if the name cannot stand in a certificate, or if the random number generator fails.
    pub fn issue(&self, host: &str, validity: Validity) -> Result<(String, String), KeysError> {
        check_name(host)?;
        let mut params = params(vec![host.to_owned()], host, validity)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let pair = KeyPair::generate()?;
        let certificate = params.signed_by(&pair, &self.issuer)?.pem();
        Ok((certificate, pair.serialize_pem()))
    }

    /// Makes the keys of a host, and writes them to a directory, which is made if need be: the host's certificate and key,
    /// and the certificate of the authority. Nothing that is there is replaced.
    ///
    /// # Errors
    ///
    /// Fails if the name cannot stand in a certificate, or if a file is there or cannot be made.
    pub fn issue_to(&self, directory: &Path, host: &str, validity: Validity) -> Result<(), KeysError> {
        let (certificate, key) = self.issue(host, validity)?;
        files::make_directory(directory)?;
        files::check_free(directory, &[CA, CERTIFICATE, KEY])?;
        files::make(&directory.join(KEY), &key)?;
        files::make(&directory.join(CERTIFICATE), &certificate)?;
        files::make(&directory.join(CA), &self.certificate)
    }
}

fn params(names: Vec<String>, common_name: &str, validity: Validity) -> Result<CertificateParams, KeysError> {
    let mut serial = [0; 16];
    // Only for want of random bytes, of which the key will not have any either.
    SystemRandom::new().fill(&mut serial).map_err(|_| rcgen::Error::RingUnspecified)?;
    serial[0] &= 0x7f; // a positive number
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = OffsetDateTime::from(validity.from);
    params.not_after = OffsetDateTime::from(validity.until);
    Ok(params)
}

/// Checks that a certificate can be of this name, as the daemon reads it.
fn check_name(host: &str) -> Result<(), KeysError> {
    use rustls_pki_types::DnsName;
    match DnsName::try_from(host) {
        Ok(_) => Ok(()),
        Err(_) => Err(KeysError::Name(host.to_owned())),
    }
}
