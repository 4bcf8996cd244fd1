//! What a migration does to the network, and the network to it.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::{GUEST, LONG, Stage, wait_for_exit, words};
use memlane_api::types::{Lane, LaneState, Migration};
use memlane_lab::{Capture, HostId, LabOptions, Rate};
use memlane_net::announce::frame;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// Two ports that take a while for a guest.
fn two_slow_ports(test: &str) -> Option<Stage> {
    let rate = Rate::from_bits_per_second(50_000_000);
    Stage::new(test, LabOptions { ports: 2, port_rate: Some(rate), ..LabOptions::default() })
}

/// At this rate a guest takes longer than a host may be silent.
const VERY_SLOW: u64 = 5_000_000;

fn two_very_slow_ports(test: &str) -> Option<Stage> {
    let rate = Rate::from_bits_per_second(VERY_SLOW);
    Stage::new(test, LabOptions { ports: 2, port_rate: Some(rate), ..LabOptions::default() })
}

#[test]
fn a_port_that_is_lost_costs_its_share_only() {
    let Some(mut stage) = two_very_slow_ports("a_port_that_is_lost_costs_its_share_only") else { return };
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
    let Some(mut stage) = two_very_slow_ports("a_port_that_returns_carries_its_share_again") else { return };
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
    order.expect(
        4,
        &["every lane to the destination is lost, the last one because the other end has not answered for"],
    );
    stage.assert_runs_on("web1", &mut guest);
    stage.rig.lab().host(HostId::A).port_up(0).unwrap();
    stage.rig.lab().set_port_rate(0, None).unwrap();
    stage.assert_moves("web1", &mut there);
}

/// Everything between the hosts is cut while a guest is copied: its connection for control, its ports, and both. What had
/// arrived stays, and the guest moves when the network is back.
#[test]
fn the_network_is_lost_for_a_while() {
    let Some(mut stage) = two_very_slow_ports("the_network_is_lost_for_a_while") else { return };
    for (control, ports) in [(true, false), (false, true), (true, true)] {
        eprintln!("control {control}, ports {ports}");
        let mut guest = stage.guest("web1");
        let mut there = stage.receiver("web1");
        let order = stage.begin("web1", &["--verify", "--patience", "5min"]);
        stage.wait_until(HostId::A, "web1", "some pages sent", |migration| {
            migration.outcome.is_none() && migration.bytes_sent > 4 << 20
        });
        let cut = |silent: bool| {
            let lab = stage.rig.lab();
            if control {
                lab.silence_control(silent).unwrap();
            }
            if ports {
                (0..2).for_each(|port| lab.silence_port(port, silent).unwrap());
            }
        };
        cut(true);
        for host in [HostId::A, HostId::B].into_iter().filter(|_| control) {
            let lost = stage.wait_until(host, "web1", "the loss of the other host", |migration| {
                migration.waits_for.as_ref().is_some_and(|what| what.contains("reached again"))
            });
            assert_eq!(lost.outcome, None);
        }
        if ports {
            stage.wait_until(HostId::A, "web1", "the loss of all lanes", |migration| {
                migration.lanes.iter().all(|lane| lane.state == LaneState::Lost)
            });
        }
        cut(false);
        if control {
            stage.wait_until(HostId::A, "web1", "the other host", |migration| migration.waits_for.is_none());
        }
        let lab = stage.rig.lab();
        (0..2).for_each(|port| lab.set_port_rate(port, None).unwrap());
        let answer = order.expect(0, &[]);
        let ended = answer.last().unwrap();
        assert_eq!(ended["digest_verified"], true, "{ended}");
        assert_eq!(ended["rounds"][0]["round"], 1, "{ended}");
        common::assert_runs(&mut there);
        common::wait_for_exit(guest.process());
        there.quit().unwrap();
        (0..2).for_each(|port| lab.set_port_rate(port, Some(Rate::from_bits_per_second(VERY_SLOW))).unwrap());
    }
}

/// The hosts part for good: the network does not come back, or the daemon there knows nothing of the migration any more.
#[test]
fn the_other_host_does_not_come_back() {
    let Some(mut stage) = two_very_slow_ports("the_other_host_does_not_come_back") else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let begin = |stage: &Stage, patience: &str| {
        let order = stage.begin("web1", &["--patience", patience]);
        stage.wait_until(HostId::A, "web1", "some pages sent", |migration| {
            migration.outcome.is_none() && migration.bytes_sent > 1 << 20
        });
        order
    };
    let order = begin(&stage, "1s");
    stage.rig.lab().silence_control(true).unwrap();
    order.expect(4, &["has not come back within 1s"]);
    stage.rig.lab().silence_control(false).unwrap();
    stage.assert_runs_on("web1", &mut guest);
    stage.wait_until(HostId::B, "web1", "the end", |migration| migration.outcome.is_some());
    stage.wait_for_standing(HostId::B, "web1", "incoming");

    let order = begin(&stage, "5min");
    stage.rig.stop_daemon(HostId::B).unwrap();
    stage.rig.start_daemon(HostId::B).unwrap();
    order.expect(4, &["does not go on", "started anew"]);
    stage.assert_runs_on("web1", &mut guest);

    // A source that begins anew need not wait until the destination has lost its patience.
    stage.wait_for_standing(HostId::B, "web1", "incoming");
    let order = begin(&stage, "5min");
    stage.rig.stop_daemon(HostId::A).unwrap();
    order.expect(6, &[]);
    stage.rig.start_daemon(HostId::A).unwrap();
    stage.wait_for_standing(HostId::A, "web1", "running");
    (0..2).for_each(|port| stage.rig.lab().set_port_rate(port, None).unwrap());
    stage.assert_moves("web1", &mut there);
}

/// An order that says so is tried again by itself: after the other host was away for longer than the patience, and by a
/// daemon that was started anew.
#[test]
fn an_order_is_tried_again() {
    let Some(mut stage) = two_slow_ports("an_order_is_tried_again") else { return };
    let fast = |stage: &Stage, rate: Option<Rate>| {
        (0..2).for_each(|port| stage.rig.lab().set_port_rate(port, rate).unwrap());
    };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let order = stage.begin("web1", &["--patience", "0s", "--retry", "50"]);
    let first =
        stage.wait_until(HostId::A, "web1", "some pages sent", |migration| migration.bytes_sent > 1 << 20);
    assert_eq!((first.retries_left, &first.retry_of), (50, &None));
    stage.rig.stop_daemon(HostId::B).unwrap();
    let failed = stage
        .wait_until(HostId::A, "web1", "the end of the first try", |migration| migration.outcome.is_some());
    assert!(failed.id == first.id && failed.retries_left > 0, "{failed:?}");
    stage.rig.start_daemon(HostId::B).unwrap();
    fast(&stage, None);
    let answer = order.expect(0, &["trying again"]);
    let ended = answer.last().unwrap();
    assert_eq!((&ended["outcome"], &ended["retry_of"]), (&"completed".into(), &first.id.into()), "{ended}");
    common::assert_runs(&mut there);
    common::wait_for_exit(guest.process());
    there.quit().unwrap();

    fast(&stage, Some(Rate::from_bits_per_second(50_000_000)));
    let mut guest = stage.guest("web2");
    let mut there = stage.receiver("web2");
    let order = stage.begin("web2", &["--retry", "9"]);
    stage.wait_until(HostId::A, "web2", "some pages sent", |migration| migration.bytes_sent > 1 << 20);
    stage.rig.stop_daemon(HostId::A).unwrap();
    order.expect(6, &[]);
    fast(&stage, None);
    stage.rig.start_daemon(HostId::A).unwrap();
    stage.wait_for_log(HostId::A, "an order is tried again");
    stage.wait_for_end("web2");
    common::assert_runs(&mut there);
    common::wait_for_exit(guest.process());
    // Nothing is left that a later daemon would try.
    let orders = stage.rig.config_file(HostId::A).with_file_name("journal").join("orders");
    memlane_lab::wait_for("the order to be forgotten", LONG, || {
        (std::fs::read_dir(&orders).unwrap().count() == 0).then_some(())
    })
    .unwrap();
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

/// Between the hosts is a switch with a smaller MTU than theirs: it swallows large packets without a word.
#[test]
fn a_path_that_swallows_large_packets_is_named() {
    let lab = LabOptions { ports: 2, ..LabOptions::default() };
    let Some(mut stage) = Stage::new("a_path_that_swallows_large_packets_is_named", lab) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let check = |stage: &Stage| stage.rig.ctl(HostId::A, &["check", "web1", "host-b"]).unwrap();
    let why = ["bytes of data do not get from port port1", "smaller MTU", "lower that of the interfaces"];

    // One port of two: the guest moves over the other one.
    swallow_large_packets(&stage, "port1");
    let answer = check(&stage);
    assert_eq!(answer.code, 0, "{}", answer.text);
    for why in why {
        assert!(answer.text.contains(why), "{why:?} is not said: {}", answer.text);
    }
    stage.assert_moves("web1", &mut there);
    wait_for_exit(guest.process());

    // The control network.
    let mut guest = stage.guest("web2");
    let _there = stage.receiver("web2");
    swallow_large_packets(&stage, "ctl0");
    stage.assert_refused("web2", &[], &["do not get from port control", "smaller MTU"]);
    stage.assert_runs_on("web2", &mut guest);
}

/// Has host A drop what it sends in large packets over an interface, without a word: they do not fit into so small a bucket.
fn swallow_large_packets(stage: &Stage, interface: &str) {
    let bucket = format!("qdisc replace dev {interface} root tbf rate 10gbit burst 4000 limit 1000000");
    let status = stage.rig.lab().host(HostId::A).command("tc").args(words(&bucket)).status().unwrap();
    assert!(status.success());
}
