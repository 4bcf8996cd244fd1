//! Crowds and strangers: whoever can connect takes nothing from those who are meant to.

mod common;

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Lane, Peer, Stage, captured, connect, greet, hello, host_a, lane, lane_address, offered, ours};
use memlane_kvm::packet;
use memlane_lab::{HostId, LabOptions};
use memlane_net::config::{CONTROL_PORT, LANE_PORT};
use memlane_protocol::wire::attach::{FromVmm, MAX_PACKET_BYTES, RunState, ToVmm, VERSIONS, VmmHello};
use memlane_protocol::wire::control::Control;
use memlane_protocol::wire::hello::{Answer, Purpose};
use memlane_protocol::wire::machine::GuestShape;

/// Connections that say nothing, before a guest moves; more come while it does.
const CROWD: usize = 6000;
/// How soon whoever says nothing is hung up on.
const SOON: Duration = Duration::from_secs(3);

/// Host A's daemon has all of this against it from its own addresses, and from that of a stranger.
#[test]
fn silent_connections_do_not_keep_a_migration_from_its_ports() {
    let test = "silent_connections_do_not_keep_a_migration_from_its_ports";
    let Some(mut stage) = Stage::insecure(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    common::announce(&stage);
    let control = IpAddr::V4(stage.rig.lab().host(HostId::B).control_address());
    let doors = [SocketAddr::new(control, CONTROL_PORT), lane_address(&stage)];
    let (ended, opened) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let crowds: Vec<_> = [HostId::A, HostId::B]
        .into_iter()
        .map(|id| {
            let (ended, opened) = (ended.clone(), opened.clone());
            let crowd = move || {
                std::thread::spawn(move || {
                    let mut held = Vec::new();
                    while !ended.load(Ordering::Relaxed) {
                        for door in doors {
                            if let Ok(stream) = TcpStream::connect_timeout(&door, SOON) {
                                held.push(stream);
                                opened.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                        // Held open on this side, as long as there are descriptors.
                        if held.len() > 3000 {
                            held.drain(..1000);
                        }
                        if opened.load(Ordering::Relaxed) > CROWD {
                            std::thread::sleep(Duration::from_millis(5));
                        }
                    }
                })
            };
            stage.rig.lab().host(id).run_in(crowd).unwrap()
        })
        .collect();
    memlane_lab::wait_for("a crowd", Duration::from_secs(60), || {
        (opened.load(Ordering::Relaxed) > CROWD).then_some(())
    })
    .unwrap();
    stage.assert_moves("web1", &mut there);
    ended.store(true, Ordering::Relaxed);
    crowds.into_iter().for_each(|crowd| crowd.join().unwrap());
    eprintln!("{} silent connections", opened.load(Ordering::Relaxed));
    common::wait_for_exit(guest.process());
    // One line for all that were turned away at each door.
    let log = stage.log(HostId::B);
    assert!((1..=8).contains(&log.matches("is that of no peer").count()), "{log}");
}

#[test]
fn who_says_nothing_is_hung_up_on() {
    let Some(stage) = Stage::insecure("who_says_nothing_is_hung_up_on", LabOptions::default()) else {
        return;
    };
    for port in [CONTROL_PORT, LANE_PORT] {
        let mut stream = connect(&stage, port);
        let began = Instant::now();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    }
    // A stranger, before it says anything: host B is no peer of its own.
    let control = IpAddr::V4(stage.rig.lab().host(HostId::B).control_address());
    for door in [SocketAddr::new(control, CONTROL_PORT), lane_address(&stage)] {
        let purpose = if door.port() == CONTROL_PORT { Purpose::Control } else { Purpose::Probe };
        let answer = stage.rig.lab().host(HostId::B).run_in(|| {
            let mut stream = TcpStream::connect(door).unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            greet(&mut stream, &hello(host_a(), purpose))
        });
        let error = answer.unwrap().unwrap_err();
        assert!(!matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    }
}

/// Whether the daemon keeps a lane.
fn lives(lane: &mut Lane) -> bool {
    lane.0.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    match lane.0.read(&mut [0; 64]) {
        Ok(count) => count > 0,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

#[test]
fn a_token_alone_opens_no_lane() {
    let Some(mut stage) = Stage::insecure("a_token_alone_opens_no_lane", LabOptions::default()) else {
        return;
    };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let offer = captured(&mut stage);
    let (peer, accept) = offered(&stage, &offer);
    let refused = |host: &str, purpose| {
        let answer = greet(&mut connect(&stage, LANE_PORT), &hello(host.parse().unwrap(), purpose)).unwrap();
        let Answer::Refused { reason } = answer else { panic!("{purpose:?} of {host} is welcome") };
        reason
    };
    // Another host.
    for purpose in [Purpose::Lane { token: accept.token, lane: 0 }, Purpose::Faults { token: accept.token }] {
        let reason = refused("host-x", purpose);
        assert!(reason.contains("the migration is with another"), "{reason}");
    }
    // The same number twice, whether the first one lives or not.
    let first = lane(&stage, &accept, 0);
    let again = Purpose::Lane { token: accept.token, lane: 0 };
    assert!(refused("host-a", again).contains("lane 0 of this migration has come already"));
    drop(first);
    assert!(refused("host-a", again).contains("lane 0 of this migration has come already"));
    let mut second = lane(&stage, &accept, 1);
    assert!(lives(&mut second));

    // A lane for faults that lives keeps its place.
    let mut serving = Peer::call(&stage);
    serving.send(&Control::Fetch(ours()));
    let Control::Accept(fetch) = serving.receive() else { panic!("the offer to serve is not accepted") };
    let faults = || {
        let mut stream = connect(&stage, LANE_PORT);
        let answer = greet(&mut stream, &hello(host_a(), Purpose::Faults { token: fetch.token })).unwrap();
        assert!(matches!(answer, Answer::Welcome { .. }), "{answer:?}");
        Lane(stream)
    };
    let mut living = faults();
    faults().wait_for_hang_up();
    assert!(lives(&mut living), "the lane that lived was hung up on");
    stage.wait_for_log(HostId::B, "refused a second lane for faults");
    serving.stream.shutdown(Shutdown::Both).unwrap();
    peer.stream.shutdown(Shutdown::Both).unwrap();
    stage.wait_for_end_of_ours("closed the control connection");
    stage.assert_runs_on("web1", &mut guest);
    stage.assert_moves("web1", &mut there);
}

fn attach_socket(stage: &Stage) -> PathBuf {
    stage.rig.lab().host(HostId::B).directory().join("attach.sock")
}

/// What a VMM says first, by hand.
fn attach(stage: &Stage, shape: GuestShape, memory: &OwnedFd) -> (OwnedFd, ToVmm) {
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::SEQPACKET, None).unwrap();
    socket.connect(&socket2::SockAddr::unix(attach_socket(stage)).unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let (oldest, newest) = VERSIONS;
    let descriptors: Vec<_> = shape.regions.iter().map(|_| memory.as_fd()).collect();
    let run_state = RunState::Running;
    let hello = FromVmm::Hello(VmmHello { oldest, newest, run_state, bond: None, shape });
    packet::send(&socket, &hello.encode(), &descriptors).unwrap();
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    let (length, _) = packet::recv(&socket, &mut buffer).unwrap();
    (socket.into(), ToVmm::decode(&buffer[..length]).unwrap())
}

#[test]
fn a_sparse_giant_leaves_room_for_others() {
    let Some(mut stage) = Stage::insecure("a_sparse_giant_leaves_room_for_others", LabOptions::default())
    else {
        return;
    };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let mut shape = captured(&mut stage).shape;
    shape.regions.truncate(1);
    let bytes = 60 << 40;
    let memory = rustix::fs::memfd_create("giant", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&memory, bytes).unwrap();
    let seals = rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW;
    rustix::fs::fcntl_add_seals(&memory, seals).unwrap();
    shape.regions[0].bytes = bytes;
    for number in 0..4 {
        shape.name = format!("giant{number}").parse().unwrap();
        let (_socket, answer) = attach(&stage, shape.clone(), &memory);
        let ToVmm::Refused { reason } = answer else { panic!("a giant is welcome: {answer:?}") };
        assert!(reason.contains("attach.memory_per_user"), "{reason}");
    }
    // Many that say nothing, by the same user.
    let mut crowd = Vec::new();
    for _ in 0..200 {
        let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::SEQPACKET, None).unwrap();
        socket.connect(&socket2::SockAddr::unix(attach_socket(&stage)).unwrap()).unwrap();
        crowd.push(socket);
    }
    stage.wait_for_log(HostId::B, "have not introduced themselves");
    drop(crowd);
    stage.assert_runs_on("web1", &mut guest);
    stage.assert_moves("web1", &mut there);
    // One line for all of them.
    let log = stage.log(HostId::B);
    assert!(log.matches("have not introduced themselves").count() <= 2, "{log}");
    assert!(log.matches("attach.memory_per_user").count() <= 2, "{log}");
}
