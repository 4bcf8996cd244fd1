//! What the configuration says of this host's ports and of its peers.

use std::net::{IpAddr, SocketAddr};

use memlane_api::units::Rate;
use memlane_protocol::wire::Label;

/// TCP port where peers connect, unless another is configured.
pub const CONTROL_PORT: u16 = 7410;
/// TCP port of lanes, unless another is configured.
pub const LANE_PORT: u16 = 7411;
/// Lanes that a port may have.
pub const MAX_LANES: u32 = 16;

/// `[[port]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// Name; a lane connects ports of one name.
    pub name: Label,
    /// Interface that lanes are bound to, besides the address.
    pub interface: Option<String>,
    /// Address that lanes are bound to.
    pub address: IpAddr,
    /// Speed in bits per second, where the interface does not tell it.
    pub speed: Option<Rate>,
    /// Lanes that a migration opens, at most [`MAX_LANES`].
    pub lanes: u16,
    /// Congestion control of lanes, by the name that the kernel has for it; otherwise as suits the way.
    pub congestion_control: Option<String>,
}

/// `[[peer]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerConfig {
    /// Name of the host.
    pub name: Label,
    /// Where its daemon awaits us. Calls of this peer must come from this address.
    pub control: SocketAddr,
    /// Guests that it sends may bring a guest file, from which their QEMU is started here.
    pub may_start_guests: bool,
}
