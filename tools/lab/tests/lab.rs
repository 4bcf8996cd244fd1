//! Labs are made, used and removed. Root is needed.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use memlane_lab::{
    HostId, HugePages, Lab, LabHost, LabOptions, Loss, Rate, Requirement, say_skipped, skip, wait_for,
};

/// Long enough for a busy machine: it only bounds a failure.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn the_hosts_talk_over_control_and_over_every_port() {
    if skip("the_hosts_talk_over_control_and_over_every_port", Requirement::LAB) {
        return;
    }
    let lab = Lab::new(LabOptions { ports: 3, ..LabOptions::default() }).expect("a lab");
    let [a, b] = lab.hosts();
    assert_eq!((a.ports().len(), b.ports().len()), (3, 3));

    let addresses = |host: &LabHost| {
        let ports = host.ports().iter().map(|port| port.address);
        std::iter::once(host.control_address()).chain(ports).collect::<Vec<_>>()
    };
    for (from, to) in addresses(a).into_iter().zip(addresses(b)) {
        let (mut client, mut server) = connect(&lab, (to, 7000).into());
        assert_eq!(server.peer_addr().expect("a peer").ip(), from, "each port is a network of its own");
        client.write_all(b"ping").expect("a write");
        let mut received = [0; 4];
        server.read_exact(&mut received).expect("a read");
        assert_eq!(&received, b"ping");
    }
}

#[test]
fn a_port_keeps_to_its_rate() {
    if skip("a_port_keeps_to_its_rate", Requirement::LAB) {
        return;
    }
    let rate: Rate = "1gbit".parse().expect("a rate");
    let lab = Lab::new(LabOptions { port_rate: Some(rate), ..LabOptions::default() }).expect("a lab");
    // Reported, not asserted: a busy machine is no fault of the lab.
    eprintln!("1gbit carries {:.3} Gbit/s", transfer_gbits(&lab, 32 << 20));
    lab.set_port_rate(0, Some("250mbit".parse().expect("a rate"))).expect("a lower rate");
    eprintln!("250mbit carries {:.3} Gbit/s", transfer_gbits(&lab, 16 << 20));
    lab.set_port_rate(0, None).expect("no rate");
    eprintln!("no limit carries {:.3} Gbit/s", transfer_gbits(&lab, 256 << 20));
}

#[test]
fn nothing_is_left_of_a_dropped_lab() {
    if skip("nothing_is_left_of_a_dropped_lab", Requirement::LAB) {
        return;
    }
    let lab = Lab::new(LabOptions { bridge: true, ..LabOptions::default() }).expect("a lab");
    let host = lab.host(HostId::B);
    let mut process = host.spawn("sleeper", sleeper(host)).expect("a program");
    let paths = lab.hosts().each_ref().map(|host| (host.namespace_path(), host.directory().to_owned()));
    assert!(paths.iter().all(|(namespace, directory)| namespace.exists() && directory.is_dir()));

    drop(lab);
    for (namespace, directory) in paths {
        assert!(!namespace.exists() && !directory.exists());
    }
    let status = process.wait_timeout(PATIENCE).expect("a wait");
    assert!(status.is_some_and(|status| !status.success()), "programs end with their lab: {status:?}");
}

#[test]
fn what_a_dead_process_left_is_swept() {
    if skip("what_a_dead_process_left_is_swept", Requirement::LAB) {
        return;
    }
    // Above the largest pid that Linux gives out.
    let stale = "memlane-4194305-0-a";
    let status = Command::new("ip").args(["netns", "add", stale]).status().expect("ip");
    assert!(status.success());
    let _lab = Lab::new(LabOptions::default()).expect("a lab");
    assert!(!Path::new("/run/netns").join(stale).exists());
}

#[test]
fn a_program_runs_inside_its_host() {
    if skip("a_program_runs_inside_its_host", Requirement::LAB) {
        return;
    }
    let lab = Lab::new(LabOptions { ports: 2, ..LabOptions::default() }).expect("a lab");
    let output = lab.host(HostId::A).command("ls").arg("/sys/class/net").output().expect("ls");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).split_whitespace().collect::<Vec<_>>(),
        ["ctl0", "lo", "port0", "port1"]
    );
}

#[test]
fn a_process_is_watched_and_killed() {
    if skip("a_process_is_watched_and_killed", Requirement::LAB) {
        return;
    }
    let lab = Lab::new(LabOptions::default()).expect("a lab");
    let host = lab.host(HostId::A);

    let mut process = host.spawn("dropped", sleeper(host)).expect("a program");
    assert!(process.is_running());
    assert!(process.wait_timeout(Duration::ZERO).expect("a wait").is_none());
    wait_for("its output", PATIENCE, || (process.log_tail() == "out\nerr").then_some(())).expect("output");
    let directory = format!("/proc/{}", process.pid());
    drop(process);
    assert!(!Path::new(&directory).exists(), "killed and reaped");

    let mut process = host.spawn("terminated", sleeper(host)).expect("a program");
    process.terminate().expect("a signal");
    assert!(process.wait_timeout(PATIENCE).expect("a wait").is_some());
    process.terminate().expect("the second is harmless");

    let mut process = host.spawn("killed", sleeper(host)).expect("a program");
    assert!(!process.kill().expect("a kill").success());
    assert!(!process.is_running());

    let error = host.spawn("missing", host.command("/nonexistent")).expect_err("no such program");
    assert!(format!("{error:#}").contains("/nonexistent"), "{error:#}");
}

#[test]
fn a_program_outlives_the_thread_that_spawned_it() {
    if skip("a_program_outlives_the_thread_that_spawned_it", Requirement::LAB) {
        return;
    }
    let lab = Lab::new(LabOptions::default()).expect("a lab");
    let host = lab.host(HostId::A);
    let spawn = || host.spawn("sleeper", sleeper(host)).expect("a program");
    let mut process = std::thread::scope(|scope| scope.spawn(spawn).join().expect("no panic"));
    wait_for("its output", PATIENCE, || (!process.log_tail().is_empty()).then_some(())).expect("output");
    assert!(process.is_running());
}

#[test]
fn a_port_that_is_down_has_no_carrier_at_the_other_end() {
    if skip("a_port_that_is_down_has_no_carrier_at_the_other_end", Requirement::LAB) {
        return;
    }
    let lab = Lab::new(LabOptions::default()).expect("a lab");
    assert_carrier_follows(&lab);
    connect(&lab, (lab.host(HostId::B).ports()[0].address, 7000).into());
}

/// What one end does to the first port, the other sees.
fn assert_carrier_follows(lab: &Lab) {
    let carrier_at_b = || read_sys(lab.host(HostId::B), "port0/carrier") == "1";
    assert!(carrier_at_b());
    lab.host(HostId::A).port_down(0).expect("down");
    wait_for("the loss of the carrier", PATIENCE, || (!carrier_at_b()).then_some(())).expect("no carrier");
    lab.host(HostId::A).port_up(0).expect("up");
    wait_for("the carrier", PATIENCE, || carrier_at_b().then_some(())).expect("a carrier");
}

#[test]
fn a_port_with_a_delay_keeps_packets_that_long_and_whole() {
    if skip("a_port_with_a_delay_keeps_packets_that_long_and_whole", Requirement::LAB) {
        return;
    }
    let delay = Duration::from_millis(30);
    let lab = Lab::new(LabOptions { port_delay: Some(delay), ..LabOptions::default() }).expect("a lab");
    let (mut client, mut server) = connect(&lab, (lab.host(HostId::B).ports()[0].address, 7000).into());
    let start = Instant::now();
    client.write_all(b"ping").expect("a write");
    server.read_exact(&mut [0; 4]).expect("a read");
    server.write_all(b"pong").expect("a write");
    client.read_exact(&mut [0; 4]).expect("a read");
    let round_trip = start.elapsed();
    assert!(round_trip >= 2 * delay, "{round_trip:?}");

    let sent: Vec<u8> = (0..8_u32 << 20).map(|index| (index % 251) as u8).collect();
    let received = std::thread::scope(|scope| {
        scope.spawn(|| client.write_all(&sent).expect("a write"));
        let mut received = vec![0; sent.len()];
        server.read_exact(&mut received).expect("a read");
        received
    });
    assert!(received == sent);

    // As between the ends of a veth pair.
    assert_carrier_follows(&lab);
    connect(&lab, (lab.host(HostId::B).ports()[0].address, 7001).into());
}

#[test]
fn a_port_that_loses_packets_is_noticed_by_its_users_alone() {
    if skip("a_port_that_loses_packets_is_noticed_by_its_users_alone", Requirement::LAB) {
        return;
    }
    let loss = |share| Some(Loss { share, seed: 1 });
    let datagrams_through = |share| {
        let lab = Lab::new(LabOptions { port_loss: loss(share), ..LabOptions::default() }).expect("a lab");
        let to = (lab.host(HostId::B).ports()[0].address, 7000);
        let receiver = lab.host(HostId::B).run_in(|| UdpSocket::bind(to).expect("a socket")).expect("a host");
        let sender =
            lab.host(HostId::A).run_in(|| UdpSocket::bind("0.0.0.0:0").expect("a socket")).expect("a host");
        for _ in 0..100 {
            sender.send_to(b"hello", to).expect("a datagram");
        }
        receiver.set_read_timeout(Some(Duration::from_millis(500))).expect("a timeout");
        (0..100).take_while(|_| receiver.recv(&mut [0; 8]).is_ok()).count()
    };
    assert_eq!(datagrams_through(0.0), 100);
    assert_eq!(datagrams_through(1.0), 0);
    let some = datagrams_through(0.3);
    assert!((40..100).contains(&some), "{some} of 100");
}

#[test]
fn a_silent_port_drops_everything_and_nobody_is_told() {
    if skip("a_silent_port_drops_everything_and_nobody_is_told", Requirement::LAB) {
        return;
    }
    let rate = Some("1gbit".parse().expect("a rate"));
    let shaped = LabOptions { port_rate: rate, ..LabOptions::default() };
    let delayed = LabOptions { port_delay: Some(Duration::from_millis(1)), ..LabOptions::default() };
    for options in [LabOptions::default(), shaped, delayed] {
        let lab = Lab::new(options).expect("a lab");
        let (mut client, mut server) = connect(&lab, (lab.host(HostId::B).ports()[0].address, 7000).into());
        lab.silence_port(0, true).expect("silence");
        client.write_all(b"into the void").expect("nobody is told");
        server.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
        let error = server.read(&mut [0; 64]).expect_err("nothing comes");
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        for host in lab.hosts() {
            assert_eq!(read_sys(host, "port0/carrier"), "1");
        }
        lab.silence_port(0, false).expect("an end of silence");
        server.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut received = [0; 13];
        server.read_exact(&mut received).expect("TCP tries again");
        assert_eq!(&received, b"into the void");
    }
}

#[test]
fn the_observer_sees_what_leaves_the_bridge() {
    if skip("the_observer_sees_what_leaves_the_bridge", Requirement::LAB) {
        return;
    }
    let lab = Lab::new(LabOptions { bridge: true, ..LabOptions::default() }).expect("a lab");
    let host = lab.host(HostId::A);
    let bridge = host.bridge().expect("a bridge was asked for");
    let arguments = ["address", "add", "192.0.2.1/24", "broadcast", "192.0.2.255", "dev", &bridge.interface];
    assert!(host.command("ip").args(arguments).status().expect("ip").success());

    let counter = format!("{}/statistics/rx_packets", bridge.observer);
    assert_eq!(read_sys(host, &counter), "0", "nothing else talks on the bridge");
    host.run_in(|| {
        let socket = UdpSocket::bind("192.0.2.1:0").expect("a socket");
        socket.set_broadcast(true).expect("the right to broadcast");
        socket.send_to(b"hello", "192.0.2.255:9").expect("a datagram");
    })
    .expect("a namespace");
    wait_for("the frame", PATIENCE, || (read_sys(host, &counter) == "1").then_some(())).expect("one frame");
}

#[test]
fn huge_pages_are_given_back() {
    if skip("huge_pages_are_given_back", &[Requirement::Root]) {
        return;
    }
    let pool = || std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages").ok();
    let Some(before) = pool() else {
        say_skipped("huge_pages_are_given_back", "no pool of 2 MiB pages here");
        return;
    };
    match HugePages::reserve(2) {
        Ok(pages) => {
            assert_ne!(pool().as_ref(), Some(&before));
            drop(pages);
        }
        Err(error) => say_skipped("huge_pages_are_given_back", &format!("{error:#}")),
    }
    assert_eq!(pool(), Some(before));
}

#[test]
fn a_signal_cleans_up() {
    const CHILD: &str = "MEMLANE_LAB_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        memlane_lab::cleanup_on_signal().expect("handlers");
        let lab = Lab::new(LabOptions::default()).expect("a lab");
        println!("NAMESPACE {}", lab.host(HostId::A).namespace_path().display());
        std::thread::sleep(PATIENCE);
        return;
    }
    if skip("a_signal_cleans_up", Requirement::LAB) {
        return;
    }
    // This same test in a process of its own, inside a lab for the sake of the guard and the log.
    let lab = Lab::new(LabOptions::default()).expect("a lab");
    let host = lab.host(HostId::A);
    let mut command = host.command(std::env::current_exe().expect("the path of this program"));
    command.args(["--exact", "a_signal_cleans_up", "--nocapture"]).env(CHILD, "1");
    let mut process = host.spawn("child", command).expect("a child");
    let namespace = wait_for("the child's lab", PATIENCE, || {
        let log = std::fs::read_to_string(process.log()).ok()?;
        Some(log.split_once("NAMESPACE ")?.1.split_once('\n')?.0.to_owned())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", process.log_tail()));
    assert!(Path::new(&namespace).exists());

    process.terminate().expect("a signal");
    let status = process.wait_timeout(PATIENCE).expect("a wait").expect("an end");
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(15),
        "ended by the signal itself"
    );
    assert!(!Path::new(&namespace).exists());
}

fn sleeper(host: &LabHost) -> Command {
    let mut command = host.command("sh");
    command.args(["-c", "echo out; echo err >&2; exec sleep 1000"]);
    command
}

fn read_sys(host: &LabHost, file: &str) -> String {
    let output = host.command("cat").arg(format!("/sys/class/net/{file}")).output().expect("cat");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A connection from A to `address` at B: A's end, and B's.
fn connect(lab: &Lab, address: std::net::SocketAddr) -> (TcpStream, TcpStream) {
    let listener =
        lab.host(HostId::B).run_in(|| TcpListener::bind(address)).expect("a namespace").expect("a listener");
    let client = lab
        .host(HostId::A)
        .run_in(|| TcpStream::connect(address))
        .expect("a namespace")
        .expect("a connection");
    let (server, _) = listener.accept().expect("a connection");
    (client, server)
}

/// Sends over port 0, and returns what it carried in Gbit/s.
fn transfer_gbits(lab: &Lab, bytes: usize) -> f64 {
    let (mut client, mut server) = connect(lab, (lab.host(HostId::B).ports()[0].address, 7001).into());
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || client.write_all(&vec![1; bytes]).expect("a write"));
        let received = std::io::copy(&mut server, &mut std::io::sink()).expect("a read");
        assert_eq!(received, bytes as u64);
    });
    bytes as f64 * 8e-9 / start.elapsed().as_secs_f64()
}
