//! Which migration a guest belongs to.

use crate::wire::text::Label;

/// The identity of one migration, on both hosts and in their journals.
pub type MigrationId = [u8; 16];

/// A bond says to which migration a guest belongs that waits to be told whether it is to run.
///
/// A VMM remembers it for a daemon whose journal may have lost it. What a VMM says of itself is a claim, which the daemon
/// compares with what it knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bond {
    /// The migration; it is never all zeros.
    pub migration: MigrationId,
    /// The other host.
    pub peer: Label,
    /// Whether part of the memory of a guest that was loaded has not come, and is to be fetched.
    pub fetching: bool,
}
