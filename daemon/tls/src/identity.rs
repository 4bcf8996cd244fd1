//! Which peer a certificate belongs to.

use std::sync::Arc;

use memlane_protocol::wire::Label;
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage};

/// The rules for the certificate of one peer.
pub(crate) struct Authority {
    /// The certificate must contain this name.
    pub name: ServerName<'static>,
    /// One of these must have signed it.
    pub roots: Arc<RootCertStore>,
}

/// The reason why a certificate is not accepted as a peer's. Both hosts are told the text.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The connection came without a certificate, or with one that cannot be read.
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    /// No peer has a name that the certificate contains.
    #[error("the certificate is of {0:?}, which is the name of no [[peer]] of the called host")]
    NoPeer(String),
    /// The certificate contains the name of a peer, and is not valid for it.
    #[error(
        "the certificate names {peer}, and is not accepted: {reason}; which ca signs the certificates of {peer}?"
    )]
    NotValid {
        /// The name of the peer.
        peer: Label,
        /// What is wrong with the certificate.
        reason: String,
    },
}

/// Returns the peer that the first certificate of `chain` belongs to: its name is in it, and one of its own authorities
/// has signed it.
pub(crate) fn peer_of<'a>(
    chain: &[CertificateDer<'_>],
    peers: impl Iterator<Item = (&'a Label, &'a Authority)>,
) -> Result<Label, IdentityError> {
    let [first, intermediates @ ..] = chain else {
        return Err(IdentityError::Unreadable("there is none".into()));
    };
    let certificate =
        EndEntityCert::try_from(first).map_err(|error| IdentityError::Unreadable(error.to_string()))?;
    let mut named =
        peers.filter(|(_, authority)| certificate.verify_is_valid_for_subject_name(&authority.name).is_ok());
    let Some((peer, authority)) = named.next() else {
        let names: Vec<_> = certificate.valid_dns_names().collect();
        return Err(IdentityError::NoPeer(names.join(", ")));
    };
    match verify(&certificate, intermediates, authority, KeyUsage::client_auth()) {
        Ok(()) if named.next().is_none() => Ok(peer.clone()),
        Ok(()) => Err(IdentityError::NotValid {
            peer: peer.clone(),
            reason: "it names several peers, and must name one".into(),
        }),
        Err(reason) => Err(IdentityError::NotValid { peer: peer.clone(), reason }),
    }
}

/// Checks that the first certificate of `chain` is that of a host which was called as `peer`, now.
pub(crate) fn check_called(
    chain: &[CertificateDer<'_>],
    peer: &Label,
    authority: &Authority,
) -> Result<(), IdentityError> {
    let (first, intermediates) =
        chain.split_first().ok_or_else(|| IdentityError::Unreadable("there is none".into()))?;
    let not_valid = |reason| IdentityError::NotValid { peer: peer.clone(), reason };
    let certificate =
        EndEntityCert::try_from(first).map_err(|error| IdentityError::Unreadable(error.to_string()))?;
    let named = certificate.verify_is_valid_for_subject_name(&authority.name);
    named.map_err(|error| not_valid(error.to_string()))?;
    verify(&certificate, intermediates, authority, KeyUsage::server_auth()).map_err(not_valid)
}

/// Checks that the authority has signed a certificate for this use, and that it is valid now.
fn verify(
    certificate: &EndEntityCert<'_>,
    intermediates: &[CertificateDer<'_>],
    authority: &Authority,
    usage: KeyUsage,
) -> Result<(), String> {
    let (roots, now) = (&authority.roots.roots, UnixTime::now());
    match certificate.verify_for_usage(ALL_VERIFICATION_ALGS, roots, intermediates, now, usage, None, None) {
        Ok(_) => Ok(()),
        Err(webpki::Error::CertExpired { .. }) => Err("it has expired".into()),
        Err(webpki::Error::CertNotValidYet { .. }) => Err("it is not valid yet".into()),
        Err(error) => Err(error.to_string()),
    }
}
