//! The calls of the API, and who may make them.

use super::Role;

/// A call of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Status,
    Ports,
    Peers,
    Guests,
    Launch,
    Attach,
    Detach,
    Check,
    Migrations,
    Migrate,
    Migration,
    Cancel,
    Abandon,
    Resolve,
    Events,
    OpenApi,
    Metrics,
}

impl Call {
    /// Returns the role that may make this call. A dry run is for operators, though it changes nothing: this host and
    /// another one do all the work of a preflight for it, and a guest's VMM is asked about its devices.
    pub(super) fn needs(self) -> Role {
        match self {
            Self::Status
            | Self::Ports
            | Self::Peers
            | Self::Guests
            | Self::Migrations
            | Self::Migration
            | Self::Events
            | Self::OpenApi
            | Self::Metrics => Role::Viewer,
            Self::Launch
            | Self::Attach
            | Self::Detach
            | Self::Check
            | Self::Migrate
            | Self::Cancel
            | Self::Abandon
            | Self::Resolve => Role::Operator,
        }
    }
}
