//! The cables between the hosts.

use anyhow::{Context, Result};

use super::links::{Link, MTU};
use crate::host::HostId;
use crate::lan::Lan;
use crate::namespace::Namespace;
use crate::network;
use crate::tun::Tun;

/// The open ends of all cables of a host, for the network cards of its QEMU.
pub(super) type Ends = Vec<(Link, Tun)>;

/// Lays all cables, and returns the guests' network and both hosts' ends. `names` are those of namespaces that whoever
/// calls this removes: the two of the guests' network, and the one in which the other cables are.
///
/// Each cable leads through a bridge of this machine's kernel, as through a switch: when one host loses its power, the
/// other one's carrier stays.
pub(super) fn lay(names: &[String; 3]) -> Result<(Lan, [Ends; 2])> {
    let [switch, client, between] = names;
    let (lan, [a, b]) = Lan::for_vms([switch, client])?;
    let mut ends = [vec![(Link::Lan, a)], vec![(Link::Lan, b)]];
    let namespace = Namespace::create(between)?;
    namespace.run_in(network::disable_ipv6)?.context("turning IPv6 off in a namespace")?;
    for link in Link::all().into_iter().filter(|link| matches!(link, Link::Control | Link::Port(_))) {
        let bridge = link.interface();
        network::add_switch(between, &bridge)?;
        for id in [HostId::A, HostId::B] {
            let name = format!("{bridge}-{}", id.letter());
            let tap = Tun::create_tap(&namespace, &name)?;
            network::prepare_tun(between, &name, MTU)?;
            network::enslave(between, &name, &bridge)?;
            ends[id as usize].push((link, tap));
        }
    }
    Ok((lan, ends))
}
