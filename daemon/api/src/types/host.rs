//! The daemon, its ports, peers and guests.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A daemon and its host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// This is the name of the host.
    pub host: String,
    /// This is the version of the daemon.
    pub version: String,
    /// The daemon speaks these versions of the protocol between daemons: from the oldest to the newest.
    pub protocol_versions: [u16; 2],
    /// The daemon started this many seconds ago.
    pub uptime_seconds: f64,
    /// This many guests are attached.
    pub guests: usize,
    /// This many migrations are under way, in both directions.
    pub migrations: usize,
    /// This is true while the traffic between daemons is not encrypted.
    pub insecure: bool,
    /// The certificate of this host expires at this time, in seconds since 1970 (UTC); `null` while `insecure` is true.
    #[serde(default)]
    pub certificate_expires_seconds: Option<f64>,
    /// This is the release of the running kernel.
    pub kernel: String,
    /// This is true if the host offers KVM.
    pub kvm: bool,
}

/// A network port lent to migrations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortInfo {
    /// This is the name of the port.
    pub name: String,
    /// This network interface has the address; `null` if the configuration names none.
    pub interface: Option<String>,
    /// Lanes are bound to this IP address.
    pub address: String,
    /// This is the speed in bits per second, as configured or as the interface reports it.
    pub speed_bits_per_second: Option<u64>,
    /// This is true if the interface has a carrier and the address.
    pub up: bool,
    /// A migration opens this many lanes on the port.
    pub lanes: u16,
    /// Lanes have sent this many bytes since the daemon started.
    pub bytes_sent: u64,
    /// Lanes have received this many bytes since the daemon started.
    pub bytes_received: u64,
}

/// Another host that guests may move to and come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PeerInfo {
    /// This is the name of the host.
    pub name: String,
    /// The daemon of that host takes control connections at this address and port.
    pub control: String,
}

/// A guest whose VMM is attached to the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestInfo {
    /// This is the name of the guest.
    pub name: String,
    /// This program runs the guest.
    pub vmm: String,
    /// This is the machine type of the guest in QEMU, such as `pc-q35-7.2`; `null` for other VMMs.
    pub machine: Option<String>,
    /// The guest has this many virtual CPUs.
    pub vcpus: u16,
    /// The guest has this many bytes of RAM.
    pub ram_bytes: u64,
    /// The guest's dirty pages are found by this method: `log`, `ring` or `pagemap`.
    pub tracker: String,
    /// This is the state of the guest.
    pub standing: Standing,
    /// These network interfaces are announced after a migration.
    pub nics: Vec<NicInfo>,
    /// This is the process of the VMM.
    pub pid: Option<u32>,
    /// This is the socket of the QEMU's monitor; `null` for other VMMs.
    pub qmp: Option<String>,
}

/// A guest's network interface.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NicInfo {
    /// This is the hardware address, such as `52:54:00:12:34:56`.
    pub mac: String,
    /// The interface is connected to this network.
    pub network: String,
}

/// The state of a guest on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// The guest runs here.
    Running,
    /// The VMM waits for the guest to arrive.
    Incoming,
    /// A migration of the guest is under way.
    Migrating,
    /// The guest was handed over in a migration and does not run here.
    Relinquished,
    /// The guest has arrived and waits for permission to run.
    Loaded,
    /// Part of the guest's memory will never come from the other host, and its VMM could not be ended. The guest hangs
    /// when it touches that part.
    Lost,
}

impl Standing {
    /// Returns the name of the state in JSON.
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
