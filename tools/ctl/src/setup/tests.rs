//! What is made of made-up hosts, and that the daemon takes it.

use super::*;

fn card(name: &str, address: &str) -> Interface {
    Interface {
        name: name.into(),
        is_set_up: true,
        carries: true,
        mtu: 1500,
        addresses: vec![address.parse().unwrap()],
        ..Interface::default()
    }
}

fn of_kind(kind: &str, interface: Interface) -> Interface {
    Interface { kind: Some(kind.into()), ..interface }
}

/// A host with two networks for migrations, a bridge for guests, and what container engines and libvirt leave.
fn host() -> Vec<Interface> {
    let tap = Interface { master: Some("br0".into()), ..of_kind("tun", card("tap-web1", "203.0.113.9")) };
    vec![
        card("lo", "192.0.2.99"),
        Interface { is_default_route: true, ..card("eth0", "203.0.113.5") },
        card("eth2", "198.51.100.11"),
        card("eth1", "192.0.2.11"),
        card("eth3", "2001:db8::11"),
        Interface { carries: false, ..card("eth4", "192.0.2.44") },
        of_kind("bridge", card("docker0", "172.17.0.1")),
        of_kind("bridge", card("virbr0", "192.168.122.1")),
        of_kind("veth", card("veth12ab", "169.254.1.1")),
        of_kind("wireguard", card("office", "10.1.1.1")),
        of_kind("bridge", card("br0", "10.0.0.1")),
        tap,
    ]
}

fn options(peers: &[&str], ports: &[&str]) -> SetupArgs {
    let pairs = |all: &[&str]| all.iter().map(|pair| pair.parse().unwrap()).collect();
    SetupArgs {
        write: false,
        host: Some("host-a".parse().unwrap()),
        peers: pairs(peers),
        ports: pairs(ports),
        config: "memlaned.toml".into(),
    }
}

fn nobody() -> Found {
    Found { attach_users: Vec::new(), viewers: Vec::new() }
}

fn text_of(options: &SetupArgs, interfaces: &[Interface], accounts: Found) -> Result<String, String> {
    plan(options, interfaces, accounts).map(|plan| plan.to_string()).map_err(|error| error.to_string())
}

#[test]
fn ports_are_the_cards_that_lead_to_other_hosts() {
    let names = |interfaces: &[Interface]| {
        let found = port_candidates(interfaces).into_iter();
        found.map(|(interface, address)| format!("{} {address}", interface.name)).collect::<Vec<_>>()
    };
    assert_eq!(names(&host()), ["eth1 192.0.2.11", "eth2 198.51.100.11"]);
    // The only one that there is, even if everything else goes over it.
    let only: Vec<Interface> =
        host().into_iter().filter(|one| !matches!(&*one.name, "eth1" | "eth2")).collect();
    assert_eq!(names(&only), ["eth0 203.0.113.5"]);
    // A bridge with a network card is as good as the card.
    let mut bridged =
        vec![Interface { is_default_route: true, ..of_kind("bridge", card("vmbr0", "192.0.2.7")) }];
    assert!(names(&bridged).is_empty());
    let member =
        Interface { addresses: Vec::new(), master: Some("vmbr0".into()), ..card("eth0", "192.0.2.8") };
    bridged.push(member);
    assert_eq!(names(&bridged), ["vmbr0 192.0.2.7"]);
    assert!(names(&[]).is_empty());
}

#[test]
fn the_daemon_takes_what_is_made() {
    let parse =
        |text: &str| Config::parse("made".as_ref(), text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let text = text_of(&options(&["host-b=192.0.2.12", "host-c=[2001:db8::2]:7000"], &[]), &host(), nobody())
        .unwrap();
    let config = parse(&text);
    assert_eq!(config.host.as_str(), "host-a");
    let ports: Vec<_> =
        config.ports.iter().map(|port| (port.name.as_str(), port.interface.as_deref())).collect();
    assert_eq!(ports, [("a", Some("eth1")), ("b", Some("eth2"))]);
    let peers: Vec<_> = config.peers.iter().map(|peer| peer.control.to_string()).collect();
    assert_eq!(peers, ["192.0.2.12:7410", "[2001:db8::2]:7000"]);
    let bridges: Vec<_> = config.networks.iter().map(|network| network.bridge.as_str()).collect();
    assert_eq!(bridges, ["br0"]);
    assert!(config.keys.is_some());

    // Of a host with nothing, all is left as an example.
    let text = text_of(&options(&[], &[]), &[], nobody()).unwrap();
    let config = parse(&text);
    assert!(config.ports.is_empty() && config.peers.is_empty() && config.networks.is_empty());
    let examples: String = text
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(example) if !example.starts_with(' ') => format!("{example}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let config = parse(&examples);
    assert_eq!((config.ports.len(), config.peers.len(), config.networks.len()), (1, 1, 1));

    // Users that every host has stand for those of libvirt.
    let accounts = Found { attach_users: vec!["root", QEMU_USER], viewers: vec!["root"] };
    let text = text_of(&options(&[], &["fast=eth3"]), &host(), accounts).unwrap();
    let config = parse(&text.replace(&format!("\"{QEMU_USER}\""), "\"daemon\""));
    assert_eq!(config.attach_users.len(), 2);
    assert_eq!((config.access.viewers.len(), config.ports[0].address.is_ipv6()), (1, true));
}

#[test]
fn what_does_not_fit_this_host_is_refused_by_name() {
    for (peers, ports, told) in [
        (&[][..], &["a=eth9"][..], "no such interface"),
        (&[], &["a=eth1", "a=eth2"], "two times"),
        (&["b=host-b.example"], &[], "numeric address"),
        (&["b=192.0.2.12", "b=192.0.2.13"], &[], "two times"),
    ] {
        let error = text_of(&options(peers, ports), &host(), nobody()).unwrap_err();
        assert!(error.contains(told), "{error}");
    }
    let bare = [Interface { addresses: Vec::new(), ..card("eth1", "192.0.2.1") }];
    assert!(text_of(&options(&[], &["a=eth1"]), &bare, nobody()).unwrap_err().contains("no address"));
    for wrong in ["a", "=eth1", "a=", "-a=eth1", "a b=eth1"] {
        assert!(wrong.parse::<Pair>().is_err(), "{wrong}");
    }
}

#[test]
fn a_file_is_written_whole_and_never_over_another() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("etc/memlane/memlaned.toml");
    write(&file, "host = \"host-a\"\n").unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "host = \"host-a\"\n");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o644);
    let refused = write(&file, "host = \"host-b\"\n").unwrap_err();
    assert_eq!(refused.exit(), Exit::Refused);
    assert!(refused.to_string().contains("is left as it is"), "{refused}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "host = \"host-a\"\n");
    assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
    let below_a_file = write(&file.join("below"), "").unwrap_err();
    assert_eq!(below_a_file.exit(), Exit::Other);
}

#[test]
fn the_next_steps_are_those_that_are_left() {
    let parse = |text: &str| Config::parse("made".as_ref(), text).unwrap();
    let steps = next_steps("/x".as_ref(), &parse("host = \"host-a\""), None);
    for part in
        ["wrote /x", "add a [[peer]]", "keys issue host-a", "enable --now", "memlaned is not installed"]
    {
        assert!(steps.contains(part), "{part}: {steps}");
    }
    let peer = "host = \"host-a\"\ninsecure = true\n[[peer]]\nname = \"host-b\"\ncontrol = \"192.0.2.12\"";
    let steps = next_steps("/x".as_ref(), &parse(peer), Some("/x is fine"));
    assert!(
        !steps.contains("[[peer]]") && !steps.contains("keys") && steps.contains(": /x is fine"),
        "{steps}"
    );
}
