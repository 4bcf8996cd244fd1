//! One move, and what it took.

use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use memlane_lab::linux::LinuxGuest;
use memlane_lab::qmp::Monitor;
use memlane_lab::{Counters, HostId, Rig, Session, wait_for};
use serde_json::{Value, json};

use super::report::{Parts, Run};
use super::way::{End, Way, set_up};
use super::{DOWNTIME_LIMIT, PATIENCE};
use crate::cpu::{Meter, Reading};

/// Longest wait for a guest to boot and to fill its memory, on a processor that may be emulated.
const BOOT: Duration = Duration::from_secs(300);
/// What a guest does at the end of its boot is over after this.
const SETTLE: Duration = Duration::from_secs(1);
/// How long it is watched what the processes use while nothing moves.
const IDLE: Duration = Duration::from_secs(3);
/// Longest move.
const MOVE: Duration = Duration::from_secs(600);
/// How often the source's QEMU is looked at: the daemon ends it soon after the guest has left.
const LOOK: Duration = Duration::from_millis(5);
/// Where the destination's QEMU listens for the source's.
const MIGRATION_PORT: u16 = 4444;

/// What has become of a guest that was moved.
pub(super) enum Outcome {
    /// It found all its memory as it should be.
    Whole(Run),
    /// It did not, or does not even answer; with what it said.
    Broken(String),
}

/// Boots a guest on host A, moves it to host B, and has it check its memory there. `daemons` are those of both hosts.
/// Its memory may be `anonymous` where Memlane has no part in it.
pub(super) fn run(
    rig: &Rig,
    guest: &LinuxGuest,
    way: Way,
    anonymous: bool,
    daemons: &[u32],
) -> Result<Outcome> {
    let start = |id| way.start(rig, guest, anonymous, id);
    let source = start(HostId::A).context("starting the source's QEMU")?;
    let before = hear(rig, guest, BOOT).context("waiting for the guest to boot")?;
    let destination = start(HostId::B).context("starting the destination's QEMU")?;
    sleep(SETTLE);

    let mut processes = vec![source.pid, destination.pid];
    if way == Way::Memlane {
        processes.extend(daemons);
    }
    let mut pair = Pair { source, destination, meter: Meter::new(processes)? };
    let run = pair.measure(rig, guest, way)?;
    let outcome = match pair.check(rig, guest, &before) {
        Ok(()) => Outcome::Whole(run),
        Err(error) => Outcome::Broken(format!("{error:#}; {}", pair.destination.doing()?)),
    };
    pair.source.quit(rig, guest, HostId::A)?;
    pair.destination.quit(rig, guest, HostId::B)?;
    Ok(outcome)
}

/// Asks the guest for its counters until it answers.
fn hear(rig: &Rig, guest: &LinuxGuest, timeout: Duration) -> Result<Counters> {
    Session::open(rig.lab().lan(), guest.address, timeout)?.hear(timeout)
}

/// Both ends of a move.
struct Pair {
    source: End,
    destination: End,
    /// Whoever works for it.
    meter: Meter,
}

/// The moment at which the guest runs at the destination.
struct Arrival {
    at: f64,
    /// What was used by then.
    used: Reading,
}

impl Pair {
    fn measure(&mut self, rig: &Rig, guest: &LinuxGuest, way: Way) -> Result<Run> {
        if way != Way::Memlane {
            let address = rig.lab().host(HostId::B).ports()[0].address;
            set_up(&mut self.source.monitor, way)?;
            set_up(&mut self.destination.monitor, way)?;
            let listen = json!({ "uri": uri(address) });
            self.destination.monitor.execute("migrate-incoming", listen)?;
        }
        self.source.monitor.forget_events()?;
        self.destination.monitor.forget_events()?;

        let idle = self.meter.idle(IDLE);
        let (before, ordered_at) = (self.meter.read(), unix_time());
        let (arrival, ram_bytes) = match way {
            Way::Memlane => self.move_by_daemons(rig, guest)?,
            Way::Plain | Way::Multifd(_) => self.move_by_qemu(rig)?,
        };
        let used = arrival.used.since(&before);

        let stop = self.source.monitor.event("STOP", PATIENCE)?.context("the guest never stood still")?;
        Ok(Run::new(Parts {
            total: arrival.at - ordered_at,
            downtime: arrival.at - stop.at,
            ram_bytes,
            used,
            idle,
        }))
    }

    /// Has the guest that has arrived check all its memory.
    fn check(&self, rig: &Rig, guest: &LinuxGuest, before: &Counters) -> Result<()> {
        hear(rig, guest, PATIENCE)?;
        let after = Counters::ask(rig.lab().lan(), guest.address, "check")?;
        ensure!(after.boot_id == before.boot_id, "the guest has booted anew");
        ensure!(after.failures == 0, "the guest found {} pages not as it left them", after.failures);
        let (pages, checked) = (guest.working_set.bytes() / 4096, after.passes - before.passes);
        // Each vCPU has as many pages as any other.
        ensure!(
            checked >= pages - pages % u64::from(guest.vcpus),
            "the guest has checked {checked} pages only"
        );
        Ok(())
    }

    fn move_by_daemons(&mut self, rig: &Rig, guest: &LinuxGuest) -> Result<(Arrival, u64)> {
        let destination = rig.lab().host(HostId::B).name();
        let limit = format!("{}ms", DOWNTIME_LIMIT.as_millis());
        let arguments = ["migrate", &guest.name, destination, "--downtime-limit", &limit];
        std::thread::scope(|scope| {
            let order = scope.spawn(|| rig.ctl(HostId::A, &arguments));
            let arrival = self.await_arrival(|_| Ok(!order.is_finished()));
            let answer = order.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            ensure!(answer.code == 0, "memlanectl migrate: {}", answer.text.trim());
            let bytes = answer.last()?["bytes_sent"].as_u64();
            Ok((arrival?, bytes.with_context(|| format!("no bytes_sent in {}", answer.text.trim()))?))
        })
    }

    fn move_by_qemu(&mut self, rig: &Rig) -> Result<(Arrival, u64)> {
        let address = rig.lab().host(HostId::B).ports()[0].address;
        self.source.monitor.execute("migrate", json!({ "uri": uri(address) }))?;
        let arrival = self.await_arrival(|source| {
            while let Some(event) = source.event("MIGRATION", Duration::ZERO)? {
                if event.data["status"] == "failed" {
                    let why = source.execute("query-migrate", json!({}))?;
                    bail!("QEMU's own migration has failed: {why}");
                }
            }
            Ok(true)
        })?;
        let moved = wait_for("the end of QEMU's own migration", PATIENCE, || {
            let state = self.source.monitor.execute("query-migrate", json!({}));
            let over = |state: &Value| state["status"] == "completed";
            state.map_or_else(|error| Some(Err(error)), |state| over(&state).then_some(Ok(state)))
        })??;
        let bytes = moved["ram"]["transferred"].as_u64();
        Ok((arrival, bytes.with_context(|| format!("QEMU does not say what it has sent: {moved}"))?))
    }

    /// Waits until the guest runs at the destination, as long as it is `under_way`, which may ask the source.
    fn await_arrival(&mut self, mut under_way: impl FnMut(&mut Monitor) -> Result<bool>) -> Result<Arrival> {
        let until = Instant::now() + MOVE;
        loop {
            // Before the event is looked for, which comes before the end.
            let goes_on = under_way(&mut self.source.monitor)?;
            // The source's QEMU ends soon after the guest has left.
            self.meter.look();
            if let Some(event) = self.destination.monitor.event("RESUME", LOOK)? {
                return Ok(Arrival { at: event.at, used: self.meter.read() });
            }
            ensure!(goes_on, "the order has ended, and the guest does not run at the destination");
            ensure!(Instant::now() < until, "the guest has not arrived after {MOVE:?}");
        }
    }
}

fn uri(address: std::net::Ipv4Addr) -> String {
    format!("tcp:{address}:{MIGRATION_PORT}")
}

fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
