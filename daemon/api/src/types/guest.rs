//! Requests about QEMU guests.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A request to start a QEMU guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// This is the text of the guest file, at most 64 KiB of TOML. Paths in it are paths on the daemon's host.
    pub definition: String,
    /// If this is true, the guest does not run, but its QEMU waits for it to arrive from another host.
    #[serde(default)]
    pub incoming: bool,
}

/// A request to attach a QEMU guest that another program started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// The guest gets this name here.
    pub name: String,
    /// This is the socket of the QEMU's monitor: a path on the daemon's host of at most 107 bytes. No other program may be
    /// connected to it, because QEMU serves one client at a time.
    pub qmp: String,
    /// If this is true, the QEMU was started with `-incoming defer` and waits for the guest.
    #[serde(default)]
    pub incoming: bool,
}
