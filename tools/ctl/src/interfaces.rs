//! The network interfaces of this host, as `ip` lists them.

use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use memlane_net::port::interface_state;
use serde::Deserialize;

use crate::child;

/// `ip` may take this long.
const PATIENCE: Duration = Duration::from_secs(5);

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Interface {
    /// Its name.
    pub(crate) name: String,
    /// What the kernel calls its kind, such as `bridge` or `tun`. Network cards have none.
    pub(crate) kind: Option<String>,
    /// The bridge or bond that it is part of.
    pub(crate) master: Option<String>,
    /// Whether it was set up. A bridge without members is, and still carries nothing.
    pub(crate) is_set_up: bool,
    /// Whether it is up and has a carrier.
    pub(crate) carries: bool,
    /// The largest packet, in bytes.
    pub(crate) mtu: u64,
    /// Its addresses that are valid beyond its own link, IPv4 first.
    pub(crate) addresses: Vec<IpAddr>,
    /// Bits per second, where it tells.
    pub(crate) speed: Option<u64>,
    /// Whether the way to all other networks leads over it.
    pub(crate) is_default_route: bool,
}

impl Interface {
    /// Whether guests may be plugged into it.
    pub(crate) fn is_bridge(&self) -> bool {
        matches!(self.kind.as_deref(), Some("bridge" | "openvswitch"))
    }
}

/// Lists the interfaces.
///
/// # Errors
///
/// Says why they cannot be listed.
pub(crate) fn read() -> Result<Vec<Interface>, String> {
    let ip = |arguments: &[&str]| {
        let ended = child::run(Command::new("ip").args(arguments), PATIENCE);
        let ended = ended.map_err(|error| format!("cannot run ip: {error}"))?;
        match ended.success {
            true => Ok(ended.stdout),
            false => Err(format!("ip {}: {}", arguments.join(" "), ended.stderr.trim())),
        }
    };
    let links = ip(&["-json", "-details", "address", "show"])?;
    let mut routes = ip(&["-json", "route", "show", "default"])?;
    if routes.trim().is_empty() {
        routes = "[]".to_owned();
    }
    parse(&links, &routes, |name| interface_state(name).1)
}

/// Understands what `ip -json -details address show` and `ip -json route show default` print.
fn parse(links: &str, routes: &str, speed: impl Fn(&str) -> Option<u64>) -> Result<Vec<Interface>, String> {
    let unclear = |error: serde_json::Error| format!("cannot understand what ip prints: {error}");
    let links: Vec<Link> = serde_json::from_str(links).map_err(unclear)?;
    let routes: Vec<Route> = serde_json::from_str(routes).map_err(unclear)?;
    let interface = |link: Link| {
        let has = |flag: &str| link.flags.iter().any(|found| found == flag);
        let global = link.addr_info.iter().filter(|address| address.scope == "global");
        let mut addresses: Vec<IpAddr> = global.filter_map(|address| address.local.parse().ok()).collect();
        addresses.sort_by_key(IpAddr::is_ipv6);
        Interface {
            kind: link.linkinfo.and_then(|info| info.info_kind),
            master: link.master,
            is_set_up: has("UP"),
            carries: has("UP") && has("LOWER_UP"),
            mtu: link.mtu,
            addresses,
            speed: speed(&link.ifname),
            is_default_route: routes.iter().any(|route| route.dev == link.ifname),
            name: link.ifname,
        }
    };
    Ok(links.into_iter().filter(|link| !link.ifname.is_empty()).map(interface).collect())
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Link {
    ifname: String,
    flags: Vec<String>,
    mtu: u64,
    master: Option<String>,
    linkinfo: Option<LinkInfo>,
    addr_info: Vec<Address>,
}

#[derive(Deserialize)]
struct LinkInfo {
    info_kind: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Address {
    local: String,
    scope: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Route {
    dev: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINKS: &str = r#"[
        {"ifname":"lo","flags":["LOOPBACK","UP","LOWER_UP"],"mtu":65536,
         "addr_info":[{"family":"inet","local":"127.0.0.1","scope":"host"}]},
        {"ifname":"eth1","flags":["BROADCAST","UP","LOWER_UP"],"mtu":9000,"operstate":"UP","addr_info":[
         {"family":"inet6","local":"2001:db8::1","scope":"global"},
         {"family":"inet","local":"192.0.2.11","prefixlen":24,"scope":"global"},
         {"family":"inet6","local":"fe80::1","scope":"link"}]},
        {},
        {"ifname":"br0","flags":["NO-CARRIER","UP"],"mtu":1500,"linkinfo":{"info_kind":"bridge","info_data":{}},
         "addr_info":[]},
        {"ifname":"tap0","flags":[],"mtu":1500,"master":"br0","linkinfo":{"info_kind":"tun"},"addr_info":[]}]"#;

    #[test]
    fn what_ip_prints_is_understood() {
        let speed = |name: &str| (name == "eth1").then_some(10_000_000_000);
        let all = parse(LINKS, r#"[{"dst":"default","gateway":"192.0.2.1","dev":"eth1"}]"#, speed).unwrap();
        let names: Vec<&str> = all.iter().map(|interface| interface.name.as_str()).collect();
        assert_eq!(names, ["lo", "eth1", "br0", "tap0"]);
        let addresses = vec!["192.0.2.11".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let eth1 = Interface {
            name: "eth1".into(),
            is_set_up: true,
            carries: true,
            mtu: 9000,
            addresses,
            speed: Some(10_000_000_000),
            is_default_route: true,
            ..Interface::default()
        };
        assert_eq!(all[1], eth1);
        assert!(all[0].addresses.is_empty() && !all[0].is_default_route);
        assert!(all[2].is_bridge() && all[2].is_set_up && !all[2].carries);
        assert_eq!((all[3].master.as_deref(), all[3].is_bridge()), (Some("br0"), false));
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for (links, routes) in [("", "[]"), ("[]", "nothing"), ("{\"ifname\":\"a\"}", "[]")] {
            let told = parse(links, routes, |_| None).unwrap_err();
            assert!(told.contains("cannot understand what ip prints"), "{told}");
        }
    }
}
