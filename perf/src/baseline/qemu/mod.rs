//! QEMU's own migration, of a guest that any scenario can have.
//!
//! [`firmware`] is a guest that runs nothing but its firmware, which waits for a disk that never comes: it is there
//! after a second even where KVM does not run it, and its memory holds what the harness has put there. [`toucher`] is
//! one that runs a program of the harness's, which reads its memory and notes how long it waits for it.

pub mod files;
pub mod firmware;
mod machine;
mod migration;
mod tls;
pub mod toucher;

use std::fmt;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Result;
use memlane_lab::qmp::Monitor;
use serde_json::{Value, json};

pub use migration::{QemuMove, QemuPair};

/// Longest pause that the guest may see.
pub const DOWNTIME_LIMIT: Duration = Duration::from_millis(300);
/// The port at which the destination's QEMU listens for the source's.
const PORT: u16 = 4444;

/// The method by which QEMU moves a guest by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum QemuMethod {
    /// Pre-copy over one connection.
    Plain,
    /// Pre-copy over so many more connections.
    Multifd(u8),
    /// Pre-copy over so many more connections, all of them encrypted.
    MultifdTls(u8),
    /// Post-copy at once, with a connection of its own for the pages that the guest waits for.
    Postcopy,
}

impl QemuMethod {
    /// The methods of pre-copy. The fastest one is looked for among them.
    pub const PRECOPY: [Self; 4] = [Self::Plain, Self::Multifd(2), Self::Multifd(4), Self::Multifd(8)];

    /// Prepares one end for a migration that shall be as fast as it can.
    ///
    /// # Errors
    ///
    /// If QEMU refuses.
    pub fn set_up(self, monitor: &mut Monitor) -> Result<()> {
        let capability = |name: &str| json!({ "capability": name, "state": true });
        let mut capabilities = vec![capability("events")];
        let downtime = DOWNTIME_LIMIT.as_millis() as u64;
        let mut parameters = json!({ "max-bandwidth": 1u64 << 40, "downtime-limit": downtime });
        match self {
            Self::Plain => {}
            Self::Postcopy => {
                capabilities.extend(["postcopy-ram", "postcopy-preempt"].map(capability));
                // What fits into the limit QEMU sends in the pause, and on a fast link that may be all there is.
                parameters["downtime-limit"] = Value::from(1);
            }
            Self::Multifd(channels) | Self::MultifdTls(channels) => {
                capabilities.push(capability("multifd"));
                parameters["multifd-channels"] = Value::from(channels);
            }
        }
        if let Self::MultifdTls(_) = self {
            parameters["tls-creds"] = Value::from(tls::OBJECT);
            parameters["tls-hostname"] = Value::from(tls::DESTINATION);
        }
        monitor.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
        monitor.execute("migrate-set-parameters", parameters).map(drop)
    }
}

impl fmt::Display for QemuMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain => f.pad("plain"),
            Self::Multifd(channels) => f.pad(&format!("multifd{channels}")),
            Self::MultifdTls(channels) => f.pad(&format!("multifd{channels} TLS")),
            Self::Postcopy => f.pad("postcopy"),
        }
    }
}

fn uri(address: Ipv4Addr) -> String {
    format!("tcp:{address}:{PORT}")
}
