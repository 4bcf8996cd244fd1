//! The reasons why a connection between hosts fails in TLS.

use memlane_protocol::wire::Label;
use rustls::{AlertDescription, CertificateError, Error};

/// The reason why a handshake failed, or why a record cannot be sealed or opened.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// This host does not accept the other one's certificate.
    #[error("the certificate of the other host is not accepted: {0}")]
    Certificate(String),
    /// The host that is to be called is not known.
    #[error("{0} is no [[peer]] of this host")]
    NoPeer(Label),
    /// The handshake is not valid.
    #[error("the TLS handshake failed: {0}")]
    Handshake(Error),
    /// The other host has ended the connection and named a reason.
    #[error("the other host ended the encrypted connection: {}", explain(*.0))]
    Alert(AlertDescription),
    /// The other host has ended the connection as TLS demands it.
    #[error("the other host closed the encrypted connection")]
    Closed,
    /// A record was changed on the way, or does not belong to this connection.
    #[error("a record does not open: it was changed on the way, or belongs to another connection")]
    Open,
    /// The other host sent something that TLS does not allow here.
    #[error("the other host broke the rules of TLS: {0}")]
    Protocol(&'static str),
    /// No new keys can be made for the connection, whose keys have sealed as much as they may.
    #[error("cannot change the keys of the encrypted connection: {0}")]
    Keys(Error),
}

impl From<Error> for TlsError {
    fn from(error: Error) -> Self {
        match error {
            Error::AlertReceived(alert) => Self::Alert(alert),
            Error::InvalidCertificate(error) => Self::Certificate(reason(error)),
            error => Self::Handshake(error),
        }
    }
}

/// Says what is wrong with a certificate. The text does not name the time: what is told again and again is told alike.
fn reason(error: CertificateError) -> String {
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "it has expired".to_owned(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it is not valid yet; look at the clocks of both hosts".to_owned()
        }
        CertificateError::UnknownIssuer => "no authority that is known here has signed it".to_owned(),
        error => error.to_string(),
    }
}

/// Returns what an alert (RFC 8446, section 6.2) says of this host's certificate, in words for an operator.
fn explain(alert: AlertDescription) -> String {
    let reason = match alert {
        AlertDescription::UnknownCA => {
            "it does not know the authority that signed this host's certificate; compare the ca files of both hosts"
        }
        AlertDescription::CertificateExpired => {
            "there this host's certificate is expired, or not valid yet; look at it with `memlanectl keys show`, and \
             at the clocks of both hosts"
        }
        AlertDescription::BadCertificate | AlertDescription::UnsupportedCertificate => {
            "it does not accept this host's certificate; look at it with `memlanectl keys show`"
        }
        AlertDescription::CertificateRequired => "it asks for a certificate, and this host sent none",
        AlertDescription::InsufficientSecurity => {
            "it is configured as insecure, and takes connections only that are not encrypted"
        }
        other => return format!("alert {other:?}"),
    };
    reason.to_owned()
}
