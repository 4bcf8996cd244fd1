//! What is asked about QEMU guests.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Start a QEMU guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// Text of the guest file, at most 64 KiB of TOML. Paths in it are those of the daemon's host.
    pub definition: String,
    /// The guest does not run, but waits to arrive from another host.
    #[serde(default)]
    pub incoming: bool,
}

/// Take a QEMU guest that others started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// Name that the guest is to have here.
    pub name: String,
    /// Socket of its QEMU's monitor: a path on the daemon's host of at most 107 bytes. Nobody
    /// else may be connected to it, since QEMU serves one client at a time.
    pub qmp: String,
    /// Its QEMU was started with `-incoming defer` and waits for the guest.
    #[serde(default)]
    pub incoming: bool,
}
