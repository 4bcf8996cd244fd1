//! One migration from a QEMU to another.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use memlane_lab::qmp::Monitor;
use memlane_lab::{HostId, Rig, unix_time, wait_for};
use serde_json::{Value, json};

use super::{DOWNTIME_LIMIT, QemuMethod, uri};
use crate::cpu::{CpuReading, Meter, Used};
use crate::report::NamedFigures;

/// The time for which the processes are measured while nothing moves.
const IDLE: Duration = Duration::from_secs(1);
/// The longest wait for QEMU to notice that the migration is over.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest migration.
const LONGEST: Duration = Duration::from_secs(600);
/// The time between two looks at the migration's progress.
const LOOK: Duration = Duration::from_millis(5);

/// The QEMUs at both ends of a migration.
pub struct QemuPair<'a> {
    /// The monitor of the QEMU in which the guest runs.
    pub source: &'a mut Monitor,
    /// The monitor of the QEMU that waits for the guest, with `-incoming defer`.
    pub destination: &'a mut Monitor,
    /// The meter of all processes that work for the migration.
    pub meter: Meter,
}

/// The figures of a migration that has ended well.
#[derive(Debug, Clone)]
pub struct QemuMove {
    /// The time from the order to the event RESUME of the destination, in seconds.
    pub seconds: f64,
    /// The time from the event STOP of the source to the event RESUME of the destination, in seconds, both by QEMU's
    /// own account.
    pub downtime: f64,
    /// The number of bytes that the source sent for RAM, headers included.
    pub ram_bytes: u64,
    /// The processor time used during the migration.
    pub used: Used,
    /// The processor time used while nothing moved.
    pub idle: Used,
    /// The source's own figures at the end: QEMU's query-migrate.
    pub told: Value,
}

/// The moment at which the guest runs at the destination.
struct Arrival {
    at: f64,
    /// The processor time used until then.
    used: CpuReading,
}

impl QemuPair<'_> {
    /// Has QEMU move the guest, over a connection or more to `address` at the destination.
    ///
    /// # Errors
    ///
    /// If QEMU refuses or fails.
    pub fn by_qemu(mut self, way: QemuMethod, address: Ipv4Addr) -> Result<QemuMove> {
        way.set_up(self.source)?;
        way.set_up(self.destination)?;
        self.destination.execute("migrate-incoming", json!({ "uri": uri(address) }))?;
        self.measure(|migration| {
            migration.source.execute("migrate", json!({ "uri": uri(address) }))?;
            if way == QemuMethod::Postcopy {
                migration.source.execute("migrate-start-postcopy", json!({}))?;
            }
            let arrival = migration.await_arrival(goes_on)?;
            let told = wait_for("the end of QEMU's own migration", PATIENCE, || {
                let state = migration.source.execute("query-migrate", json!({}));
                let over = |state: &Value| state["status"] == "completed";
                state.map_or_else(|error| Some(Err(error)), |state| over(&state).then_some(Ok(state)))
            })??;
            let bytes = told["ram"]["transferred"].as_u64();
            Ok((arrival, bytes.with_context(|| format!("QEMU does not say what it has sent: {told}"))?, told))
        })
    }

    /// Has the daemons move the guest from host A to host B, with more `arguments` to `memlanectl migrate`.
    ///
    /// # Errors
    ///
    /// If the order is refused, or the guest does not arrive.
    pub fn by_daemons(&mut self, rig: &Rig, guest: &str, arguments: &[&str]) -> Result<QemuMove> {
        let destination = rig.lab().host(HostId::B).name();
        let limit = format!("{}ms", DOWNTIME_LIMIT.as_millis());
        let mut order = [&["migrate", guest, destination], arguments].concat();
        if !arguments.contains(&"--downtime-limit") {
            order.extend(["--downtime-limit", &limit]);
        }
        self.measure(|migration| {
            std::thread::scope(|scope| {
                let order = scope.spawn(|| rig.ctl(HostId::A, &order));
                let arrival = migration.await_arrival(|_| Ok(!order.is_finished()));
                let answer = order.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                ensure!(answer.code == 0, "memlanectl migrate: {}", answer.text.trim());
                let told = answer.last()?.clone();
                let bytes =
                    told["bytes_sent"].as_u64().with_context(|| format!("no bytes_sent in {told}"))?;
                Ok((arrival?, bytes, told))
            })
        })
    }

    /// Measures what `order` does, which returns the guest's arrival, the bytes that were sent for RAM, and what else
    /// was told.
    ///
    /// # Errors
    ///
    /// Those of `order`, and if the guest never stood still at the source.
    fn measure(
        &mut self,
        order: impl FnOnce(&mut Self) -> Result<(Arrival, u64, Value)>,
    ) -> Result<QemuMove> {
        self.source.forget_events()?;
        self.destination.forget_events()?;
        let idle = self.meter.idle(IDLE);
        let (before, ordered_at) = (self.meter.read(), unix_time());
        let (arrival, ram_bytes, told) = order(self)?;
        let stop = self.source.event("STOP", PATIENCE)?.context("the guest never stood still")?;
        Ok(QemuMove {
            seconds: arrival.at - ordered_at,
            downtime: arrival.at - stop.at,
            ram_bytes,
            used: arrival.used.since(&before),
            idle,
            told,
        })
    }

    /// Waits until the guest runs at the destination, as long as it is `under_way`, which may ask the source.
    ///
    /// # Errors
    ///
    /// Those of `under_way`, and if it ends without an arrival.
    fn await_arrival(&mut self, mut under_way: impl FnMut(&mut Monitor) -> Result<bool>) -> Result<Arrival> {
        let until = Instant::now() + LONGEST;
        loop {
            // Before the event is looked for, which comes before the end.
            let goes_on = under_way(self.source)?;
            // The source's QEMU may end soon after the guest has left.
            self.meter.look();
            if let Some(event) = self.destination.event("RESUME", LOOK)? {
                return Ok(Arrival { at: event.at, used: self.meter.read() });
            }
            ensure!(goes_on, "the order has ended, and the guest does not run at the destination");
            ensure!(Instant::now() < until, "the guest has not arrived after {LONGEST:?}");
        }
    }
}

/// Returns false if QEMU's own migration has failed.
fn goes_on(source: &mut Monitor) -> Result<bool> {
    while let Some(event) = source.event("MIGRATION", Duration::ZERO)? {
        if event.data["status"] == "failed" {
            let why = source.execute("query-migrate", json!({}))?;
            bail!("QEMU's own migration has failed: {why}");
        }
    }
    Ok(true)
}

impl QemuMove {
    /// Returns the figures that a scenario needs, of a guest with `ram` bytes of memory.
    pub fn figures(&self, ram: u64) -> NamedFigures {
        let sent = self.ram_bytes as f64 / 1e9;
        let mut figures = NamedFigures::from([
            ("total_seconds", self.seconds),
            ("gbit_per_second", ram as f64 * 8.0 / 1e9 / self.seconds),
            ("downtime_ms", self.downtime * 1e3),
            ("sent_gb", sent),
            ("cpu_seconds", self.used.beyond(&self.idle)),
            ("cpu_seconds_per_gb", self.used.beyond(&self.idle) / sent),
        ]);
        // A daemon tells how long QEMU itself took to save and to load its state.
        let told = |key: &str| self.told[key].as_f64();
        let state = told("save_seconds").zip(told("load_seconds")).map(|(save, load)| (save + load) * 1e3);
        figures.set_some("qemu_state_ms", state);
        figures
    }
}
