//! Two hosts that are VMs: what they are, what joins them, and what is left of them when their power is cut.

use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use memlane_lab::vm::{Hosts, Machine};
use memlane_lab::{HostId, Lan, Requirement, skip, wait_for};
use serde_json::json;

/// Long enough for a busy machine: it only bounds a failure.
const PATIENCE: Duration = Duration::from_secs(180);

#[test]
fn hosts_have_kernels_and_disks_of_their_own() {
    if skip("hosts_have_kernels_and_disks_of_their_own", Requirement::LAB_WITH_VMS) {
        return;
    }
    let mut hosts = Hosts::start().unwrap_or_else(|error| panic!("{error:#}"));
    for machine in hosts.machines() {
        is_whole(machine);
    }
    let [a, b] = hosts.machines();
    let ids = [a, b].map(|host| said(host, "cat /etc/machine-id"));
    assert_ne!(ids[0], ids[1], "each host has a number of its own");

    // Whole packets of the ports' MTU, and by each link.
    for address in [b.control_address(), b.port_address(0), b.port_address(1)] {
        said(a, &format!("ping -c 1 -W 60 -M do -s 8972 {address}"));
    }
    said(b, "ping -c 1 -W 60 host-a");
    reaches_guests(&hosts);
    by_its_name(&hosts);
    copies(a);

    // The clock of a host that goes on is not that of the snapshot.
    let ahead: f64 = said(b, "date +%s").parse::<f64>().expect("a number") - memlane_lab::unix_time();
    assert!(ahead.abs() < 60.0, "the clock is {ahead} s ahead");

    // What was flushed survives, what was in memory does not, and the other host runs on.
    said(b, "echo kept > /root/flushed && sync /root/flushed && echo lost > /dev/shm/in-memory");
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let before = [said(a, boot), said(b, boot)];
    hosts.machine_mut(HostId::B).power_cut().expect("a power cut");
    let error = hosts.machine(HostId::B).run("true").expect_err("no power");
    assert!(format!("{error:#}").contains("no power"), "{error:#}");
    let address = hosts.machine(HostId::B).port_address(1);
    assert_eq!(said(hosts.machine(HostId::A), boot), before[0]);
    said(hosts.machine(HostId::A), &format!("! ping -c 1 -W 2 {address}"));
    // The one comes back while the other is still dark.
    hosts.machine_mut(HostId::A).power_cut().expect("a power cut");
    for id in [HostId::A, HostId::B] {
        hosts.machine_mut(id).start_again().unwrap_or_else(|error| panic!("{error:#}"));
        is_whole(hosts.machine(id));
        assert_ne!(said(hosts.machine(id), boot), before[id as usize]);
    }
    let [a, b] = hosts.machines();
    assert_eq!(said(b, "cat /root/flushed"), "kept");
    said(b, "test ! -e /dev/shm/in-memory");
    // The cables are the same ones.
    said(a, &format!("ping -c 1 -W 60 {address}"));
    reaches_guests(&hosts);
}

/// A host is up, has the kernel that the lab brings, and one that can run guests.
fn is_whole(machine: &Machine) {
    assert_eq!(said(machine, "hostname"), machine.name());
    assert_eq!(said(machine, "systemctl is-system-running"), "running");
    assert!(said(machine, "uname -r").starts_with("6.12."));
    assert_eq!(said(machine, "cat /sys/module/apparmor/parameters/enabled"), "Y");
    // QEMU makes a VM with it, and ends.
    let qemu =
        "echo quit | qemu-system-x86_64 -machine none -accel kvm -nodefaults -display none -monitor stdio";
    said(machine, qemu);
    let status = machine.monitor().expect("a monitor").execute("query-status", json!({})).expect("an answer");
    assert_eq!(status["status"], "running");
}

/// The client on the guests' network reaches an address behind the bridge of either host, through the same switch.
fn reaches_guests(hosts: &Hosts) {
    for (machine, other) in [(HostId::A, HostId::B), (HostId::B, HostId::A)] {
        // Where a guest would be that moves from one to the other.
        let _ = hosts.machine(other).run(&format!("ip address delete {}/24 dev br0", Lan::GUEST));
        said(hosts.machine(machine), &format!("ip address add {}/24 dev br0", Lan::GUEST));
        let address = (Lan::GUEST, 22).into();
        let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok();
        let reached = wait_for("the host behind its bridge", PATIENCE, || {
            hosts.lan().run_in_client(connect).expect("a namespace")
        });
        reached.expect("a connection");
    }
    said(hosts.machine(HostId::B), &format!("ip address delete {}/24 dev br0", Lan::GUEST));
}

/// Others than the harness reach the hosts too.
fn by_its_name(hosts: &Hosts) {
    let mut command = Command::new("ssh");
    command.arg("-F").arg(hosts.ssh_config()).args(["host-b", "hostname"]);
    let output = command.output().expect("ssh");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "host-b\n");
}

fn copies(machine: &Machine) {
    let directory = tempfile::tempdir().expect("a directory");
    let (here, back) = (directory.path().join("here"), directory.path().join("back"));
    let bytes: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
    std::fs::write(&here, &bytes).expect("a file");
    machine.copy_to(&here, "/root/a folder/it's there").expect("a copy");
    machine.copy_from("/root/a folder/it's there", &back).expect("a copy");
    assert!(std::fs::read(&back).expect("a file") == bytes, "the same bytes");
    machine.write("/etc/written", "text\n").expect("a file");
    assert_eq!(said(machine, "stat -c %a /etc/written; cat /etc/written"), "644\ntext");
}

fn said(machine: &Machine, line: &str) -> String {
    machine.run(line).unwrap_or_else(|error| panic!("{error:#}")).trim().to_owned()
}
