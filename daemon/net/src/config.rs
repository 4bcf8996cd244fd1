//! This module holds what the configuration says of this host's ports and of its peers.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use memlane_api::units::Rate;
use memlane_protocol::wire::Label;

/// Peers connect to this TCP port, unless another is configured.
pub const CONTROL_PORT: u16 = 7410;
/// Lanes connect to this TCP port, unless another is configured.
pub const LANE_PORT: u16 = 7411;
/// A port may have this many lanes at the most.
pub const MAX_LANES: u32 = 16;

/// A `[[port]]` of the configuration describes a port of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// This is the port's name. A lane connects two ports of one name.
    pub name: Label,
    /// This is the interface that lanes are bound to in addition to the address.
    pub interface: Option<String>,
    /// This is the address that lanes are bound to.
    pub address: IpAddr,
    /// This is the port's speed in bits per second, where the interface does not tell it.
    pub speed: Option<Rate>,
    /// A migration begins with this many lanes on the port, at most [`MAX_LANES`]. It opens more where they are encrypted,
    /// and one core is the limit of each.
    pub lanes: u16,
    /// This is the kernel's name of the lanes' congestion control. With `None` the choice depends on the round trip.
    pub congestion_control: Option<String>,
}

/// A `[[peer]]` of the configuration describes another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerConfig {
    /// This is the name of the host.
    pub name: Label,
    /// The peer's daemon listens at this address, and its connections to this host must come from this IP address.
    pub control: SocketAddr,
    /// If this is true, guests that the peer sends may bring a guest file, from which this daemon starts their QEMU.
    pub may_start_guests: bool,
    /// This file has the certificates of the authorities that sign the peer's certificate. With `None` these are those of
    /// the whole fleet.
    pub ca: Option<PathBuf>,
}
