//! How daemons know each other, and how the bytes between them stay secret and whole: TLS 1.3 (RFC 8446) with
//! certificates at both ends.
//!
//! - [`Credentials`] are this host's certificate, its key, and the authorities that sign the peers' certificates. A peer
//!   is its certificate: the host name in it, signed by the authority of that peer.
//! - [`Handshake`] makes the connection. It takes and gives bytes, and leaves it to the caller to move them.
//! - [`Records`] seal and open what then flows, without rustls's own copies, straight between the caller's buffers.
//!
//! This crate does no input and output, except that [`Credentials::load`] reads files.
#![forbid(unsafe_code)]

mod credentials;
mod error;
mod handshake;
mod identity;
mod records;
mod verify;

pub use credentials::{Credentials, CredentialsError, KeyFiles, PeerAuthority};
pub use error::TlsError;
pub use handshake::{Established, Handshake, Step};
pub use identity::IdentityError;
pub use records::{MAX_RECORD_BYTES, Records, sealed_bytes};

#[cfg(test)]
mod tests;
