//! A guest of `memlane-vmm`, moved by the daemons.

mod many;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use memlane_api::types::Migration;
use memlane_lab::{HostId, LabVmm, Readers, Rig, Size, unix_time};
use serde::Deserialize as _;
use serde_json::Value;

use crate::baseline::memory::warm_up;
use crate::cpu::{self, Meter, Used};
use crate::report::{NamedFigures, Trace, Waits};
use crate::scenario::CaseResult;
use crate::timeline::{Recorder, Timeline};
pub use many::{Together, migrate_together};

/// Name of the guest.
pub const GUEST: &str = "web1";
/// The time that a guest runs before it is moved, so that it moves at its full speed. The processor time that is used
/// meanwhile counts as idle use.
const WARM_UP: Duration = Duration::from_secs(1);
/// The time from one wake-up of an idle guest to the next, in milliseconds. Shorter times would be work, because each
/// wake-up takes up to 0.2 ms of a processor that the lanes need.
const IDLE_TICK_MS: u64 = 10;
/// The size of a page, in bytes.
pub(crate) const PAGE: f64 = 4096.0;

/// A guest, and the VMMs at both ends.
#[derive(Debug, Clone)]
pub struct BenchGuest {
    /// The size of the guest's memory.
    pub ram: Size,
    /// The contents of the guest's memory at first, as `memlane-vmm --fill` takes it.
    pub fill: &'static str,
    /// The way in which the guest writes its memory.
    pub writes: WriteLoad,
    /// The memory that the guest writes; a quarter of all if not given.
    pub working_set: Option<Size>,
    /// The memory that the guest may touch, spread over all; all of it if not given. Only a process may have this.
    pub resident: Option<Size>,
    /// The number of virtual CPUs that write.
    pub vcpus: u16,
    /// The number of virtual CPUs that only read.
    pub readers: u16,
    /// Whether all of the source's memory exists before the move. If so, pages of zeros are no holes.
    pub populated: bool,
    /// Whether the destination's memory is taken from the system before the move.
    pub prepared: bool,
    /// Whether the guest is a virtual machine; else it is threads of a process.
    pub kvm: bool,
    /// The way in which writes are noticed, as `memlane-vmm --tracker` takes it; the VMM's own choice if not given.
    pub tracker: Option<&'static str>,
}

/// The way in which a guest writes its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteLoad {
    /// The guest writes so many pages a second.
    Rate(u64),
    /// The guest writes as many pages as it can.
    FlatOut,
}

/// The figures of a move that has ended.
#[derive(Debug)]
pub struct MemlaneMove {
    /// The migration, as the source's daemon reported it at its end.
    pub migration: Value,
    /// The guest's own statistics at its destination; null if it did not arrive.
    pub guest: Value,
    /// The seconds from the order until the guest ran at its destination, or until the order had ended otherwise.
    pub seconds: f64,
    /// The processor time of both VMMs and both daemons, and of the kernel for them.
    pub used: Used,
    /// The processor time that they used while nothing moved.
    pub idle: Used,
    /// The processor seconds of the source's daemon alone.
    pub source_daemon: f64,
    /// The number of pages that the guest wrote in a second, from the order until the first look at it at its
    /// destination; none if it did not arrive.
    pub writes_per_second: Option<f64>,
    /// The speed of the vCPUs that only read, if the guest has any.
    pub readers: Option<Readers>,
    /// The progress of the guest and of the ports from moment to moment.
    pub timeline: Timeline,
    /// The time that the guest waited for each missing page; none if no page was missing.
    pub waits: Option<Waits>,
}

impl BenchGuest {
    /// The fill of a memory that cannot be compressed.
    pub const INCOMPRESSIBLE: &str = "zero=0,random=100,compressible=0";

    /// Makes an idle guest full of what cannot be compressed, which is moved into fresh memory.
    pub fn idle(ram: Size, kvm: bool) -> Self {
        Self {
            ram,
            fill: Self::INCOMPRESSIBLE,
            writes: WriteLoad::Rate(0),
            working_set: None,
            resident: None,
            vcpus: 1,
            readers: 0,
            populated: false,
            prepared: false,
            kvm,
            tracker: None,
        }
    }

    /// Starts the guest on host A and orders its move to host B, with more `arguments` to `memlanectl migrate`. When it
    /// has arrived, its memory is compared with the model. `look` sees each state of the migration as the daemon
    /// reports it, and may change the hosts meanwhile.
    ///
    /// # Errors
    ///
    /// If the order is refused, or the guest's memory is not what it must be. That the migration has failed is none:
    /// see [`MemlaneMove::arrived`].
    pub fn migrate(
        &self,
        rig: &mut Rig,
        arguments: &[&str],
        mut look: impl FnMut(&Rig, &Value),
    ) -> Result<MemlaneMove> {
        let mut ends = self.start(rig, GUEST)?;
        // Before what is used is measured, so that looking on is in either measurement. There is nothing to see of a guest
        // that does nothing.
        let vmms = if self.is_idle() { &[][..] } else { &[&ends.source, &ends.destination] };
        let recorder = Recorder::start(vmms, rig.lab().host(HostId::B))?;
        let mut meter = ends.meter(rig)?;
        let idle = meter.idle(WARM_UP);

        if !self.prepared && !rig.lab().is_remote() {
            warm_up(self.resident.unwrap_or(self.ram).bytes())?;
        }
        let waits_before = waits(rig)?;
        let mut readers = match self.readers {
            0 => None,
            readers => Some(Readers::before(&mut ends.source, self.vcpus..self.vcpus + readers)?),
        };
        let daemon = rig.daemon(HostId::A).pid();
        let of_daemon = |rig: &Rig| cpu::on(rig.lab().host(HostId::A), daemon);
        let written = Written::by(&ends.source.stats()?);

        let (before, daemon_before, ordered_at) = (meter.read(), of_daemon(rig)?, unix_time());
        let id = order(rig, GUEST, arguments)?;
        let migration = rig.watch(HostId::A, &id, |migration| {
            look(rig, migration);
            if let Some(readers) = &mut readers {
                readers.look(migration);
            }
        })?;
        let (used, ended_at) = (meter.read().since(&before), unix_time());
        let source_daemon = of_daemon(rig)? - daemon_before;
        let arrived = migration["outcome"] == "completed";
        let runs_at = resumed_at(&migration).filter(|_| arrived).unwrap_or(ended_at);
        let guest = if arrived { ends.destination.stats()? } else { Value::Null };
        let written = arrived.then(|| Written::by(&guest).since(&written));
        let told = Migration::deserialize(&migration).context("what memlanectl watch said last")?;
        // The clock of a host that is there already is not that of this machine.
        let ordered_at = if rig.lab().is_remote() { told.started_at_unix_seconds } else { ordered_at };
        let timeline = recorder.finish(&told)?;
        let waits = told.postcopy.is_some().then(|| waits(rig)).transpose()?;
        if arrived {
            ends.check()?;
        }
        Ok(MemlaneMove {
            migration,
            guest,
            seconds: runs_at - ordered_at,
            used,
            idle,
            source_daemon,
            writes_per_second: written,
            readers,
            timeline,
            waits: waits.map(|waits| waits.since(&waits_before)),
        })
    }

    fn is_idle(&self) -> bool {
        self.writes == WriteLoad::Rate(0) && self.readers == 0
    }

    /// Starts the guest's VMM on host A, and on host B the VMM that waits for the guest.
    fn start(&self, rig: &mut Rig, name: &str) -> Result<Ends> {
        let source = rig.start_vmm(HostId::A, name, &self.arguments(false))?;
        let destination = rig.start_vmm(HostId::B, name, &self.arguments(true))?;
        Ok(Ends { source, destination })
    }

    fn arguments(&self, incoming: bool) -> Vec<String> {
        let mut arguments: Vec<String> = Vec::new();
        let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        option("--guest", if self.kvm { "kvm" } else { "process" }.to_owned());
        option("--ram", self.ram.to_string());
        option("--fill", self.fill.to_owned());
        option("--vcpus", (self.vcpus + self.readers).to_string());
        option("--readers", self.readers.to_string());
        if let Some(tracker) = self.tracker {
            option("--tracker", tracker.to_owned());
        }
        if let Some(working_set) = self.working_set {
            option("--working-set", working_set.to_string());
        }
        if let Some(resident) = self.resident {
            option("--resident", resident.to_string());
        }
        match self.writes {
            WriteLoad::Rate(rate) => {
                option("--rate", rate.to_string());
                if rate == 0 {
                    option("--tick-ms", IDLE_TICK_MS.to_string());
                }
            }
            WriteLoad::FlatOut => arguments.push("--flat-out".to_owned()),
        }
        arguments.extend(incoming.then(|| "--incoming".to_owned()));
        let prepare = if incoming { self.prepared } else { self.populated };
        arguments.extend(prepare.then(|| "--prepare".to_owned()));
        arguments
    }
}

/// The number of pages that a guest has written until some moment.
struct Written {
    pages: f64,
    at: Instant,
}

impl Written {
    /// Reads it from the statistics that the guest's VMM has just reported. The time is that of the VMM's host.
    fn by(stats: &Value) -> Self {
        let steps = stats["steps"].as_array().into_iter().flatten().filter_map(Value::as_f64);
        Self { pages: steps.sum(), at: Instant::now() }
    }

    /// Returns the number of pages that were written in a second since then.
    fn since(&self, before: &Self) -> f64 {
        (self.pages - before.pages) / (self.at - before.at).as_secs_f64()
    }
}

/// The VMMs at both ends of a move.
struct Ends {
    // The source's ends by itself when its guest has left.
    source: LabVmm,
    destination: LabVmm,
}

impl Ends {
    fn meter(&mut self, rig: &mut Rig) -> Result<Meter> {
        let vmms = [(HostId::A, self.source.process().pid()), (HostId::B, self.destination.process().pid())];
        let daemons = [HostId::A, HostId::B].map(|id| (id, rig.daemon(id).pid()));
        Meter::on(rig.lab(), vmms.into_iter().chain(daemons))
    }

    /// Compares the guest that has arrived with the model.
    fn check(mut self) -> Result<()> {
        let report = self.destination.verify()?;
        ensure!(
            report["equal"] == true,
            "the guest's memory is not what it must be: {}",
            report["differences"]
        );
        drop(self.source);
        self.destination.quit()
    }
}

/// Gives the order on host A to move a guest, and returns the migration's identity.
fn order(rig: &Rig, guest: &str, arguments: &[&str]) -> Result<String> {
    let host = rig.lab().host(HostId::B).name();
    let answer = rig.ctl(HostId::A, &[&["migrate", guest, host, "--detach"], arguments].concat())?;
    let begun = answer.last()?;
    let id = begun["id"].as_str().with_context(|| format!("memlanectl migrate: {}", answer.text.trim()))?;
    Ok(id.to_owned())
}

impl MemlaneMove {
    /// Returns the move, if the guest runs at its destination.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub fn arrived(self) -> Result<Self> {
        ensure_completed(&self.migration)?;
        Ok(self)
    }

    /// Returns the results that every scenario needs.
    ///
    /// # Errors
    ///
    /// As [`MemlaneMove::figures`].
    pub fn measured(self) -> Result<CaseResult> {
        let figures = self.figures()?;
        Ok(self.with_figures(figures))
    }

    /// Returns the results with other figures, to which a scenario has added its own.
    pub fn with_figures(self, figures: NamedFigures) -> CaseResult {
        let trace = Trace { timeline: Some(self.timeline), waits: self.waits };
        CaseResult { figures, detail: self.migration, trace }
    }

    /// Returns the figures that every scenario needs. Rates are of the contents of the guest's memory, without headers.
    ///
    /// # Errors
    ///
    /// If the daemon does not tell what it should.
    pub fn figures(&self) -> Result<NamedFigures> {
        let (ram, sent) = (self.number("pages_total")? * PAGE, self.number("bytes_sent")?);
        let mut figures = NamedFigures::from([
            ("total_seconds", self.seconds),
            ("gbit_per_second", ram * 8.0 / 1e9 / self.seconds),
        ]);
        let round = &self.migration["rounds"][0];
        if let (Some(bytes), Some(seconds)) = (round["bytes"].as_f64(), round["seconds"].as_f64()) {
            let contents = self.number("pages_sent")? * PAGE / sent;
            figures.set("round_one_gbit_per_second", bytes * contents * 8.0 / 1e9 / seconds);
        }
        let milliseconds = |key: &str| self.migration[key].as_f64().map(|seconds| seconds * 1e3);
        figures.set_some("downtime_ms", milliseconds("downtime_seconds"));
        if let (Some(save), Some(load)) = (milliseconds("save_seconds"), milliseconds("load_seconds")) {
            figures.set("vmm_state_ms", save + load);
        }
        figures.set("rounds", self.migration["rounds"].as_array().map_or(0.0, |rounds| rounds.len() as f64));
        figures.set("sent_gb", sent / 1e9);
        figures.set("cpu_seconds", self.used.beyond(&self.idle));
        figures.set("cpu_seconds_per_gb", self.used.beyond(&self.idle) / (sent / 1e9));
        Ok(figures)
    }

    /// Returns a number that the daemon reports about the migration.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub fn number(&self, key: &str) -> Result<f64> {
        self.migration[key].as_f64().with_context(|| format!("no {key} in {}", self.migration))
    }

    /// Returns the number of lanes that the migration had.
    pub fn lanes(&self) -> usize {
        self.migration["lanes"].as_array().map_or(0, Vec::len)
    }
}

fn ensure_completed(migration: &Value) -> Result<()> {
    let reason = migration["reason"].as_str().unwrap_or("it does not say why");
    ensure!(migration["outcome"] == "completed", "{} was not moved: {reason}", migration["guest"]);
    Ok(())
}

/// Reads how long guests have waited for pages on host B since its daemon began.
fn waits(rig: &Rig) -> Result<Waits> {
    Ok(Waits::of_metrics(&rig.metrics(HostId::B)?, "memlane_postcopy_fault_seconds"))
}

/// Returns when the guest ran again, if it did, by the clock of the source's host. In the lab both hosts are this
/// machine.
fn resumed_at(migration: &Value) -> Option<f64> {
    Some(migration["stopped_at_seconds"].as_f64()? + migration["downtime_seconds"].as_f64()?)
}
