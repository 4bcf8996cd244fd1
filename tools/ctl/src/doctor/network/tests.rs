//! Networks as they should be, and with one thing wrong.

use super::super::Status;
use super::*;
use memlaned::config::Config;

fn config(text: &str) -> Config {
    Config::parse("test".as_ref(), &format!("host = \"host-a\"\n{text}")).unwrap()
}

fn card(name: &str, address: &str) -> Interface {
    Interface {
        name: name.into(),
        is_set_up: true,
        carries: true,
        mtu: 1500,
        addresses: vec![address.parse().unwrap()],
        speed: Some(1_000_000_000),
        ..Interface::default()
    }
}

const TWO: &str = "[[port]]\nname = \"a\"\naddress = \"192.0.2.11\"\ninterface = \"eth1\"\n\
                   [[port]]\nname = \"b\"\naddress = \"198.51.100.11\"\n";

/// What one change to two good ports makes of them.
fn judged(change: impl Fn(&mut Vec<Interface>)) -> (Vec<Finding>, Option<Finding>, Option<Finding>) {
    let mut interfaces = vec![card("eth1", "192.0.2.11"), card("eth2", "198.51.100.11")];
    change(&mut interfaces);
    let config = config(TWO);
    let ports: Vec<Port<'_>> = config.ports.iter().map(|port| Port::of(port, &interfaces)).collect();
    (ports.iter().map(port).collect(), mtu(&ports), port_interfaces(&ports))
}

#[test]
fn ports_are_up_with_their_addresses_or_not() {
    let (ports, mtu, shared) = judged(|_| {});
    assert!(ports.iter().all(|port| port.status == Status::Ok), "{ports:?}");
    assert!(ports[0].found.contains("1.00 Gbit/s"), "{ports:?}");
    assert_eq!((mtu.unwrap().status, shared), (Status::Ok, None));
    type Change = fn(&mut Vec<Interface>);
    let wrong: [(Change, &str); 5] = [
        (|all| drop(all.remove(0)), "correct interface"),
        (|all| all[1].addresses.clear(), "correct address"),
        (|all| all[0].addresses.clear(), "ip address add 192.0.2.11/24 dev eth1"),
        (|all| (all[0].is_set_up, all[0].carries) = (false, false), "ip link set eth1 up"),
        (|all| all[0].carries = false, "no carrier"),
    ];
    for (change, remedy) in wrong {
        let (ports, ..) = judged(change);
        let missing: Vec<_> = ports.iter().filter(|port| port.status == Status::Missing).collect();
        assert!(missing.len() == 1 && missing[0].remedy.as_ref().unwrap().contains(remedy), "{ports:?}");
    }
}

#[test]
fn ports_are_alike_and_apart_or_not() {
    let (_, mtu, _) = judged(|all| all[0].mtu = 9000);
    assert!(mtu.unwrap().remedy.unwrap().contains("ip link set eth2 mtu 9000"));
    let (_, mtu, _) = judged(|all| all[0].speed = Some(25_000_000_000));
    assert_eq!(mtu.unwrap().status, Status::Advice);
    let (_, _, shared) = judged(|all| {
        let other = all.remove(1);
        all[0].addresses.extend(other.addresses);
    });
    assert!(shared.unwrap().found.contains("ports a and b are both on eth1"));
}

#[test]
fn without_ports_candidates_are_named() {
    let none = no_ports(&[card("eth1", "192.0.2.11")]);
    assert!(none.status == Status::Missing && none.found.contains("eth1 (192.0.2.11"), "{none:?}");
    assert!(no_ports(&[]).found.contains("no interface with an IPv4 address"));
}

#[test]
fn congestion_controls_are_allowed_or_not() {
    let judge = |current, allowed, text: &str| congestion_control(current, allowed, &config(text).ports);
    let asks = "[[port]]\nname = \"a\"\naddress = \"192.0.2.11\"\ncongestion_control = \"cubic\"";
    assert_eq!(judge("cubic\n", "reno cubic\n", asks).status, Status::Ok);
    assert_eq!(judge("bbr\n", "reno bbr\n", "").status, Status::Ok);
    assert_eq!(judge("bbr\n", "bbr\n", "").status, Status::Advice);
    let refused = judge("reno\n", "reno\n", asks);
    assert!(refused.status == Status::Missing && refused.remedy.unwrap().contains("'reno cubic'"));
}

#[test]
fn buffers_hold_a_millisecond_or_not() {
    let config = config("[[port]]\nname = \"a\"\naddress = \"192.0.2.11\"\nspeed = \"100gbit\"");
    let ports: Vec<Port<'_>> = config.ports.iter().map(|port| Port::of(port, &[])).collect();
    assert_eq!(tcp_buffers("4096 131072 33554432", "4096 16384 16777216", &ports).status, Status::Ok);
    let small = tcp_buffers("4096 131072 6291456", "4096 16384 4194304", &ports);
    assert!(small.status == Status::Advice && small.remedy.unwrap().contains("131072 16777216"));
    assert_eq!(tcp_buffers("4096 131072 6291456", "4096 16384 4194304", &[]).status, Status::Ok);
    assert_eq!(tcp_buffers("", "4096", &[]).status, Status::Advice);
}

#[test]
fn bridges_are_there_or_not() {
    let config = config("[[network]]\nname = \"lan\"\nbridge = \"br0\"");
    let judge = |interfaces: &[Interface]| networks(&config.networks, interfaces).remove(0);
    let bridge = Interface {
        name: "br0".into(),
        kind: Some("bridge".into()),
        is_set_up: true,
        ..Interface::default()
    };
    assert_eq!(judge(std::slice::from_ref(&bridge)).status, Status::Ok);
    let down = judge(&[Interface { is_set_up: false, ..bridge.clone() }]);
    assert_eq!(down.remedy.unwrap(), "ip link set br0 up");
    assert!(judge(&[Interface { kind: None, ..bridge }]).found.contains("is no bridge"));
    assert!(judge(&[]).remedy.unwrap().starts_with("ip link add br0 type bridge"));
    assert_eq!(networks(&[], &[])[0].status, Status::Advice);
}

#[test]
fn peers_answer_or_not() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let config = config(&format!("[[peer]]\nname = \"host-b\"\ncontrol = \"{address}\""));
    assert_eq!(peers(&config.peers)[0].status, Status::Ok);
    drop(listener);
    let silent = &peers(&config.peers)[0];
    assert!(silent.status == Status::Missing && silent.found.contains(&address.to_string()), "{silent:?}");
    assert!(silent.remedy.as_ref().unwrap().contains("on host-b: systemctl start memlaned"));
    assert_eq!(peers(&[])[0].status, Status::Missing);
}
