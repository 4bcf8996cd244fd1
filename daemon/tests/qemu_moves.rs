//! A real Linux in stock QEMU moves, while it writes and checks memory and talks to a client.

mod common;

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use common::{LONG, Linux, Stage};
use memlane_api::types::Phase;
use memlane_lab::qmp::Monitor;
use memlane_lab::{GuestCounters, HostId, LabOptions, Lan, Rate, tell_guest, wait_for};
use serde_json::json;

/// Pages, as the daemons count them.
const PAGE: u64 = 4096;

#[test]
fn linux_moves_there_and_back_with_one_vcpu() {
    there_and_back("linux_moves_there_and_back_with_one_vcpu", 1);
}

#[test]
fn linux_moves_there_and_back_with_two_vcpus() {
    there_and_back("linux_moves_there_and_back_with_two_vcpus", 2);
}

fn there_and_back(test: &str, vcpus: u16) {
    let lab = LabOptions { ports: 2, ..LabOptions::default() };
    let Some(stage) = Stage::for_linux(test, lab) else { return };
    let mut linux = stage.linux(|guest| guest.vcpus = vcpus);
    for (from, to) in [(HostId::A, HostId::B), (HostId::B, HostId::A)] {
        let lan = stage.rig.lab().lan();
        let capture = lan.capture_from(to).unwrap();
        let moved = linux.assert_moves(&stage, from);
        assert_eq!(moved["digest_verified"], true, "{moved}");
        // The switch was told before the guest spoke.
        let first = capture.next_from(linux.guest.mac, LONG).unwrap().expect("a frame of the guest");
        assert!(first.is_rarp(), "the guest spoke before it was announced");
        // A frame that was under way when the guest was paused may come after the first announcement, not after all.
        let learns = || {
            let learned = lan.learned_port(linux.guest.mac).unwrap();
            (learned.as_deref() == Some(Lan::port_towards(to))).then_some(())
        };
        wait_for("the switch to learn where the guest is", LONG, learns).unwrap();
    }
    linux.assert_whole(&stage);
}

/// Most of the guest's memory is still at the source when it runs at the destination.
#[test]
fn linux_runs_before_its_memory_is_there() {
    let test = "linux_runs_before_its_memory_is_there";
    let Some(stage) = Stage::for_linux(test, LabOptions { ports: 2, ..LabOptions::default() }) else {
        return;
    };
    let mut linux = stage.linux(|guest| guest.vcpus = 2);
    for (from, when) in [(HostId::A, "hybrid"), (HostId::B, "hybrid"), (HostId::A, "now")] {
        let moved = linux.assert_moves_with(&stage, from, &["--postcopy", when]);
        assert_eq!(moved["postcopy"]["remaining_pages"], 0, "{moved}");
        let came = |key: &str| moved["postcopy"][key].as_u64().unwrap();
        assert!(came("pages_streamed") + came("pages_fetched") > 0, "{moved}");
    }
    linux.assert_whole(&stage);
}

/// Whatever of the guest needs a page waits for it; its client's connection outlives that.
#[test]
fn linux_waits_for_ports_that_are_lost_for_a_while() {
    let test = "linux_waits_for_ports_that_are_lost_for_a_while";
    let port_rate = Some(Rate::from_bits_per_second(100_000_000));
    let Some(stage) = Stage::for_linux(test, LabOptions { ports: 2, port_rate, ..LabOptions::default() })
    else {
        return;
    };
    let mut linux = stage.linux(|guest| (guest.vcpus, guest.working_set) = (2, "96MiB".parse().unwrap()));
    let name = linux.guest.name.clone();
    let order = stage.begin(&name, &["--postcopy", "now", "--downtime-limit", "60s"]);
    stage.wait_until(HostId::A, &name, "post-copy", |migration| {
        let streamed = migration.postcopy.as_ref().map_or(0, |postcopy| postcopy.pages_streamed);
        migration.phase == Phase::Fetching && streamed > 100
    });
    for port in [0, 1] {
        stage.rig.lab().host(HostId::A).port_down(port).unwrap();
    }
    stage.wait_until(HostId::B, &name, "word of what is waited for", |migration| {
        migration.postcopy.as_ref().is_some_and(|postcopy| postcopy.waits_for.is_some())
    });
    std::thread::sleep(Duration::from_secs(10));
    for port in [0, 1] {
        stage.rig.lab().host(HostId::A).port_up(port).unwrap();
    }
    let moved = order.expect(0, &[]).last().unwrap().clone();
    assert_eq!(moved["postcopy"]["remaining_pages"], 0, "{moved}");
    linux.assert_runs();
    linux.assert_whole(&stage);
}

#[test]
fn a_guest_costs_what_it_holds() {
    let Some(stage) = Stage::for_linux("a_guest_costs_what_it_holds", LabOptions::default()) else { return };
    let mut linux = stage.linux(|guest| {
        (guest.ram, guest.working_set) = ("2GiB".parse().unwrap(), "512MiB".parse().unwrap());
    });
    // The guest has written its working set before it is moved.
    linux.assert_whole(&stage);
    let held = held(&stage, HostId::A, &linux);
    let moved = linux.assert_moves(&stage, HostId::A);
    let pages = |key: &str| moved[key].as_u64().unwrap();
    assert!(pages("pages_sent") * PAGE >= 512 << 20, "{moved}");
    assert!(pages("pages_sent") * PAGE < 1 << 30, "{moved}");
    assert!(pages("hole_pages") * PAGE > 1 << 30, "{moved}");
    // What the source has not, the destination has not either.
    let arrived = self::held(&stage, HostId::B, &linux);
    assert!(arrived < held + (64 << 20), "{arrived} bytes held, where {held} were");
    linux.assert_whole(&stage);
}

#[test]
fn memory_given_back_is_given_back_at_the_destination() {
    let test = "memory_given_back_is_given_back_at_the_destination";
    let rate = Rate::from_bits_per_second(200_000_000);
    let lab = LabOptions { port_rate: Some(rate), ..LabOptions::default() };
    let Some(stage) = Stage::for_linux(test, lab) else { return };
    let monitor = stage.rig.lab().host(HostId::A).open_directory().join("monitor.sock");
    let mut linux = stage.linux(|guest| {
        let chardev = format!("unix:{},server=on,wait=off", monitor.display());
        guest.arguments = ["-device", "virtio-balloon-pci", "-qmp", &chardev].map(str::to_owned).into();
    });
    let mut monitor = Monitor::connect(&monitor).unwrap();
    // Memory that the guest has used, and uses no more.
    GuestCounters::ask(stage.rig.lab().lan(), linux.guest.address, "churn 96M").unwrap();
    let before = held(&stage, HostId::A, &linux);

    // It is given back while it is on its way: part of it has been sent by then.
    let order = stage.begin("web1", &["--verify"]);
    stage.wait_until(HostId::A, "web1", "some pages sent", |migration| migration.bytes_sent > 16 << 20);
    monitor.execute("balloon", json!({ "value": 128u64 << 20 })).unwrap();
    wait_for("the balloon", LONG, || {
        let actual = monitor.execute("query-balloon", json!({})).unwrap()["actual"].as_u64();
        (actual == Some(128 << 20)).then_some(())
    })
    .unwrap();
    assert!(held(&stage, HostId::A, &linux) + (64 << 20) < before, "the balloon gave nothing back");
    stage.rig.lab().set_port_rate(0, None).unwrap();
    let answer = order.expect(0, &[]);
    assert_eq!(answer.last().unwrap()["digest_verified"], true, "{}", answer.text);
    let after = held(&stage, HostId::B, &linux);
    assert!(after + (64 << 20) < before, "{after} bytes are held there, of {before} before the balloon");
    linux.assert_runs();
    linux.assert_whole(&stage);
}

#[test]
fn a_guest_reboots_while_it_is_copied() {
    let rate = Rate::from_bits_per_second(100_000_000);
    let lab = LabOptions { port_rate: Some(rate), ..LabOptions::default() };
    let Some(stage) = Stage::for_linux("a_guest_reboots_while_it_is_copied", lab) else { return };
    let mut linux = stage.linux(|_| {});
    let order = stage.begin("web1", &["--verify"]);
    stage.wait_until(HostId::A, "web1", "some pages sent", |migration| migration.bytes_sent > 8 << 20);
    tell_guest(stage.rig.lab().lan(), linux.guest.address, "reboot").unwrap();
    // It is down: firmware and kernel write memory that has been sent.
    wait_for("the guest to go down", LONG, || linux.session.hear(Duration::from_millis(500)).err()).unwrap();
    stage.rig.lab().set_port_rate(0, None).unwrap();
    let answer = order.expect(0, &[]);
    assert_eq!(answer.last().unwrap()["digest_verified"], true, "{}", answer.text);
    linux.assert_booted_again(&stage);
    linux.assert_whole(&stage);
    linux.assert_moves(&stage, HostId::B);
}

/// Needs what few test machines have.
#[test]
fn a_guest_whose_packets_the_kernel_carries_moves() {
    let test = "a_guest_whose_packets_the_kernel_carries_moves";
    if !std::path::Path::new("/dev/vhost-net").exists() {
        return memlane_lab::say_skipped(test, "there is no /dev/vhost-net (modprobe vhost_net)");
    }
    let Some(stage) = Stage::for_linux(test, LabOptions::default()) else { return };
    let mut linux = stage.linux(|guest| guest.vhost = true);
    linux.assert_moves(&stage, HostId::A);
    linux.assert_moves(&stage, HostId::B);
    linux.assert_whole(&stage);
}

/// Bytes that a host holds of the guest's memory.
fn held(stage: &Stage, id: HostId, linux: &Linux) -> u64 {
    let file = stage.rig.lab().host(id).memory_directory().join(format!("{}.ram", linux.guest.name));
    std::fs::metadata(file).unwrap().blocks() * 512
}
