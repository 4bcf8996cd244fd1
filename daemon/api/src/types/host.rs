//! What a host has.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A daemon and its host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Name of the host.
    pub host: String,
    /// Version of the daemon.
    pub version: String,
    /// Versions of the protocol between daemons that it speaks, oldest and newest.
    pub protocol_versions: [u16; 2],
    /// Seconds since the daemon started.
    pub uptime_seconds: f64,
    /// Guests whose VMM is attached.
    pub guests: usize,
    /// Migrations under way, in both directions.
    pub migrations: usize,
    /// True while nothing between daemons is encrypted.
    pub insecure: bool,
    /// Release of the running kernel.
    pub kernel: String,
    /// Whether the host offers KVM.
    pub kvm: bool,
}

/// A network port lent to migrations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortInfo {
    /// Name of the port.
    pub name: String,
    /// Network interface that holds the address.
    pub interface: Option<String>,
    /// IP address that lanes are bound to.
    pub address: String,
    /// Speed, as configured or as the interface reports it.
    pub speed_bits_per_second: Option<u64>,
    /// Whether the interface has a carrier and the address.
    pub up: bool,
    /// Lanes that a migration opens on this port.
    pub lanes: u16,
    /// Bytes that lanes have sent since the daemon started.
    pub bytes_sent: u64,
    /// Bytes that lanes have received since the daemon started.
    pub bytes_received: u64,
}

/// Another host that guests may move to and come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PeerInfo {
    /// Name of the host.
    pub name: String,
    /// Address and port of its daemon's control connection.
    pub control: String,
}

/// A guest whose VMM is attached to the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestInfo {
    /// Name of the guest.
    pub name: String,
    /// Program that runs it.
    pub vmm: String,
    /// Machine type that its QEMU gives it, such as `pc-q35-7.2`; `null` of other VMMs.
    pub machine: Option<String>,
    /// Number of virtual CPUs.
    pub vcpus: u16,
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// How its dirty pages are found: `log`, `ring` or `pagemap`.
    pub tracker: String,
    /// What it is doing.
    pub standing: Standing,
    /// Network interfaces that are announced after a migration.
    pub nics: Vec<NicInfo>,
    /// Process of the VMM.
    pub pid: Option<u32>,
    /// Socket of its QEMU's monitor; `null` of other VMMs.
    pub qmp: Option<String>,
}

/// A guest's network interface.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NicInfo {
    /// Hardware address, as in `52:54:00:12:34:56`.
    pub mac: String,
    /// Network that it is plugged into.
    pub network: String,
}

/// What a guest is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It runs here.
    Running,
    /// Its VMM waits for a guest to arrive.
    Incoming,
    /// A migration of it is under way.
    Migrating,
    /// It was given up for a migration and does not run here.
    Relinquished,
    /// It has arrived and waits for permission to run.
    Loaded,
    /// Part of its memory was at another host and will never come, and its VMM could not be ended:
    /// it hangs where it touches that.
    Lost,
}

impl Standing {
    /// As it stands in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Incoming => "incoming",
            Self::Migrating => "migrating",
            Self::Relinquished => "relinquished",
            Self::Loaded => "loaded",
            Self::Lost => "lost",
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
