//! The links of the hosts, and how systemd-networkd names and addresses them.

use std::net::Ipv4Addr;

use crate::host::HostId;
use crate::network::Bridge;

/// The number of ports of a host.
pub(super) const PORTS: u8 = 2;

/// The MTU of the control link and of the ports, in bytes, as of labs made of namespaces.
pub(super) const MTU: u32 = 9000;

/// The address from which the harness seems to log in. No host has it.
pub(super) const HARNESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 254);

/// A network interface of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Link {
    /// The way by which the harness logs in. It leads nowhere else.
    Management,
    /// The link for control traffic, to the other host.
    Control,
    /// A port, joined to the port of the same number of the other host.
    Port(u8),
    /// The way from the host's bridge to the switch of the guests' network.
    Lan,
}

impl Link {
    /// Returns all links of a host.
    pub(super) fn all() -> Vec<Self> {
        let mut links = vec![Self::Management, Self::Control, Self::Lan];
        links.extend((0..PORTS).map(Self::Port));
        links
    }

    /// Returns the name of the interface, as hosts made of namespaces have it.
    pub(super) fn interface(self) -> String {
        match self {
            Self::Management => "mgmt0".into(),
            Self::Control => "ctl0".into(),
            Self::Port(index) => format!("port{index}"),
            Self::Lan => "to-switch".into(),
        }
    }

    /// Returns the hardware address on a host.
    pub(super) fn mac(self, host: HostId) -> String {
        let link = match self {
            Self::Management => 0xf0,
            Self::Lan => 0xf1,
            Self::Control => 0,
            Self::Port(index) => 1 + index,
        };
        format!("52:54:00:4d:{link:02x}:{:02x}", host as u8 + 1)
    }

    /// Returns the files of systemd-networkd for all links of both hosts: names and contents. Each host takes what has its own
    /// name or its own hardware addresses in it.
    pub(super) fn files() -> Vec<(String, String)> {
        let bridge = Bridge::default().interface;
        let mut files = vec![
            (
                "10-bridge.netdev".to_owned(),
                // It says nothing by itself, and forwards at once.
                format!(
                    "[NetDev]\nName={bridge}\nKind=bridge\n\n[Bridge]\nSTP=no\nForwardDelaySec=0\n\
                     MulticastSnooping=no\n"
                ),
            ),
            ("10-bridge.network".to_owned(), format!("[Match]\nName={bridge}\n\n[Network]\n{QUIET}")),
        ];
        for host in [HostId::A, HostId::B] {
            for link in Self::all() {
                let name = format!("20-{}-{}", host.letter(), link.interface());
                let (interface, mac) = (link.interface(), link.mac(host));
                let named = format!("[Match]\nMACAddress={mac}\n\n[Link]\nName={interface}\n");
                files.push((format!("{name}.link"), named));
                let network = match link {
                    // The address is that of the control link: so a program that is reached over ssh knows by it how the other
                    // host reaches it.
                    Self::Management => format!("{QUIET}\n[Route]\nDestination={HARNESS}/32\nScope=link\n"),
                    Self::Control => addressed(host, 0),
                    Self::Port(index) => addressed(host, 1 + index),
                    Self::Lan => format!("Bridge={bridge}\n{QUIET}"),
                };
                let matched = format!("[Match]\nMACAddress={mac}\n\n[Network]\n{network}");
                files.push((format!("{name}.network"), matched));
            }
        }
        files
    }
}

/// Nothing is sent that a test has not asked for.
const QUIET: &str = "LinkLocalAddressing=no\nIPv6AcceptRA=no\nLLDP=no\n";

fn addressed(host: HostId, link: u8) -> String {
    format!("Address={}/24\n{QUIET}\n[Link]\nMTUBytes={MTU}\n", host.address(link))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_links_share_an_address() {
        let links = Link::all();
        let macs: BTreeSet<String> = [HostId::A, HostId::B]
            .into_iter()
            .flat_map(|host| links.iter().map(move |link| link.mac(host)))
            .collect();
        assert_eq!(macs.len(), 2 * links.len());
        let files = Link::files();
        let names: BTreeSet<&String> = files.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), files.len());
        let text: String = files.iter().map(|(_, text)| text.as_str()).collect();
        for address in ["10.77.0.1/24", "10.77.0.2/24", "10.77.2.1/24", "10.77.2.2/24"] {
            assert_eq!(text.matches(address).count(), 1, "{address}");
        }
    }
}
