use std::fs;

use memlane_protocol::compression::Mode;
use memlane_protocol::convergence::Converge;

use super::*;
use crate::api::access::{Party, PartyId};

const FILE: &str = "/etc/memlane/memlaned.toml";

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new(FILE), text)
}

fn ok(text: &str) -> Config {
    parse(&format!("insecure = true\n{text}")).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// The complaint about a text that stands behind `insecure = true`, which is line 1.
fn complaint(text: &str) -> String {
    match parse(&format!("insecure = true\n{text}")) {
        Err(error) => error.to_string(),
        Ok(config) => panic!("{text}: accepted as {config:?}"),
    }
}

#[test]
fn one_key_is_enough() {
    let config = ok("");
    assert_eq!(config.api_socket, Path::new("/run/memlane/api.sock"));
    assert_eq!(config.attach_socket, Path::new("/run/memlane/attach.sock"));
    assert_eq!(config.journal, Path::new("/var/lib/memlane"));
    assert_eq!(config.metrics, None);
    assert_eq!(config.control, "0.0.0.0:7410".parse().unwrap());
    assert_eq!(config.lane_port, 7411);
    assert!(config.attach_users.contains(&0));
    assert!(config.attach_users.contains(&rustix::process::geteuid().as_raw()));
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    assert_eq!((config.access.own_user, config.access.own_group), (user, group));
    assert_eq!(
        config.access.operators.iter().map(|party| party.id).collect::<Vec<_>>(),
        [PartyId::Group(group)]
    );
    assert!(config.access.viewers.is_empty());
    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.guests, GuestsConfig::default());
    assert!(config.ports.is_empty() && config.peers.is_empty() && config.networks.is_empty());
}

#[test]
fn all_keys_are_read() {
    let config = ok(r#"
        host = "host-a"
        api_socket = "/tmp/a.sock"
        attach_socket = "/tmp/b.sock"
        journal = "/tmp/j"
        metrics = "127.0.0.1:9410"
        control = "10.0.0.1"
        lane_port = 7500
        attach_users = ["root", 990]
        [[port]]
        name = "a"
        interface = "eth1"
        address = "10.1.0.1"
        speed = "10gbit"
        lanes = 2
        congestion_control = "bbr"
        [[port]]
        name = "b"
        address = "fd00::1"
        [[peer]]
        name = "host-b"
        control = "10.0.0.2"
        [[peer]]
        name = "host-c"
        control = "[fd00::3]:7500"
        may_start_guests = true
        [[network]]
        name = "lan"
        bridge = "br0"
        [api]
        operators = ["root", 1000, "@root"]
        viewers = ["@990"]
        [attach]
        guests_per_user = 3
        descriptors_per_user = 99
        memory_per_user = "2TiB"
        [limits]
        downtime = "1.5s"
        min_bandwidth = "1gbit"
        max_rounds = 7
        converge = "auto"
        max_stun = 60
        compression = "off"
        patience = "90s"
silence = "2s"
        memory_reserve = "1GiB"
        [guests]
        directory = "/tmp/guests"
        memory = "/dev/hugepages/memlane"
        shim = "/opt/memlane/libmemlane_shim.so"
        qemu = ["/opt/qemu/bin/qemu-system-x86_64", "/usr/bin/qemu-system-x86_64"]
        users = "2000-2999"
        groups = [104, "no-such-group"]
        starter_socket = "/tmp/starter.sock"
        starter = "/opt/memlane/memlane-starter"
    "#);
    assert_eq!(config.host.as_str(), "host-a");
    assert_eq!(config.metrics, Some("127.0.0.1:9410".parse().unwrap()));
    assert_eq!(config.control, "10.0.0.1:7410".parse().unwrap());
    assert_eq!(config.attach_users, [0, 990]);
    assert_eq!(
        config.ports[0],
        PortConfig {
            name: "a".parse().unwrap(),
            interface: Some("eth1".to_owned()),
            address: "10.1.0.1".parse().unwrap(),
            speed: Some(Rate(10_000_000_000)),
            lanes: 2,
            congestion_control: Some("bbr".to_owned()),
        }
    );
    assert_eq!((config.ports[1].lanes, config.ports[1].speed), (1, None));
    assert_eq!(config.peers[0].control, "10.0.0.2:7410".parse().unwrap());
    assert_eq!(config.peers[1].control, "[fd00::3]:7500".parse().unwrap());
    assert_eq!((config.peers[0].may_start_guests, config.peers[1].may_start_guests), (false, true));
    assert_eq!(config.networks[0].bridge, "br0");
    assert_eq!(
        config.guests,
        GuestsConfig {
            directory: "/tmp/guests".into(),
            memory: "/dev/hugepages/memlane".into(),
            shim: "/opt/memlane/libmemlane_shim.so".into(),
            qemu: vec!["/opt/qemu/bin/qemu-system-x86_64".into(), "/usr/bin/qemu-system-x86_64".into()],
            users: "2000-2999".parse().unwrap(),
            groups: vec![104],
            starter_socket: "/tmp/starter.sock".into(),
            starter: "/opt/memlane/memlane-starter".into(),
        }
    );
    let party = |id, name: &str| Party { id, name: name.to_owned() };
    let root = [party(PartyId::User(0), "root"), party(PartyId::User(1000), "1000")];
    assert_eq!(config.access.operators[..2], root);
    assert_eq!(config.access.operators[2..], [party(PartyId::Group(0), "@root")]);
    assert_eq!(config.access.viewers, [party(PartyId::Group(990), "@990")]);
    let memory_per_user = Size(2 << 40);
    assert_eq!(config.attach, AttachConfig { guests_per_user: 3, descriptors_per_user: 99, memory_per_user });
    assert_eq!(
        config.limits,
        Limits {
            downtime: Duration::from_millis(1500),
            min_bandwidth: Rate(1_000_000_000),
            max_iterations: 7,
            converge: Converge::Auto,
            max_stun: Some(60),
            compression: Mode::Off,
            patience: Duration::from_secs(90),
            silence: Duration::from_secs(2),
            memory_reserve: Size(1 << 30),
        }
    );
}

#[test]
fn without_a_word_about_it_the_keys_of_the_host_are_needed() {
    let config = parse("host = \"host-a\"").unwrap();
    let files = config.keys.clone().unwrap();
    // Under the names that `memlanectl keys issue` gives them.
    let keys = Path::new("/etc/memlane/keys");
    assert_eq!(files.certificate, keys.join(memlane_keys::CERTIFICATE));
    assert_eq!((files.key, files.ca), (keys.join(memlane_keys::KEY), keys.join(memlane_keys::CA)));
    assert!(parse("insecure = false").unwrap().keys.is_some());
    let config =
        parse("host = \"host-a\"\n[keys]\ncertificate = \"/nonexistent/a\"\nkey = \"/b\"\nca = \"/c\"")
            .unwrap();
    let expected = KeyFiles { certificate: "/nonexistent/a".into(), key: "/b".into(), ca: "/c".into() };
    assert_eq!(config.keys, Some(expected));
    let message = config.credentials().err().unwrap().to_string();
    for part in ["cannot read the certificate /nonexistent/a", "memlanectl keys init", "insecure = true"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(ok("").keys.is_none() && ok("").credentials().unwrap().is_none());
    let message = parse("insecure = 1").unwrap_err().to_string();
    assert!(message.contains("insecure = 1 is not allowed; give it true or false"), "{message}");
}

/// Each kind of mistake: the text, the line, the key, what was found and a part of what is allowed.
#[test]
fn every_complaint_names_file_line_key_found_and_allowed() {
    let long = format!("api_socket = \"/{}\"", "x".repeat(107));
    let port = "[[port]]\nname = \"a\"\naddress = \"10.1.0.1\"\n";
    let mistakes = [
        ("host = \"a/b\"".to_owned(), 2, "host", "\"a/b\"", "A-Z a-z 0-9"),
        ("host = 5".to_owned(), 2, "host", "5", "A-Z a-z 0-9"),
        ("\napi_socket = \"api.sock\"".to_owned(), 3, "api_socket", "\"api.sock\"", "begins with /"),
        (long, 2, "api_socket", "\"/xxx", "107 bytes"),
        ("attach_socket = []".to_owned(), 2, "attach_socket", "[]", "begins with /"),
        ("journal = true".to_owned(), 2, "journal", "true", "begins with /"),
        ("metrics = \"127.0.0.1\"".to_owned(), 2, "metrics", "\"127.0.0.1\"", "ADDRESS:PORT"),
        ("metrics = \"localhost:9410\"".to_owned(), 2, "metrics", "\"localhost:9410\"", "numeric"),
        ("control = \"host-a:7410\"".to_owned(), 2, "control", "\"host-a:7410\"", "default port is 7410"),
        ("control = \"10.0.0.1:0\"".to_owned(), 2, "control", "\"10.0.0.1:0\"", "ADDRESS:PORT"),
        ("lane_port = 0".to_owned(), 2, "lane_port", "0", "from 1 to 65535"),
        ("lane_port = 70000".to_owned(), 2, "lane_port", "70000", "from 1 to 65535"),
        ("lane_port = \"7411\"".to_owned(), 2, "lane_port", "\"7411\"", "from 1 to 65535"),
        ("attach_users = \"root\"".to_owned(), 2, "attach_users", "\"root\"", "a list of user names"),
        (
            "attach_users = [\n0,\n\"no-such-user\"]".to_owned(),
            4,
            "attach_users",
            "\"no-such-user\"",
            "/etc/passwd",
        ),
        (
            "attach_users = [\n990,\n2100000000]".to_owned(),
            4,
            "attach_users",
            "2100000000",
            "users other than those of guests that this daemon starts (2100000000-2100065535)",
        ),
        (
            "attach_users = [2500]\n[guests]\nusers = \"2000-2999\"".to_owned(),
            2,
            "attach_users",
            "2500",
            "2000-2999",
        ),
        (
            "[guests]\nusers = \"0-2999\"".to_owned(),
            3,
            "guests.users",
            "\"0-2999\"",
            "from 1000 to 2147483647",
        ),
        ("[guests]\ngroups = [0]".to_owned(), 3, "guests.groups", "0", "neither root's group"),
        ("attach_users = [-1]".to_owned(), 2, "attach_users", "-1", "user ids"),
        ("api = 5".to_owned(), 2, "api", "5", "a table"),
        (
            "[api]\noperators = \"@root\"".to_owned(),
            3,
            "api.operators",
            "\"@root\"",
            "a list of users and groups",
        ),
        ("[api]\noperators = [\"no-such\"]".to_owned(), 3, "api.operators", "\"no-such\"", "/etc/passwd"),
        ("[api]\nviewers = [\n\"@no-such\"]".to_owned(), 4, "api.viewers", "\"@no-such\"", "/etc/group"),
        ("[api]\nviewers = [\"@\"]".to_owned(), 3, "api.viewers", "\"@\"", "groups with @ before them"),
        ("[api]\nviewers = [-1]".to_owned(), 3, "api.viewers", "-1", "numeric ids"),
        ("port = 5".to_owned(), 2, "port", "5", "[[port]]"),
        ("port = [5]".to_owned(), 2, "port", "5", "a table"),
        (port.replace("10.1.0.1", "eth1"), 4, "port.address", "\"eth1\"", "numeric address"),
        (port.replace("10.1.0.1", "0.0.0.0"), 4, "port.address", "\"0.0.0.0\"", "numeric address"),
        (
            format!("{port}interface = \"a-name-too-long-\""),
            5,
            "port.interface",
            "\"a-name-too-long-\"",
            "1 to 15",
        ),
        (format!("{port}speed = \"fast\""), 5, "port.speed", "\"fast\"", "gbit"),
        (format!("{port}speed = 10"), 5, "port.speed", "10", "gbit"),
        (format!("{port}lanes = 0"), 5, "port.lanes", "0", "from 1 to 16"),
        (format!("{port}lanes = 17"), 5, "port.lanes", "17", "from 1 to 16"),
        (
            format!("{port}congestion_control = \"\""),
            5,
            "port.congestion_control",
            "\"\"",
            "tcp_allowed_congestion_control",
        ),
        ("[[peer]]\nname = \"b\"\ncontrol = \"b\"".to_owned(), 4, "peer.control", "\"b\"", "ADDRESS:PORT"),
        (
            "host = \"a\"\n[[peer]]\nname = \"a\"\ncontrol = \"10.0.0.1\"".to_owned(),
            4,
            "peer.name",
            "\"a\"",
            "another host",
        ),
        (
            "[[network]]\nname = \"lan\"\nbridge = \"br/0\"".to_owned(),
            4,
            "network.bridge",
            "\"br/0\"",
            "1 to 15",
        ),
        (
            "[[peer]]\nname = \"b\"\ncontrol = \"10.0.0.1\"\nmay_start_guests = 1".to_owned(),
            5,
            "peer.may_start_guests",
            "1",
            "true or false",
        ),
        ("[guests]\ndirectory = \"guests\"".to_owned(), 3, "guests.directory", "\"guests\"", "begins with /"),
        ("[guests]\nmemory = 5".to_owned(), 3, "guests.memory", "5", "begins with /"),
        ("[guests]\nshim = \"x.so\"".to_owned(), 3, "guests.shim", "\"x.so\"", "begins with /"),
        ("[guests]\nqemu = \"/q\"".to_owned(), 3, "guests.qemu", "\"/q\"", "a list of paths"),
        ("[guests]\nqemu = [\"/q\",\n\"q\"]".to_owned(), 4, "guests.qemu", "\"q\"", "begins with /"),
        ("[attach]\nguests_per_user = 0".to_owned(), 3, "attach.guests_per_user", "0", "from 1 to 1000000"),
        ("[attach]\nmemory_per_user = 5".to_owned(), 3, "attach.memory_per_user", "5", "TiB"),
        ("limits = 5".to_owned(), 2, "limits", "5", "a table"),
        ("[limits]\ndowntime = \"300\"".to_owned(), 3, "limits.downtime", "\"300\"", "\"300ms\""),
        ("[limits]\ndowntime = \"0s\"".to_owned(), 3, "limits.downtime", "\"0s\"", "from 1ms to 1min"),
        ("[limits]\nmin_bandwidth = 250".to_owned(), 3, "limits.min_bandwidth", "250", "\"250mbit\""),
        ("[limits]\nmax_rounds = 0".to_owned(), 3, "limits.max_rounds", "0", "from 1 to 1000"),
        (
            "[limits]\nconverge = \"slow\"".to_owned(),
            3,
            "limits.converge",
            "\"slow\"",
            "\"stun\", \"postcopy\"",
        ),
        ("[limits]\nmax_stun = 100".to_owned(), 3, "limits.max_stun", "100", "from 0 to 99"),
        ("[limits]\ncompression = true".to_owned(), 3, "limits.compression", "true", "\"auto\" or \"off\""),
        ("[limits]\nsilence = \"1us\"".to_owned(), 3, "limits.silence", "\"1us\"", "from 100ms to 10min"),
        ("[limits]\nmemory_reserve = \"1GB\"".to_owned(), 3, "limits.memory_reserve", "\"1GB\"", "GiB"),
    ];
    for (text, line, key, found, allowed) in mistakes {
        let message = complaint(&text);
        assert!(message.starts_with(&format!("{FILE}:{line}: {key} = {found}")), "{text}\n{message}");
        assert!(
            message.contains("is not allowed; give it ") && message.contains(allowed),
            "{text}\n{message}"
        );
    }
}

#[test]
fn an_unknown_key_is_told_which_there_are() {
    for (text, line, key, known) in [
        ("hots = \"a\"", 2, "hots", "host, api_socket"),
        ("[limits]\ndown_time = \"1s\"", 3, "limits.down_time", "downtime, min_bandwidth"),
        (
            "[[port]]\nname = \"a\"\naddress = \"10.1.0.1\"\nmtu = 9000",
            5,
            "port.mtu",
            "name, address, interface",
        ),
        ("[[peer]]\nname = \"b\"\ncontrol = \"10.0.0.2\"\nkey = 1", 5, "peer.key", "name, control"),
        ("[api]\nviewer = []", 3, "api.viewer", "operators, viewers"),
        ("[[network]]\nname = \"n\"\nbridge = \"br0\"\nvlan = 5", 5, "network.vlan", "name, bridge"),
    ] {
        let message = complaint(text);
        assert!(
            message.starts_with(&format!("{FILE}:{line}: unknown key {key}; allowed here: ")),
            "{message}"
        );
        assert!(message.contains(known), "{message}");
    }
}

#[test]
fn what_is_missing_is_named_with_the_line_of_its_table() {
    for (text, line, key) in [
        ("[[port]]\nname = \"a\"", 2, "port.address"),
        ("\n[[port]]\naddress = \"10.1.0.1\"", 3, "port.name"),
        ("[[peer]]\nname = \"b\"", 2, "peer.control"),
        ("[[network]]\nname = \"b\"", 2, "network.bridge"),
    ] {
        let message = complaint(text);
        assert!(message.starts_with(&format!("{FILE}:{line}: {key} is missing; give it ")), "{message}");
    }
}

#[test]
fn what_must_be_unique_is_named_with_both_lines() {
    let twice = |a: &str, b: &str| complaint(&format!("{a}\n{b}"));
    let port = |name, address| format!("[[port]]\nname = \"{name}\"\naddress = \"{address}\"");
    let message = twice(&port("a", "10.0.0.1"), &port("a", "10.0.0.2"));
    assert!(message.contains(":6: port.name = \"a\" stands on line 3 already"), "{message}");
    let message = twice(&port("a", "10.0.0.1"), &port("b", "10.0.0.1"));
    assert!(message.contains(":7: port.address = \"10.0.0.1\" stands on line 4 already"), "{message}");
    let peer = |name, address| format!("[[peer]]\nname = \"{name}\"\ncontrol = \"{address}\"");
    let message = twice(&peer("a", "10.0.0.1"), &peer("a", "10.0.0.2"));
    assert!(message.contains("peer.name = \"a\" stands on line 3 already"), "{message}");
    let network = |name| format!("[[network]]\nname = \"{name}\"\nbridge = \"br0\"");
    let message = twice(&network("lan"), &network("lan"));
    assert!(message.contains("network.name = \"lan\" stands on line 3 already"), "{message}");
}

#[test]
fn broken_toml_and_missing_files_are_named() {
    let message = complaint("host = \"a");
    assert!(message.starts_with(&format!("{FILE}:2: this is no TOML: ")), "{message}");
    let message = complaint("lane_port = 7\nlane_port = 8");
    assert!(message.contains("this is no TOML: duplicate key"), "{message}");
    let message = Config::load(Path::new("/no/such/memlaned.toml")).unwrap_err().to_string();
    assert!(message.contains("cannot read the configuration /no/such/memlaned.toml"), "{message}");
}

/// In the example every `#key = value` line without a blank states a default, or is an example
/// of what has none.
#[test]
fn the_example_states_the_defaults() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd/memlaned.toml");
    let text = fs::read_to_string(&file).unwrap();
    assert_eq!(Config::parse(&file, &text).unwrap(), parse("").unwrap());

    let uncommented: Vec<&str> = text
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => rest,
            _ => line,
        })
        .collect();
    let stated = Config::parse(&file, &uncommented.join("\n")).unwrap();
    let default = parse("").unwrap();
    assert_eq!(
        Config {
            // What the machine decides, or what there is none of until it is configured.
            host: stated.host.clone(),
            attach_users: stated.attach_users.clone(),
            access: stated.access.clone(),
            metrics: stated.metrics,
            ports: stated.ports.clone(),
            peers: stated.peers.clone(),
            networks: stated.networks.clone(),
            limits: Limits { max_stun: stated.limits.max_stun, ..default.limits.clone() },
            ..default
        },
        stated
    );
    assert_eq!((stated.ports.len(), stated.peers.len(), stated.networks.len()), (2, 1, 1));
    assert_eq!(stated.attach_users, [0]);
    assert_eq!((stated.access.operators.len(), stated.access.viewers.len()), (1, 0));
}

proptest::proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "(insecure = true\n)?(\\PC|[=\"\\[\\]\n]){0,80}") {
        let _ = parse(&text);
    }
}
