//! A small private certificate authority: the keys of a fleet's hosts, for people who have no authority of their own.
//!
//! The authority is a directory with two files. Each host gets a directory with three: its certificate, its key, and the
//! certificate of the authority, under the names that the daemon looks for.
#![forbid(unsafe_code)]

mod authority;
mod description;
mod error;
mod files;

pub use authority::{Authority, Validity};
pub use description::{Description, describe};
pub use error::KeysError;

/// The file with the certificate of the authority, at the authority and at each host.
pub const CA: &str = "ca.pem";
/// The file with the key of the authority.
pub const CA_KEY: &str = "ca.key";
/// The file with the certificate of a host.
pub const CERTIFICATE: &str = "host.pem";
/// The file with the key of a host.
pub const KEY: &str = "host.key";

#[cfg(test)]
mod tests;
