//! What a migration does to the network, and the network to it.

mod common;

use std::time::{Duration, Instant};

use common::{GUEST, LONG, Stage, words};
use memlane_lab::{Capture, HostId, LabOptions, Rate};
use memlaned::announce::frame;
use memlaned::api::types::LaneState;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

#[test]
fn a_port_that_is_lost_costs_its_share_only() {
    let test = "a_port_that_is_lost_costs_its_share_only";
    let rate = Rate::from_bits_per_second(50_000_000);
    let lab = LabOptions { ports: 2, port_rate: Some(rate), ..LabOptions::default() };
    let Some(mut stage) = Stage::new(test, lab) else { return };
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
