//! The network: ports, what the kernel does with their connections, bridges, and the way to peers.

use std::fs;
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use memlane_api::units::Rate;
use memlane_guest::config::NetworkConfig;
use memlane_net::config::{PeerConfig, PortConfig};

use super::{Finding, Host};
use crate::interfaces::Interface;
use crate::{setup, units};

/// A peer must take a connection in this time.
const PATIENCE: Duration = Duration::from_secs(1);

/// Looks at the network.
pub(super) fn look(host: &Host<'_>) -> Vec<Finding> {
    let interfaces = match &host.interfaces {
        Ok(interfaces) => interfaces,
        Err(error) => {
            let found = format!("the interfaces of this host cannot be listed: {error}");
            return vec![Finding::missing("port", found, "apt install iproute2")];
        }
    };
    let config = host.config;
    let ports: Vec<Port<'_>> = config.ports.iter().map(|port| Port::of(port, interfaces)).collect();
    let mut findings = match ports.is_empty() {
        true => vec![no_ports(interfaces)],
        false => ports.iter().map(port).collect(),
    };
    findings.extend(port_interfaces(&ports));
    findings.extend(mtu(&ports));
    let sysctl = |name: &str| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
    findings.push(congestion_control(
        &sysctl("tcp_congestion_control"),
        &sysctl("tcp_allowed_congestion_control"),
        &config.ports,
    ));
    findings.push(tcp_buffers(&sysctl("tcp_rmem"), &sysctl("tcp_wmem"), &ports));
    findings.extend(networks(&config.networks, interfaces));
    findings.extend(peers(&config.peers));
    findings
}

/// A port of the configuration, and the interface that it lies on.
struct Port<'a> {
    config: &'a PortConfig,
    interface: Option<&'a Interface>,
}

impl<'a> Port<'a> {
    fn of(config: &'a PortConfig, interfaces: &'a [Interface]) -> Self {
        let is_it = |interface: &&Interface| match &config.interface {
            Some(name) => interface.name == *name,
            None => interface.addresses.contains(&config.address),
        };
        Self { config, interface: interfaces.iter().find(is_it) }
    }

    /// Bits per second, as the configuration says or the interface tells.
    fn speed(&self) -> Option<u64> {
        let configured = self.config.speed.map(|Rate(bits)| bits);
        configured.or_else(|| self.interface.and_then(|interface| interface.speed))
    }
}

fn no_ports(interfaces: &[Interface]) -> Finding {
    let candidates = setup::port_candidates(interfaces);
    let names: Vec<String> = candidates
        .iter()
        .map(|(interface, address)| format!("{} ({address}, MTU {})", interface.name, interface.mtu))
        .collect();
    let (found, remedy) = match names.is_empty() {
        true => (
            "no [[port]] is configured, and no interface with an IPv4 address is up",
            "ip link set eth1 up && ip address add 192.0.2.11/24 dev eth1, with an interface and an address of this host",
        ),
        false => {
            ("no [[port]] is configured: nothing can move", "memlanectl setup shows [[port]] tables for them")
        }
    };
    let found =
        if names.is_empty() { found.to_owned() } else { format!("{found}; there are {}", names.join(", ")) };
    Finding::missing("port", found, remedy)
}

fn port(port: &Port<'_>) -> Finding {
    const CHECK: &str = "port";
    let PortConfig { name, address, interface: configured, .. } = port.config;
    let Some(interface) = port.interface else {
        return match configured {
            Some(interface) => Finding::missing(
                CHECK,
                format!("{name}: there is no interface {interface}"),
                format!("ip link; then correct interface of the [[port]] {name}"),
            ),
            None => Finding::missing(
                CHECK,
                format!("{name}: no interface has the address {address}"),
                format!("ip address; then correct address of the [[port]] {name}"),
            ),
        };
    };
    let device = &interface.name;
    if !interface.addresses.contains(address) {
        let bits = if address.is_ipv4() { "24" } else { "64" };
        return Finding::missing(
            CHECK,
            format!("{name}: {device} does not have the address {address}"),
            format!("ip address add {address}/{bits} dev {device}, or correct the [[port]] {name}"),
        );
    }
    if !interface.carries {
        let remedy = match interface.is_set_up {
            false => format!("ip link set {device} up"),
            true => format!("plug in the cable of {device}, or see to the switch: it has no carrier"),
        };
        return Finding::missing(CHECK, format!("{name}: {device} ({address}) is down"), remedy);
    }
    let speed = port.speed().map_or("speed unknown".to_owned(), |bits| units::bits(bits as f64));
    Finding::ok(CHECK, format!("{name}: {device}, {address}, up, MTU {}, {speed}", interface.mtu))
}

/// Finds ports that share an interface.
fn port_interfaces(ports: &[Port<'_>]) -> Option<Finding> {
    let mut placed: Vec<(&str, &str)> = ports
        .iter()
        .filter_map(|port| Some((port.interface?.name.as_str(), port.config.name.as_str())))
        .collect();
    placed.sort_unstable();
    let shared = placed.windows(2).find(|pair| pair[0].0 == pair[1].0)?;
    let [(interface, one), (_, other)] = shared else { return None };
    Some(Finding::advice(
        "port-interfaces",
        format!("ports {one} and {other} are both on {interface}: they share its wire, and fail together"),
        "give each [[port]] an interface of its own, or leave one out",
    ))
}

fn mtu(ports: &[Port<'_>]) -> Option<Finding> {
    const CHECK: &str = "mtu";
    const JUMBO: u64 = 9000;
    const FAST: u64 = 10_000_000_000;
    let mut sizes: Vec<(u64, &str)> = ports
        .iter()
        .filter_map(|port| port.interface)
        .map(|found| (found.mtu, found.name.as_str()))
        .collect();
    sizes.sort_unstable();
    let ((smallest, _), (largest, _)) = (sizes.first()?, sizes.last()?);
    if smallest != largest {
        let all: Vec<String> = sizes.iter().map(|(mtu, name)| format!("{name} {mtu}")).collect();
        let small = sizes.iter().filter(|(mtu, _)| mtu != largest);
        let commands: Vec<String> =
            small.map(|(_, name)| format!("ip link set {name} mtu {largest}")).collect();
        let remedy = format!("if their switches and the other hosts carry it: {}", commands.join(" && "));
        return Some(Finding::advice(
            CHECK,
            format!("the ports' interfaces differ: {}", all.join(", ")),
            remedy,
        ));
    }
    let is_fast = |port: &&Port<'_>| port.speed().is_some_and(|speed| speed >= FAST);
    match ports.iter().find(is_fast).and_then(|port| port.interface) {
        Some(interface) if interface.mtu < JUMBO => Some(Finding::advice(
            CHECK,
            format!(
                "{} is fast, and its MTU is {}: small packets cost processor time",
                interface.name, interface.mtu
            ),
            format!("if all switches and hosts carry it: ip link set {} mtu {JUMBO}", interface.name),
        )),
        _ => Some(Finding::ok(CHECK, format!("all ports have {smallest}"))),
    }
}

fn congestion_control(current: &str, allowed: &str, ports: &[PortConfig]) -> Finding {
    const CHECK: &str = "congestion-control";
    let (current, allowed) = (current.trim(), allowed.trim());
    let is_allowed = |name: &str| allowed.split_whitespace().any(|word| word == name);
    let wanted = ports.iter().filter_map(|port| Some((&port.name, port.congestion_control.as_deref()?)));
    let found = format!("{current}; allowed are: {allowed}");
    let allow = |name: &str| {
        format!(
            "modprobe -a tcp_{name}; sysctl -w net.ipv4.tcp_allowed_congestion_control='{allowed} {name}'"
        )
    };
    if let Some((port, name)) = wanted.into_iter().find(|(_, name)| !is_allowed(name)) {
        return Finding::missing(CHECK, format!("{found}; port {port} asks for {name}"), allow(name));
    }
    if current == "bbr" && !is_allowed("cubic") && !is_allowed("reno") {
        let why = "over short ways its timers cost as much processor time as sending";
        return Finding::advice(CHECK, format!("{found}; {why}"), allow("cubic"));
    }
    Finding::ok(CHECK, found)
}

/// Judges how much a connection may have under way, for a round trip of a millisecond: more needs no comment on a local
/// network, and longer ways are the operator's to know.
fn tcp_buffers(rmem: &str, wmem: &str, ports: &[Port<'_>]) -> Finding {
    const CHECK: &str = "tcp-buffers";
    const PAGE: &str = "for longer ways see \"Long ways\" in docs/operating.md";
    let numbers = |text: &str| {
        let numbers: Vec<u64> = text.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        <[u64; 3]>::try_from(numbers).ok()
    };
    let (Some(rmem), Some(wmem)) = (numbers(rmem), numbers(wmem)) else {
        let found = "net.ipv4.tcp_rmem and net.ipv4.tcp_wmem cannot be read";
        return Finding::advice(CHECK, found, "sysctl net.ipv4.tcp_rmem net.ipv4.tcp_wmem");
    };
    let (receive, send) = (rmem[2], wmem[2]);
    let found = format!("tcp_rmem {}, tcp_wmem {}", units::bytes(receive), units::bytes(send));
    let fastest = ports.iter().filter_map(Port::speed).max();
    let needed = fastest.map_or(0, |bits| bits / 8 / 1000);
    if receive.min(send) >= needed {
        return Finding::ok(CHECK, found);
    }
    // What is large enough stays, and so do the least and the first size.
    let remedy = [("tcp_rmem", rmem), ("tcp_wmem", wmem)].map(|(key, [least, first, largest])| {
        let enough = needed.next_power_of_two();
        if largest < needed { format!(" net.ipv4.{key}='{least} {first} {enough}'") } else { String::new() }
    });
    let fastest = units::bits(fastest.unwrap_or(0) as f64);
    Finding::advice(
        CHECK,
        format!("{found}: less than {fastest} has under way in 1 ms, {}", units::bytes(needed)),
        format!("sysctl -w{}; {PAGE}", remedy.concat()),
    )
}

fn networks(networks: &[NetworkConfig], interfaces: &[Interface]) -> Vec<Finding> {
    const CHECK: &str = "network";
    if networks.is_empty() {
        let remedy =
            "add a [[network]] with the bridge that guests are plugged into; memlanectl setup shows one";
        return vec![Finding::advice(
            CHECK,
            "no [[network]] is configured: guests with NICs cannot move",
            remedy,
        )];
    }
    let judge = |NetworkConfig { name, bridge }: &NetworkConfig| match interfaces
        .iter()
        .find(|interface| interface.name == *bridge)
    {
        None => Finding::missing(
            CHECK,
            format!("{name}: there is no bridge {bridge}"),
            format!(
                "ip link add {bridge} type bridge && ip link set {bridge} up, or correct the [[network]] {name}"
            ),
        ),
        Some(interface) if !interface.is_bridge() => Finding::missing(
            CHECK,
            format!("{name}: {bridge} is no bridge"),
            format!("name the bridge that guests are plugged into in the [[network]] {name}"),
        ),
        Some(interface) if !interface.is_set_up => {
            Finding::missing(CHECK, format!("{name}: {bridge} is down"), format!("ip link set {bridge} up"))
        }
        Some(_) => Finding::ok(CHECK, format!("{name}: {bridge} is up")),
    };
    networks.iter().map(judge).collect()
}

/// Calls all peers at once.
fn peers(peers: &[PeerConfig]) -> Vec<Finding> {
    if peers.is_empty() {
        let remedy = "add a [[peer]] for each other host, or: memlanectl setup --peer host-b=192.0.2.12";
        return vec![Finding::missing(
            "peer",
            "no [[peer]] is configured: guests have nowhere to go",
            remedy,
        )];
    }
    let call = |peer: &PeerConfig| TcpStream::connect_timeout(&peer.control, PATIENCE).err();
    thread::scope(|scope| {
        let calls: Vec<_> = peers.iter().map(|peer| (peer, scope.spawn(move || call(peer)))).collect();
        let answers = calls.into_iter().map(|(peer, call)| {
            // A call that panicked has reached nobody.
            let failed = call.join().unwrap_or_else(|_| Some(std::io::Error::other("the call failed")));
            judge_peer(peer, failed.map(|error| error.to_string()))
        });
        answers.collect()
    })
}

fn judge_peer(peer: &PeerConfig, failed: Option<String>) -> Finding {
    const CHECK: &str = "peer";
    let PeerConfig { name, control, .. } = peer;
    match failed {
        None => Finding::ok(CHECK, format!("{name}: {control} takes connections")),
        Some(error) => Finding::missing(
            CHECK,
            format!("{name}: {control} does not answer ({error})"),
            format!(
                "on {name}: systemctl start memlaned, and let TCP ports {} and that of lanes through its firewall",
                control.port()
            ),
        ),
    }
}

#[cfg(test)]
mod tests;
