//! Guests of an ordinary size, whose memory was taken from the system before the move at both ends: what a daemon does with all
//! of it takes seconds there, and must not take them from anything else. Orders are as an operator gives them, with all
//! limits as they are by default.
//!
//! `cargo xtask test --large` runs these tests, one at a time. `MEMLANE_LARGE=2GiB` makes the guests as large as that.

mod common;

use std::fs;

use common::{LONG, Stage, assert_runs, wait_for_exit};
use memlane_lab::{HostId, LabOptions, Requirement, RigOptions, Size, wait_for};
use serde_json::Value;

/// Memory that the machine needs besides that of both ends.
const SPARE: u64 = 2 << 30;

#[test]
#[ignore = "takes 20 GiB: cargo xtask test --large"]
fn a_large_linked_guest_moves_by_precopy() {
    linked("a_large_linked_guest_moves_by_precopy", None);
}

#[test]
#[ignore = "takes 20 GiB: cargo xtask test --large"]
fn a_large_linked_guest_moves_by_hybrid() {
    linked("a_large_linked_guest_moves_by_hybrid", Some("hybrid"));
}

#[test]
#[ignore = "takes 20 GiB: cargo xtask test --large"]
fn a_large_linked_guest_moves_by_postcopy() {
    linked("a_large_linked_guest_moves_by_postcopy", Some("now"));
}

#[test]
#[ignore = "takes 20 GiB: cargo xtask test --large"]
fn a_large_qemu_guest_moves_by_precopy() {
    qemu("a_large_qemu_guest_moves_by_precopy", None);
}

#[test]
#[ignore = "takes 20 GiB: cargo xtask test --large"]
fn a_large_qemu_guest_moves_by_hybrid() {
    qemu("a_large_qemu_guest_moves_by_hybrid", Some("hybrid"));
}

#[test]
#[ignore = "takes 20 GiB: cargo xtask test --large"]
fn a_large_qemu_guest_moves_by_postcopy() {
    qemu("a_large_qemu_guest_moves_by_postcopy", Some("now"));
}

/// A guest of a VMM that links Memlane goes there and back.
fn linked(test: &str, postcopy: Option<&str>) {
    let options =
        RigOptions { lab: LabOptions { ports: 2, ..LabOptions::default() }, ..RigOptions::default() };
    let Some(mut stage) = Stage::with(test, Requirement::LAB_WITH_KVM, options) else { return };
    let ram = ram().to_string();
    let guest = ["--ram", &ram, "--prepare", "--vcpus", "2", "--fill", "zero=10,random=70,compressible=20"];
    let guest: Vec<String> = guest.map(str::to_owned).into();
    let mut here = stage.rig.start_vmm(HostId::A, "web1", &guest).unwrap();
    for from in [HostId::A, HostId::B] {
        let incoming = [&guest[..], &["--incoming".to_owned()]].concat();
        let mut there = stage.rig.start_vmm(other(from), "web1", &incoming).unwrap();
        move_from(&stage, from, postcopy);
        assert_runs(&mut there);
        wait_for_exit(here.process());
        here = there;
    }
}

/// A Linux guest of QEMU goes there and back.
fn qemu(test: &str, postcopy: Option<&str>) {
    let lab = LabOptions { ports: 2, switch: true, ..LabOptions::default() };
    let options = RigOptions { lab, may_start_guests: true, ..RigOptions::default() };
    let Some(stage) = Stage::with(test, Requirement::LAB_WITH_LINUX, options) else { return };
    let mut linux = stage.linux(|guest| {
        (guest.ram, guest.prealloc, guest.vcpus) = (ram(), true, 2);
        guest.working_set = guest.ram.part(8);
    });
    for from in [HostId::A, HostId::B] {
        move_from(&stage, from, postcopy);
        linux.assert_runs();
        linux.assert_whole(&stage);
        stage.wait_for_absence(from, "web1");
    }
}

/// Moves guest `web1` from a host to the other; the daemon says that the limit, which is the default, was kept.
#[track_caller]
fn move_from(stage: &Stage, from: HostId, postcopy: Option<&str>) {
    let mut order = vec!["migrate", "web1", if from == HostId::A { "host-b" } else { "host-a" }];
    order.extend(postcopy.into_iter().flat_map(|when| ["--postcopy", when]));
    let answer = stage.rig.ctl(from, &order).unwrap();
    assert_eq!(answer.code, 0, "{}", answer.text);
    let moved = answer.last().unwrap();
    let seconds = |key: &str| moved[key].as_f64().unwrap_or_else(|| panic!("no {key} in {moved}"));
    let (downtime, limit) = (seconds("downtime_seconds"), seconds("downtime_limit_seconds"));
    eprintln!(
        "{}: {:.2} s, stood still for {:.0} ms, {:.0} predicted, {:.0} allowed",
        order.join(" "),
        seconds("total_seconds"),
        downtime * 1e3,
        seconds("downtime_predicted_seconds") * 1e3,
        limit * 1e3,
    );
    assert!(downtime <= limit, "{moved}");
    match postcopy {
        None => assert_eq!(moved["postcopy"], Value::Null, "{moved}"),
        Some(_) => assert_eq!(moved["postcopy"]["remaining_pages"], 0, "{moved}"),
    }
}

/// How large guests are; twice as much must be free.
fn ram() -> Size {
    let said = std::env::var("MEMLANE_LARGE");
    let ram: Size = said.as_deref().unwrap_or("8GiB").parse().expect("MEMLANE_LARGE is a size, such as 8GiB");
    let needed = 2 * ram.bytes() + SPARE;
    // What the test before has had may not all have been given back.
    let free = wait_for("free memory", LONG, || (available() >= needed).then_some(()));
    free.unwrap_or_else(|error| {
        panic!("{error}: {} MiB are needed, and {} MiB are there", needed >> 20, available() >> 20)
    });
    ram
}

/// Memory that programs can have.
fn available() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn other(host: HostId) -> HostId {
    if host == HostId::A { HostId::B } else { HostId::A }
}
