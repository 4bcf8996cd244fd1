//! One move of the Linux guest, and its figures.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memlane_lab::linux::LinuxGuest;
use memlane_lab::{ClientSession, GuestCounters, HostId, Rig};

use super::end::QemuEnd;
use super::mover::{Mover, PATIENCE};
use crate::baseline::memory::warm_up;
use crate::baseline::qemu::{QemuMove, QemuPair};
use crate::cpu::Meter;

/// Longest wait for a guest to boot and to fill its memory, on a processor that may be emulated.
const BOOT: Duration = Duration::from_secs(300);
/// The time after which a guest is idle at the end of its boot.
const SETTLE: Duration = Duration::from_secs(1);

/// The state of a guest after its move.
pub(super) enum MoveOutcome {
    /// The guest found all its memory as it should be.
    Whole(QemuMove),
    /// The guest found its memory damaged, or does not even answer; with what it said.
    Broken(String),
}

/// Boots a guest on host A, moves it to host B, and makes it check its memory there. `daemons` are the process IDs of
/// both daemons. If QEMU moves the guest, its memory may be `anonymous`.
pub(super) fn run(
    rig: &Rig,
    guest: &LinuxGuest,
    mover: Mover,
    anonymous: bool,
    daemons: &[u32],
) -> Result<MoveOutcome> {
    let start = |id| QemuEnd::start(mover, rig, guest, anonymous, id);
    let mut source = start(HostId::A).context("starting the source's QEMU")?;
    let before = hear(rig, guest, BOOT).context("waiting for the guest to boot")?;
    let mut destination = start(HostId::B).context("starting the destination's QEMU")?;
    sleep(SETTLE);
    warm_up(guest.ram.bytes())?;

    let mut processes = vec![source.pid, destination.pid];
    if mover == Mover::Daemons {
        processes.extend(daemons);
    }
    let mut migration = QemuPair {
        source: &mut source.monitor,
        destination: &mut destination.monitor,
        meter: Meter::new(processes)?,
    };
    let moved = match mover {
        Mover::Daemons => migration.by_daemons(rig, &guest.name, &[])?,
        Mover::Qemu(way) => migration.by_qemu(way, rig.lab().host(HostId::B).ports()[0].address)?,
    };
    let outcome = match check(rig, guest, &before) {
        Ok(()) => MoveOutcome::Whole(moved),
        Err(error) => MoveOutcome::Broken(format!("{error:#}; {}", destination.doing()?)),
    };
    source.quit(rig, guest, HostId::A)?;
    destination.quit(rig, guest, HostId::B)?;
    Ok(outcome)
}

/// Asks the guest for its counters until it answers.
fn hear(rig: &Rig, guest: &LinuxGuest, timeout: Duration) -> Result<GuestCounters> {
    ClientSession::open(rig.lab().lan(), guest.address, timeout)?.hear(timeout)
}

/// Makes the guest that has arrived check all its memory.
fn check(rig: &Rig, guest: &LinuxGuest, before: &GuestCounters) -> Result<()> {
    hear(rig, guest, PATIENCE)?;
    let after = GuestCounters::ask(rig.lab().lan(), guest.address, "check")?;
    ensure!(after.boot_id == before.boot_id, "the guest has rebooted");
    ensure!(after.failures == 0, "the guest found {} pages not as it left them", after.failures);
    let (pages, checked) = (guest.working_set.bytes() / 4096, after.passes - before.passes);
    // Each vCPU has as many pages as any other.
    ensure!(checked >= pages - pages % u64::from(guest.vcpus), "the guest has checked {checked} pages only");
    Ok(())
}
