//! The switch that joins the hosts' bridges, with a client on a port of its own.

use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::capture::Capture;
use crate::host::HostId;
use crate::namespace::Namespace;
use crate::network;
use crate::tun::Tun;

const SWITCH: &str = "sw0";
const CLIENT: &str = "eth0";
const CLIENT_PORT: &str = "to-client";
/// The port of each host's bridge that leads to the switch.
const UPLINK: &str = "to-switch";

/// The network that guests are plugged into, 10.78.0.0/24.
#[derive(Debug)]
pub struct Lan {
    switch: Namespace,
    client: Namespace,
}

impl Lan {
    /// The address of the client; its prefix is [`Lan::PREFIX`].
    pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);

    /// The address for the first guest.
    pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);

    /// Length of the network's prefix, in bits.
    pub const PREFIX: u8 = 24;

    /// Returns the interface of the switch that leads to a host.
    pub fn port_towards(host: HostId) -> &'static str {
        match host {
            HostId::A => "to-a",
            HostId::B => "to-b",
        }
    }

    /// Returns the interface of the switch behind which it has learned that `mac` is, if it has learned that.
    ///
    /// # Errors
    ///
    /// If the switch cannot be asked.
    pub fn learned_port(&self, mac: [u8; 6]) -> Result<Option<String>> {
        let output = Command::new("bridge")
            .args(["-netns", self.switch.name(), "-json", "fdb", "show", "br", SWITCH])
            .output()
            .context("running bridge")?;
        if !output.status.success() {
            bail!("bridge failed with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
        }
        let table: Value = serde_json::from_slice(&output.stdout).context("reading what bridge says")?;
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        let learned = |entry: &&Value| {
            entry["mac"].as_str() == Some(&mac)
                && entry["state"] != "permanent"
                && entry["ifname"].is_string()
        };
        let found = table.as_array().into_iter().flatten().find(learned);
        Ok(found.and_then(|entry| entry["ifname"].as_str()).map(str::to_owned))
    }

    /// Begins to capture what the switch receives from a host.
    ///
    /// # Errors
    ///
    /// If the system refuses the socket.
    pub fn capture_from(&self, host: HostId) -> Result<Capture> {
        let port = Self::port_towards(host);
        self.switch.run_in(|| Capture::open(port))?.with_context(|| format!("capturing at {port}"))
    }

    /// Runs `work` on a thread of its own where the client is. Sockets that it opens stay there.
    ///
    /// # Errors
    ///
    /// If the thread cannot enter the namespace.
    pub fn run_in_client<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.client.run_in(work)
    }

    /// Joins the bridges of `hosts`, A's and B's, and the client to a new switch.
    pub(crate) fn create(names: [&str; 2], hosts: [&Namespace; 2], bridge: &str) -> Result<Self> {
        let lan = Self::without_hosts(names)?;
        for (host, id) in hosts.into_iter().zip([HostId::A, HostId::B]) {
            let port = Self::port_towards(id);
            network::add_switch_port(lan.switch.name(), SWITCH, port, host.name(), UPLINK)?;
            network::enslave(host.name(), UPLINK, bridge)?;
        }
        Ok(lan)
    }

    /// Joins two VMs, A and B, and the client to a new switch. The taps that are returned are the switch's ports, for the VMs'
    /// network cards.
    pub(crate) fn for_vms(names: [&str; 2]) -> Result<(Self, [Tun; 2])> {
        let lan = Self::without_hosts(names)?;
        let tap = |id| {
            let port = Self::port_towards(id);
            let tap = Tun::create_tap(&lan.switch, port)?;
            network::enslave(lan.switch.name(), port, SWITCH)?;
            anyhow::Ok(tap)
        };
        let taps = [tap(HostId::A)?, tap(HostId::B)?];
        Ok((lan, taps))
    }

    /// Joins the client to a new switch.
    fn without_hosts(names: [&str; 2]) -> Result<Self> {
        let [switch, client] = [Namespace::create(names[0])?, Namespace::create(names[1])?];
        for namespace in [&switch, &client] {
            namespace.run_in(network::disable_ipv6)?.context("turning IPv6 off in a namespace")?;
        }
        network::add_switch(switch.name(), SWITCH)?;
        network::add_switch_port(switch.name(), SWITCH, CLIENT_PORT, client.name(), CLIENT)?;
        network::bring_up(client.name(), &[(CLIENT, Self::CLIENT)])?;
        Ok(Self { switch, client })
    }
}
