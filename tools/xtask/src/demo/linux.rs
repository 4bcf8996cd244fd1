//! Guests of stock QEMU that run Linux: they check their own memory, and a client talks to them all the time.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memlane_lab::linux::{Accelerator, Initramfs, Kernel, LinuxGuest};
use memlane_lab::{Capture, ClientSession, EthernetFrame, GuestCounters, HostId, Lan, Rig};
use serde_json::{Value, json};

use super::options::{AcceleratorChoice, DemoOptions, GUEST, PROOF_LIMIT, WARM_UP};
use super::report::{DemoMove, DemoReport};

/// The number of pages that the guest writes in a second. It checks two for each, on a processor that may be emulated.
const DIRTY_RATE: u64 = 2000;
/// Longest wait for the guest to boot, on a machine that is busy with other things.
pub(super) const BOOT: Duration = Duration::from_secs(180);
/// The longest wait for an answer of a guest that has arrived: TCP waits longer and longer before it tries again.
const ANSWER: Duration = Duration::from_secs(60);
/// Longest wait for a frame that should have come already.
const FRAME: Duration = Duration::from_secs(1);

impl DemoOptions {
    /// Boots a Linux guest, and moves it there and back.
    pub(crate) fn move_linux_guest(&self, rig: &mut Rig) -> Result<DemoReport> {
        let (accelerator, why) = match self.accelerator {
            AcceleratorChoice::Auto => Accelerator::choose(),
            AcceleratorChoice::Kvm => (Accelerator::Kvm, "as ordered"),
            AcceleratorChoice::Tcg => (Accelerator::Tcg, "as ordered"),
        };
        let guest = self.linux_guest(rig.lab().host(HostId::A).directory(), accelerator)?;
        self.say(&format!("booting Linux {} with {accelerator} ({why})", guest.kernel.release()));
        let session =
            launch(rig, &guest).with_context(|| format!("on its console: {}", tail(&guest.console)))?;
        std::thread::sleep(WARM_UP);

        let mut at = HostId::A;
        let count = self.moves(2);
        let mut legs: Vec<DemoMove> = Vec::new();
        for number in 1..=count {
            let to = at.other();
            self.say(&format!("move {number} of {count}, to {}", rig.lab().host(to).name()));
            let order = self.migrate(rig.lab().host(to).name());
            let migrate = || {
                let migration = self.order(rig, at, &order, |_| ())?;
                let arrived = migration["outcome"] == "completed";
                let arrival =
                    if arrived { rig.ctl(to, &["watch", GUEST])?.last()?.clone() } else { Value::Null };
                Ok((migration, arrival))
            };
            legs.push(self.linux_leg(rig.lab().lan(), &guest, &session, (number, to), migrate)?);
            if !legs.last().is_some_and(DemoMove::is_whole) {
                break;
            }
            at = to;
        }
        let mut proof = None;
        if legs.last().is_some_and(DemoMove::is_whole) && !self.verify {
            self.say("once more, comparing digests of all memory in the pause");
            let destination = rig.lab().host(at.other()).name();
            let arguments = ["migrate", GUEST, destination, "--downtime-limit", PROOF_LIMIT, "--verify"];
            proof = Some(rig.ctl(at, &arguments)?.last()?.clone());
        }
        let limit = self.limit().to_owned();
        Ok(DemoReport {
            guest: described(&guest, why),
            legs,
            proof,
            hosts: None,
            limit,
            encrypted: !self.insecure,
        })
    }

    /// Describes the guest, with an initramfs that is built in a directory of this machine.
    pub(super) fn linux_guest(&self, directory: &Path, accelerator: Accelerator) -> Result<LinuxGuest> {
        let linked_only = [
            ("--flat-out", self.flat_out),
            ("--gap", self.gap),
            ("--tracker", self.tracker.is_some()),
            ("--backing", self.backing.is_some()),
            ("--readers", self.readers.is_some()),
        ];
        for (option, given) in linked_only {
            ensure!(!given, "{option} is for guests of memlane-vmm: --guest kvm or process");
        }
        let kernel = Kernel::obtain()?;
        let initramfs = Initramfs::build(&directory.join("initramfs"), &kernel)?;
        Ok(LinuxGuest {
            name: GUEST.to_owned(),
            vcpus: self.vcpus,
            ram: self.ram(),
            prealloc: self.prepared,
            working_set: self.working_set.unwrap_or_else(|| self.ram().part(4)),
            rate: self.dirty_rate.unwrap_or(DIRTY_RATE),
            ..LinuxGuest::new(kernel, initramfs, accelerator, directory.join("console"))
        })
    }

    /// Moves the guest by `migrate`, which returns the migration as both hosts tell it at its end, and looks at what the guest, its
    /// client and the switch saw.
    pub(super) fn linux_leg(
        &self,
        lan: &Lan,
        guest: &LinuxGuest,
        session: &ClientSession,
        (number, to): (u32, HostId),
        migrate: impl FnOnce() -> Result<(Value, Value)>,
    ) -> Result<DemoMove> {
        let before = GuestCounters::ask(lan, guest.address, "stats")?;
        let capture = lan.capture_from(to)?;
        session.take_longest_gap();
        let (migration, arrival) = migrate()?;
        let accelerator = guest.accelerator.as_str();
        if migration["outcome"] != "completed" {
            let more = json!({ "accelerator": accelerator });
            return Ok(DemoMove {
                number,
                migration,
                stats: Value::Null,
                oracle: Value::Null,
                readers: None,
                more,
            });
        }
        let heard = session.hear(ANSWER);
        let gap = session.take_longest_gap();
        let survived = heard.as_ref().is_ok_and(|heard| heard.boot_id == before.boot_id);
        let learned = self.learned_by_rarp(lan, &capture, guest, to)?;
        let after = GuestCounters::ask(lan, guest.address, "check")
            .with_context(|| format!("on the guest's console: {}", tail(&guest.console)))?;
        // As many for each of its checkers.
        let vcpus = u64::from(guest.vcpus);
        let pages = guest.working_set.bytes() / 4096 / vcpus * vcpus;
        let equal =
            after.failures == 0 && after.boot_id == before.boot_id && after.passes >= before.passes + pages;
        let more = json!({
            "accelerator": accelerator,
            "tcp_session_survived": survived,
            "client_longest_gap_seconds": gap.as_secs_f64(),
            "switch_learned_port": learned,
            "guest_checks": { "passes": after.passes, "failures": after.failures },
            "qemu_state_bytes": migration["vmm_state_bytes"],
            "qemu_pause_to_run_seconds": between(&migration["stopped_at_seconds"], &arrival["resumed_at_seconds"]),
        });
        let oracle =
            json!({ "equal": equal, "pages": pages, "checks": after.passes.saturating_sub(before.passes) });
        Ok(DemoMove { number, migration, stats: Value::Null, oracle, readers: None, more })
    }

    /// Returns whether the switch knows that the guest is at its new port, and knew it before the guest sent anything
    /// there. A switch learns from the first frame that arrives.
    fn learned_by_rarp(&self, lan: &Lan, capture: &Capture, guest: &LinuxGuest, to: HostId) -> Result<bool> {
        let first = capture.next_from(guest.mac, FRAME).context("reading what the switch received")?;
        let (learned, port) = (lan.learned_port(guest.mac)?, Lan::port_towards(to));
        let announced = first.as_ref().is_some_and(EthernetFrame::is_rarp);
        if !announced {
            let kind = first.map_or("none".to_owned(), |frame| format!("one of type {:#06x}", frame.kind()));
            self.say(&format!("the first frame of the guest at the switch's {port} was no RARP, but {kind}"));
        }
        if learned.as_deref() != Some(port) {
            let learned = learned.as_deref().unwrap_or("nowhere");
            self.say(&format!("the switch has learned that the guest is at {learned}, but it is at {port}"));
        }
        Ok(announced && learned.as_deref() == Some(port))
    }
}

/// Describes a guest for the report.
pub(super) fn described(guest: &LinuxGuest, why: &str) -> Value {
    json!({
        "name": GUEST,
        "vmm": "qemu",
        "kind": "linux",
        "kernel": guest.kernel.release(),
        "accelerator": guest.accelerator.as_str(),
        "accelerator_reason": why,
        "vcpus": guest.vcpus,
        "tracker": "pagemap",
        "dirty_rate": guest.rate,
    })
}

/// Starts the guest on host A, and waits until it talks.
fn launch(rig: &Rig, guest: &LinuxGuest) -> Result<ClientSession> {
    let file = rig.prepare_linux(guest)?;
    let file = file.to_str().context("the guest file's path is no UTF-8")?;
    let answer = rig.ctl(HostId::A, &["launch", file])?;
    ensure!(answer.code == 0, "the guest cannot be launched: {}", answer.text.trim());
    ClientSession::open(rig.lab().lan(), guest.address, BOOT)
}

/// Returns the seconds from one Unix time to another. Both hosts have the same clock here.
fn between(start: &Value, end: &Value) -> Value {
    match (start.as_f64(), end.as_f64()) {
        (Some(start), Some(end)) => json!(end - start),
        _ => Value::Null,
    }
}

/// Returns the last lines of a file.
fn tail(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(5).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}
