//! What certificates say, for people.

use std::path::{Path, PathBuf};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::Serialize;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;

use crate::{CA, CERTIFICATE, KeysError, files};

/// What one certificate says.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Description {
    /// The certificate is in this file.
    pub file: PathBuf,
    /// The hosts that the certificate is of. There are none in that of an authority.
    pub hosts: Vec<String>,
    /// The name of the certificate.
    pub subject: String,
    /// The name of the authority that signed it.
    pub issuer: String,
    /// Whether it is the certificate of an authority.
    pub authority: bool,
    /// The certificate is valid from this moment on, in seconds since 1970 (UTC).
    pub valid_from_seconds: i64,
    /// The certificate is valid until this moment, in seconds since 1970 (UTC).
    pub valid_until_seconds: i64,
    /// The SHA-256 of the certificate, in hexadecimal digits.
    pub sha256: String,
    /// Whether an authority in the file `ca.pem` beside it has signed it. It is `None` if there is no such file.
    pub signed_by_ca: Option<bool>,
}

/// Describes the certificates in a file, or in the files of a host's or an authority's directory.
///
/// # Errors
///
/// Fails if there is no certificate, or if a file cannot be read.
pub fn describe(path: &Path) -> Result<Vec<Description>, KeysError> {
    let files = match path.is_dir() {
        true => [CERTIFICATE, CA].iter().map(|name| path.join(name)).filter(|file| file.exists()).collect(),
        false => vec![path.to_owned()],
    };
    if files.is_empty() {
        let reason = format!("there is neither {CERTIFICATE} nor {CA} in it");
        return Err(KeysError::Contents { path: path.to_owned(), reason });
    }
    let mut all = Vec::new();
    for file in files {
        let authorities = file.parent().map(|directory| directory.join(CA)).filter(|ca| ca.exists());
        let authorities = authorities.map(|ca| certificates(&ca)).transpose()?;
        for der in certificates(&file)? {
            all.push(describe_one(&file, &der, authorities.as_deref())?);
        }
    }
    Ok(all)
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, KeysError> {
    let wrong = |reason: String| KeysError::Contents { path: file.to_owned(), reason };
    let text = files::read(file)?;
    let all: Vec<_> = CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| wrong(error.to_string()))?;
    if all.is_empty() { Err(wrong("it contains no certificate in PEM".into())) } else { Ok(all) }
}

fn describe_one(
    file: &Path,
    der: &CertificateDer<'_>,
    authorities: Option<&[CertificateDer<'_>]>,
) -> Result<Description, KeysError> {
    let wrong = |reason: String| KeysError::Contents { path: file.to_owned(), reason };
    let (_, certificate) = parse_x509_certificate(der).map_err(|error| wrong(error.to_string()))?;
    let signed_by = |authority: &CertificateDer<'_>| {
        let authority = parse_x509_certificate(authority);
        authority
            .is_ok_and(|(_, authority)| certificate.verify_signature(Some(authority.public_key())).is_ok())
    };
    let digest = ring::digest::digest(&ring::digest::SHA256, der);
    Ok(Description {
        file: file.to_owned(),
        hosts: hosts(&certificate),
        subject: certificate.subject().to_string(),
        issuer: certificate.issuer().to_string(),
        authority: certificate.is_ca(),
        valid_from_seconds: certificate.validity().not_before.timestamp(),
        valid_until_seconds: certificate.validity().not_after.timestamp(),
        sha256: digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect(),
        signed_by_ca: authorities.map(|authorities| authorities.iter().any(signed_by)),
    })
}

fn hosts(certificate: &X509Certificate<'_>) -> Vec<String> {
    let names = certificate.subject_alternative_name().ok().flatten();
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let host = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(host) => Some((*host).to_owned()),
        _ => None,
    };
    names.iter().filter_map(host).collect()
}
