//! Hosts with systems of their own, on which the package is installed as the manual says.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use memlane_lab::debian::Tree;
use memlane_lab::installed::{OwnSystem, install};
use memlane_lab::linux::{Accelerator, LinuxGuest};
use memlane_lab::systemd::SystemdHost;
use memlane_lab::vm::Hosts;
use memlane_lab::{ClientSession, HostId, Lab, LabOptions, Lan, Requirement, cleanup_on_signal, why_not};
use serde_json::{Value, json};

use super::linux::{BOOT, described};
use super::options::{DemoOptions, GUEST, GuestChoice, HostsChoice, PROOF_LIMIT};
use super::report::{DemoMove, DemoReport};
use crate::package;

/// The number of ports that each host has.
const PORTS: usize = 2;
/// Where the guest's files are on each host.
const KERNEL: &str = "/opt/vmlinuz";
const INITRAMFS: &str = "/opt/initramfs";
const CONSOLE: &str = "/opt/console";
const GUEST_FILE: &str = "/opt/web1.toml";
/// The QEMU of the hosts.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Nobody nests deeper: the emulated processor is slow enough as it is.
const PROCESSOR: [&str; 2] = ["-cpu", "host,-svm"];

/// Two hosts, and the network of their guests.
struct Systems<'a> {
    hosts: [&'a dyn OwnSystem; 2],
    lan: &'a Lan,
    accelerator: Accelerator,
    why: &'a str,
}

impl DemoOptions {
    /// Starts two hosts with systems of their own, installs the package, and moves a Linux guest there and back.
    pub(super) fn move_between_systems(&self) -> Result<DemoReport> {
        ensure!(
            self.guest == GuestChoice::Qemu,
            "hosts with systems of their own move guests of QEMU: add --guest qemu"
        );
        let fixed = [
            ("--insecure", self.insecure),
            ("--qemu", self.qemu.is_some()),
            ("--port-rate", self.port_rate.is_some()),
            ("--ports", self.ports != PORTS),
        ];
        for (option, given) in fixed {
            ensure!(!given, "{option} is for hosts made of namespaces alone: --hosts namespaces");
        }
        let needed = match self.hosts {
            HostsChoice::Vm => &[Requirement::Root, Requirement::Ip][..],
            _ => Requirement::LAB_WITH_SYSTEMD,
        };
        if let Some(missing) = why_not(needed) {
            bail!(
                "the demo makes hosts and needs root: sudo env PATH=\"$PATH\" cargo xtask demo ({missing})"
            );
        }
        cleanup_on_signal().context("preparing to clean up")?;
        self.say("making the package");
        let package = package::make_for_release()?;
        self.say("starting two hosts; the first time that takes some minutes");
        if self.hosts == HostsChoice::Vm {
            let hosts = Hosts::start()?;
            let [a, b] = hosts.machines();
            let why = "the hosts' processors have svm";
            let systems = Systems { hosts: [a, b], lan: hosts.lan(), accelerator: Accelerator::Kvm, why };
            return self.move_between(&systems, &package);
        }
        let tree = Tree::HOST.obtain()?;
        let lab = Lab::new(LabOptions { ports: PORTS, switch: true, ..LabOptions::default() })?;
        let [a, b] = [HostId::A, HostId::B].map(|id| SystemdHost::boot(lab.host(id), &tree));
        let ((a, b), (accelerator, why)) = ((a?, b?), Accelerator::choose());
        self.move_between(&Systems { hosts: [&a, &b], lan: lab.lan(), accelerator, why }, &package)
    }

    fn move_between(&self, systems: &Systems<'_>, package: &Path) -> Result<DemoReport> {
        self.say("installing the package, and making configurations and keys");
        install(systems.hosts, package)?;
        let directory = tempfile::tempdir().context("making a directory")?;
        let mut guest = self.linux_guest(directory.path(), systems.accelerator)?;
        (guest.qemu, guest.console) = (QEMU.into(), CONSOLE.into());
        if systems.accelerator == Accelerator::Kvm {
            guest.arguments.extend(PROCESSOR.map(str::to_owned));
        }
        self.say(&format!(
            "booting Linux {} with {} ({})",
            guest.kernel.release(),
            guest.accelerator,
            systems.why
        ));
        let session = systems.launch(&guest)?;

        let mut at = HostId::A;
        let count = self.moves(2);
        let mut legs: Vec<DemoMove> = Vec::new();
        for number in 1..=count {
            let to = at.other();
            let order = self.migrate(systems.host(to).name()).join(" ");
            self.say(&format!("move {number} of {count}: memlanectl {order}"));
            let migrate = || {
                let migration = systems.ctl(at, &order)?;
                let arrived = migration["outcome"] == "completed";
                let arrival = if arrived { systems.ctl(to, &format!("watch {GUEST}"))? } else { Value::Null };
                Ok((migration, arrival))
            };
            legs.push(self.linux_leg(systems.lan, &guest, &session, (number, to), migrate)?);
            if !legs.last().is_some_and(DemoMove::is_whole) {
                break;
            }
            at = to;
        }
        let mut proof = None;
        if legs.last().is_some_and(DemoMove::is_whole) && !self.verify {
            self.say("once more, comparing digests of all memory in the pause");
            let to = systems.host(at.other()).name();
            proof = Some(
                systems.ctl(at, &format!("migrate {GUEST} {to} --downtime-limit {PROOF_LIMIT} --verify"))?,
            );
        }
        Ok(DemoReport {
            guest: described(&guest, systems.why),
            legs,
            proof,
            hosts: Some(systems.described()?),
            limit: self.limit().to_owned(),
            encrypted: true,
        })
    }
}

impl Systems<'_> {
    fn host(&self, id: HostId) -> &dyn OwnSystem {
        self.hosts[id as usize]
    }

    /// Gives an order on a host, and returns the last thing that is said about it.
    fn ctl(&self, at: HostId, order: &str) -> Result<Value> {
        // What ends otherwise than it should says so in its last line.
        let said = self.host(at).run(&format!("memlanectl --json {order} || :"))?;
        let last = said.lines().rev().find_map(|line| serde_json::from_str::<Value>(line).ok());
        let last = last.with_context(|| format!("memlanectl {order} said no JSON: {}", said.trim()))?;
        let refused = last["error"]["message"].as_str();
        ensure!(refused.is_none(), "the order was refused: {}", refused.unwrap_or_default());
        Ok(last)
    }

    /// Puts the guest's files on both hosts, launches it on host A, and waits until it talks.
    fn launch(&self, guest: &LinuxGuest) -> Result<ClientSession> {
        for host in self.hosts {
            host.copy(guest.kernel.image(), KERNEL)?;
            host.copy(guest.initramfs.file(), INITRAMFS)?;
            host.run(&format!("chmod 644 {KERNEL} {INITRAMFS} && touch {CONSOLE} && chmod 666 {CONSOLE}"))?;
            let tap = &guest.tap;
            host.run(&format!("ip tuntap add {tap} mode tap && ip link set {tap} master br0 up"))?;
        }
        let path = |path: &Path| path.display().to_string();
        // As `memlanectl setup` has named the network of the bridge.
        let text = guest.file().replace("network = \"lan\"", "network = \"br0\"");
        let text = text.replace(&path(guest.kernel.image()), KERNEL);
        let text = text.replace(&path(guest.initramfs.file()), INITRAMFS);
        let a = self.host(HostId::A);
        a.write(GUEST_FILE, &text)?;
        a.run(&format!("memlanectl launch {GUEST_FILE}"))?;
        let session = ClientSession::open(self.lan, guest.address, BOOT);
        session.with_context(|| {
            format!("its console says: {}", a.run(&format!("tail -n 5 {CONSOLE}")).unwrap_or_default())
        })
    }

    /// Describes the hosts for the report.
    fn described(&self) -> Result<Value> {
        let say = |host: &dyn OwnSystem, line: &str| host.run(line).map(|said| said.trim().to_owned());
        let describe = |host: &dyn OwnSystem| {
            let systemd = say(host, "systemctl --version | head -n 1")?;
            let memlane = say(host, "memlaned --version")?;
            anyhow::Ok(json!({
                "name": host.name(),
                "kernel": say(host, "uname -r")?,
                "systemd": systemd.split(' ').nth(1),
                "memlane_version": memlane.split(' ').nth(1),
                "accelerator": self.accelerator.as_str(),
            }))
        };
        let [a, b] = self.hosts;
        Ok(json!([describe(a)?, describe(b)?]))
    }
}
