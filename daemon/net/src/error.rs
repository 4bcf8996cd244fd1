//! The reasons why a connection to another host cannot be made, or has ended.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use memlane_protocol::resumption::ResumptionError;
use memlane_protocol::wire::{Label, WireError};
use memlane_tls::TlsError;

/// The reason why a connection to another host could not be made, or has ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The connection could not be made.
    #[error(
        "cannot connect to {address}: {source}; is memlaned running there, the port open, and this host's address \
         that of a [[peer]] there?"
    )]
    Connect {
        /// This is the address that was tried.
        address: SocketAddr,
        /// This is what the kernel said.
        source: io::Error,
    },
    /// The two hosts do not accept each other's certificates, or cannot agree how to encrypt.
    #[error("cannot make an encrypted connection to {address}: {source}")]
    Encryption {
        /// This is the address of the other host.
        address: SocketAddr,
        /// This is what went wrong.
        source: TlsError,
    },
    /// The other side refused the connection.
    #[error("{address} refuses the connection: {reason}")]
    Refused {
        /// This is the address of the host that refused.
        address: SocketAddr,
        /// This is the reason in its own words.
        reason: String,
    },
    /// This host has refused the connection.
    #[error("refused {host}: {reason}")]
    TurnedAway {
        /// This is the host that the caller says it is.
        host: Label,
        /// This is the reason, as the caller was told.
        reason: String,
    },
    /// The other side closed the connection.
    #[error("the other host closed the control connection")]
    Closed,
    /// The other host has as many connections to this one as a host may have.
    #[error("the other host has too many control connections to this one")]
    Crowd,
    /// The other side has said nothing for too long.
    #[error("the other host has not answered for {0:.1?}")]
    Silent(Duration),
    /// The other side is there, and has taken nothing for too long.
    #[error("the other host has not taken a message for {0:.0?}")]
    Stuck(Duration),
    /// The connection broke.
    #[error("the control connection broke: {0}")]
    Io(#[from] io::Error),
    /// The connection cannot be encrypted, or not any longer.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The other side encrypts, and this host does not.
    #[error(
        "the other host encrypts, and this one is configured as insecure; give this host keys (`memlanectl keys`), and \
         take insecure = true out of its configuration"
    )]
    EncryptedThere,
    /// The other side does not keep to the protocol.
    #[error("the other host broke the protocol: {0}")]
    Protocol(#[from] WireError),
    /// The other side miscounts the messages of a connection that can be resumed.
    #[error("the other host broke the protocol: {0}")]
    Resumption(#[from] ResumptionError),
    /// The other side sent something that does not belong here.
    #[error("the other host sent {found} where {expected} was due")]
    Unexpected {
        /// This was due.
        expected: &'static str,
        /// This came instead.
        found: &'static str,
    },
}

impl LinkError {
    /// Tells whether the network or the other daemon is gone, which another connection may mend.
    pub fn is_loss(&self) -> bool {
        matches!(self, Self::Closed | Self::Silent(_) | Self::Stuck(_) | Self::Io(_))
    }
}
