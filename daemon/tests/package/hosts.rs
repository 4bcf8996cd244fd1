//! Two hosts with systemd, and Memlane on them as its package installs it.

use std::path::Path;
use std::time::Duration;

use memlane_lab::debian::Tree;
use memlane_lab::linux::{Accelerator, Initramfs, Kernel, LinuxGuest};
use memlane_lab::systemd::SystemdHost;
use memlane_lab::{
    ClientSession, HostId, Lab, LabOptions, Rate, Requirement, Size, installed, skip, wait_for,
};
use serde_json::Value;

/// The longest wait for what takes moments on a machine that is idle.
pub(crate) const LONG: Duration = Duration::from_secs(120);
/// What the tests need of the machine.
const NEEDED: &[Requirement] = &[
    Requirement::Root,
    Requirement::Ip,
    Requirement::Tc,
    Requirement::Nspawn,
    Requirement::Package,
    Requirement::Kernel,
];

/// Two hosts, and the networks that join them.
pub(crate) struct Pair {
    // Before the lab, whose networks they have.
    hosts: [SystemdHost; 2],
    pub(crate) lab: Lab,
}

impl Pair {
    /// Starts two hosts as a test needs them, or says that it is skipped.
    pub(crate) fn start(test: &str) -> Option<Self> {
        if skip(test, NEEDED) {
            return None;
        }
        let tree = Tree::HOST.obtain().unwrap();
        let lab = Lab::new(LabOptions { ports: 2, switch: true, ..LabOptions::default() }).unwrap();
        let hosts = [HostId::A, HostId::B].map(|id| SystemdHost::boot(lab.host(id), &tree).unwrap());
        for host in &hosts {
            host.copy(&memlane_lab::package().unwrap(), "/root/memlane_1_amd64.deb").unwrap();
        }
        Some(Self { hosts, lab })
    }

    /// Starts two hosts with daemons that know each other.
    pub(crate) fn start_installed(test: &str) -> Option<Self> {
        let pair = Self::start(test)?;
        let [a, b] = &pair.hosts;
        installed::install([a, b], &memlane_lab::package().unwrap()).unwrap();
        Some(pair)
    }

    /// Returns a host.
    pub(crate) fn host(&self, id: HostId) -> &SystemdHost {
        &self.hosts[id as usize]
    }

    /// Gives the device to the daemon's user, as the package's rule has udev do on a host that has one.
    pub(crate) fn take_udevs_place(&self, host: &SystemdHost) {
        let rule = host.run("cat /lib/udev/rules.d/60-memlane.rules").unwrap();
        assert!(rule.contains(r#"KERNEL=="userfaultfd", GROUP="memlane", MODE="0660""#), "{rule}");
        host.run("chgrp memlane /dev/userfaultfd && chmod 0660 /dev/userfaultfd").unwrap();
    }

    /// Issues new keys for both hosts, and puts them in their places.
    pub(crate) fn renew_keys(&self) {
        let [a, b] = &self.hosts;
        installed::issue_keys([a, b]).unwrap();
    }

    /// Describes a Linux guest, and puts its kernel on both hosts.
    pub(crate) fn prepare_linux(&self) -> LinuxGuest {
        let (kernel, directory) = (Kernel::obtain().unwrap(), self.lab.host(HostId::A).directory());
        let initramfs = Initramfs::build(&directory.join("initramfs"), &kernel).unwrap();
        let guest = LinuxGuest {
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            ram: Size::from_mib(192),
            working_set: Size::from_mib(32),
            ..LinuxGuest::new(kernel, initramfs, Accelerator::Tcg, "/opt/console".into())
        };
        for id in [HostId::A, HostId::B] {
            let host = self.host(id);
            host.copy(guest.kernel.image(), "/opt/vmlinuz").unwrap();
            host.copy(guest.initramfs.file(), "/opt/initramfs").unwrap();
            host.run("touch /opt/console && chmod 666 /opt/console").unwrap();
            self.lab.host(id).add_tap(&guest.tap).unwrap();
        }
        guest
    }

    /// Launches a Linux guest on host A, and waits until it talks.
    pub(crate) fn launch(&self, guest: &LinuxGuest) -> ClientSession {
        let path = |path: &Path| path.display().to_string();
        let text = guest.file().replace("network = \"lan\"", "network = \"br0\"");
        let text = text.replace(&path(guest.kernel.image()), "/opt/vmlinuz");
        let a = self.host(HostId::A);
        a.write("/root/web1.toml", text.replace(&path(guest.initramfs.file()), "/opt/initramfs")).unwrap();
        a.run("memlanectl launch /root/web1.toml").unwrap();
        ClientSession::open(self.lab.lan(), guest.address, LONG).unwrap()
    }

    /// Runs `memlanectl --json` on a host, and returns the exit code and the last object of the answer.
    pub(crate) fn ctl(&self, id: HostId, line: &str) -> (i32, Value) {
        let (code, text) = self.host(id).try_run(&format!("memlanectl --json {line}")).unwrap();
        let last = text.lines().rev().find_map(|line| serde_json::from_str(line).ok());
        (code, last.unwrap_or_else(|| panic!("{line} says no JSON: {text}")))
    }

    /// Moves a guest away from a host, whole.
    #[track_caller]
    pub(crate) fn assert_moves(&self, from: HostId, name: &str) -> Value {
        let to = self.host(from.other()).name();
        let (code, migration) = self.ctl(from, &format!("migrate {name} {to} --verify --downtime-limit 60s"));
        assert_eq!(code, 0, "{migration}");
        assert_eq!(migration["digest_verified"], true, "{migration}");
        migration
    }

    /// Waits until a host's daemon answers, and knows a guest.
    #[track_caller]
    pub(crate) fn wait_for_guest(&self, id: HostId, name: &str) {
        let known = || {
            let (code, text) = self.host(id).try_run("memlanectl --json guests").ok()?;
            (code == 0 && text.contains(&format!("\"{name}\""))).then_some(())
        };
        wait_for("a guest", LONG, known).unwrap();
    }

    /// Sets what both ports carry.
    pub(crate) fn set_rate(&self, bits_per_second: Option<u64>) {
        for port in 0..2 {
            self.lab.set_port_rate(port, bits_per_second.map(Rate::from_bits_per_second)).unwrap();
        }
    }
}
