//! What a migration does to the network, and the network to it.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::{GUEST, LONG, Stage, words};
use memlane_api::types::{Lane, LaneState, Migration};
use memlane_lab::{Capture, HostId, LabOptions, Rate};
use memlane_net::announce::frame;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// Two ports that take a while for a guest.
fn two_slow_ports(test: &str) -> Option<Stage> {
    let rate = Rate::from_bits_per_second(50_000_000);
    Stage::new(test, LabOptions { ports: 2, port_rate: Some(rate), ..LabOptions::default() })
}

#[test]
fn a_port_that_is_lost_costs_its_share_only() {
    let Some(mut stage) = two_slow_ports("a_port_that_is_lost_costs_its_share_only") else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let order = stage.begin("web1", &["--verify"]);
    stage.wait_until(HostId::A, "web1", "both ports in use", |migration| {
        migration.lanes.len() == 2 && migration.lanes.iter().all(|lane| lane.bytes > 1 << 20)
    });
    stage.rig.lab().host(HostId::A).port_down(0).unwrap();
    let seen = stage.wait_until(HostId::A, "web1", "the loss of a lane", |migration| {
        migration.lanes.iter().any(|lane| lane.state == LaneState::Lost)
    });
    assert_eq!(seen.outcome, None, "it was over before the port was lost");
    // The rest need not take as long.
    stage.rig.lab().set_port_rate(1, None).unwrap();
    let answer = order.expect(0, &[]);
    let ended = answer.last().unwrap();
    let port =
        |name: &str| ended["lanes"].as_array().unwrap().iter().find(|lane| lane["port"] == name).unwrap();
    assert_eq!(port("port0")["state"], "lost", "{ended}");
    assert!(port("port1")["bytes"].as_u64() > port("port0")["bytes"].as_u64(), "{ended}");
    assert_eq!(ended["digest_verified"], true, "{ended}");
    common::assert_runs(&mut there);
    common::wait_for_exit(guest.process());
}

/// Once it drops everything without a word, and once it is down.
#[test]
fn a_port_that_returns_carries_its_share_again() {
    let Some(mut stage) = two_slow_ports("a_port_that_returns_carries_its_share_again") else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let order = stage.begin("web1", &["--verify"]);
    let port0 = |migration: &Migration| migration.lanes.iter().find(|lane| lane.port == "port0").cloned();
    let wait_for = |stage: &Stage, what: &str, is: &dyn Fn(&Lane) -> bool| {
        let seen = stage.wait_until(HostId::A, "web1", what, |migration| {
            port0(migration).is_some_and(|lane| is(&lane)) || migration.outcome.is_some()
        });
        assert_eq!(seen.outcome, None, "it was over before {what}");
        port0(&seen).unwrap()
    };
    wait_for(&stage, "the port was in use", &|lane| lane.bytes > 1 << 20);
    for (losses, silent) in [(1, true), (2, false)] {
        let lab = stage.rig.lab();
        if silent { lab.silence_port(0, true) } else { lab.host(HostId::A).port_down(0) }.unwrap();
        let lost = wait_for(&stage, "the port was lost", &|lane| lane.state == LaneState::Lost);
        assert_eq!(lost.losses, losses);
        if silent { lab.silence_port(0, false) } else { lab.host(HostId::A).port_up(0) }.unwrap();
        let back = wait_for(&stage, "the port was back", &|lane| {
            lane.state == LaneState::Up && lane.bytes > lost.bytes + (1 << 20)
        });
        assert!(back.losses == losses && back.lane > lost.lane, "{back:?}");
    }
    // The rest need not take as long.
    (0..2).for_each(|port| stage.rig.lab().set_port_rate(port, None).unwrap());
    let answer = order.expect(0, &[]);
    let ended = answer.last().unwrap();
    assert_eq!(ended["digest_verified"], true, "{ended}");
    let metrics = stage.rig.lab().host(HostId::A).run_in(metrics).unwrap();
    for counter in ["memlane_lanes_lost_total", "memlane_lanes_reopened_total"] {
        let line = format!("{counter}{{port=\"port0\"}} 2");
        assert!(metrics.contains(&line), "no {line} in {metrics}");
    }
    common::assert_runs(&mut there);
    common::wait_for_exit(guest.process());
}

/// What the daemon of this host tells Prometheus.
fn metrics() -> String {
    let mut stream = TcpStream::connect("127.0.0.1:9410").unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn the_last_port_is_lost() {
    let rate = Rate::from_bits_per_second(50_000_000);
    let lab = LabOptions { port_rate: Some(rate), ..LabOptions::default() };
    let Some(mut stage) = Stage::new("the_last_port_is_lost", lab) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let order = stage.begin("web1", &[]);
    stage.wait_until(HostId::A, "web1", "some pages sent", |migration| migration.bytes_sent > 1 << 20);
    stage.rig.lab().host(HostId::A).port_down(0).unwrap();
    order.expect(4, &["every lane to the destination is lost"]);
    stage.assert_runs_on("web1", &mut guest);
    stage.rig.lab().host(HostId::A).port_up(0).unwrap();
    stage.rig.lab().set_port_rate(0, None).unwrap();
    stage.assert_moves("web1", &mut there);
}

#[test]
fn switches_are_told_where_the_guest_is() {
    let lab = LabOptions { bridge: true, ..LabOptions::default() };
    let Some(mut stage) = Stage::new("switches_are_told_where_the_guest_is", lab) else { return };
    let guest = format!("{GUEST} --nic 52:54:00:12:34:56@lan");
    let _source = stage.rig.start_vmm(HostId::A, "web1", &words(&guest)).unwrap();
    let mut there = stage.rig.start_vmm(HostId::B, "web1", &words(&format!("{guest} --incoming"))).unwrap();
    let captures = [HostId::A, HostId::B].map(|id| {
        let host = stage.rig.lab().host(id);
        host.run_in(|| Capture::open(&host.bridge().unwrap().observer)).unwrap().unwrap()
    });
    stage.assert_moves("web1", &mut there);

    let received = |id: HostId| captures[id as usize].next_from(MAC, Duration::from_secs(1)).unwrap();

    let deadline = Instant::now() + LONG;
    let mut seen = 0;
    while seen < 5 && Instant::now() < deadline {
        if let Some(found) = received(HostId::B) {
            assert_eq!(found.bytes, frame(&MAC));
            seen += 1;
        }
    }
    assert_eq!(seen, 5);
    // No more than these, and none where the guest was.
    assert_eq!(received(HostId::B), None);
    assert_eq!(received(HostId::A), None);
}
