//! The scenarios: a file for each, which says what is measured and against what.
//!
//! A scenario is a type that holds its options and implements [`Scenario`], and a line in [`ScenarioCommand`].

mod bulk;
mod busy;
mod compressible;
mod encrypted;
mod hosts;
mod line;
mod lostport;
mod many;
mod outrun;
mod postcopy;
mod qemu;
mod shaped;
mod sparse;
mod wan;
mod writer;
mod zero;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, CommandFactory, Parser, Subcommand};
use memlane_lab::{LabOptions, Programs, RemoteHosts, Requirement, Rig, RigOptions, why_not};
use serde_json::{Value, json};

use crate::baseline::rpc;
use crate::report::{Case, CaseRun, CaseRuns, NamedFigures, ScenarioReport, Trace};
pub use bulk::BulkScenario;
pub use busy::BusyScenario;
pub use compressible::CompressibleScenario;
pub use encrypted::EncryptedScenario;
pub use hosts::OverSsh;
pub use lostport::LostPortScenario;
pub use many::ManyScenario;
pub use outrun::OutrunScenario;
pub use postcopy::PostcopyScenario;
pub use qemu::QemuScenario;
pub use shaped::ShapedScenario;
pub use sparse::SparseScenario;
pub use wan::WanScenario;
pub use zero::ZeroScenario;

/// Ports are slow on purpose in some scenarios.
const TABLES: &str = "[limits]\nmin_bandwidth = \"1mbit\"\n";

/// One kind of migration, and the figures that it is measured for. The type holds the options of the command line.
pub trait Scenario {
    /// The name of the scenario on the command line.
    const NAME: &'static str;
    /// Whether it works with hosts that exist already, whose ports are not shaped, delayed or taken down.
    const ON_HOSTS: bool = false;

    /// Returns the requirements on the machine.
    fn needs(&self) -> &'static [Requirement] {
        Requirement::LAB
    }

    /// Measures the scenario.
    ///
    /// # Errors
    ///
    /// If something fails that has to work for the figures to mean anything: a guest that arrives other than it left
    /// is such a failure.
    fn measure(&self, bench: &Bench) -> Result<ScenarioReport>;
}

/// The scenarios, on the command line.
#[derive(Subcommand, Debug, Clone)]
pub enum ScenarioCommand {
    /// All scenarios in turn, with their defaults
    All(Common),
    /// An idle guest of incompressible memory over unlimited ports, against raw sockets and QEMU's own migration
    Bulk(With<BulkScenario>),
    /// 4 ports of 1 Gbit/s, against what they can carry as TCP payload
    Shaped(With<ShapedScenario>),
    /// A guest that writes at 30, 60 and 90 % of what 2 ports carry, against the ideal for that
    Busy(With<BusyScenario>),
    /// A guest that writes faster than the ports carry: stun, post-copy, and the one after the other
    Outrun(With<OutrunScenario>),
    /// How long guests wait for pages in post-copy, against single pages over raw sockets and QEMU's own post-copy
    Postcopy(With<PostcopyScenario>),
    /// A guest most of whose pages hold zeros, against a plain read of such memory
    Zero(With<ZeroScenario>),
    /// A guest over one port of 1 Gbit/s with compression and without, of memory that LZ4 makes a third of, and of other
    Compressible(With<CompressibleScenario>),
    /// An idle guest with TLS and without, against raw sockets, the cipher, and QEMU's own migration with TLS
    Encrypted(With<EncryptedScenario>),
    /// 4 ports of 1 Gbit/s of which one is lost in mid-copy, against the ideal time for those left
    #[command(name = "lostport")]
    LostPort(With<LostPortScenario>),
    /// 8 guests at once, against one that has as much memory as all of them
    Many(With<ManyScenario>),
    /// A guest of 24 TiB of which 1 GiB is resident, against one that has nothing else
    Sparse(With<SparseScenario>),
    /// One port of 1 Gbit/s with a round trip of 150 ms, against what it carries
    Wan(With<WanScenario>),
    /// A Linux guest in QEMU, moved by Memlane and by QEMU itself
    Qemu(With<QemuScenario>),
}

/// The options of a scenario, and those that all scenarios have.
#[derive(Args, Debug, Clone)]
pub struct With<S: Args> {
    /// The scenario, with its options.
    #[command(flatten)]
    pub scenario: S,
    /// The options that all scenarios have.
    #[command(flatten)]
    pub common: Common,
}

/// The options that all scenarios have.
#[derive(Args, Debug, Clone)]
pub struct Common {
    /// Measurements of each kind
    #[arg(long, value_name = "NUMBER", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub repetitions: u32,
    /// The hosts, if they exist already.
    #[command(flatten)]
    pub hosts: OverSsh,
}

/// The programs, the hosts and the number of repetitions with which scenarios are measured.
#[derive(Debug, Clone)]
pub struct Bench {
    /// Memlane's programs.
    pub programs: Programs,
    /// The hosts, if they exist already; else the harness makes some.
    pub hosts: Option<RemoteHosts>,
    /// The number of times that each case is measured.
    pub repetitions: u32,
}

/// The result of one measurement of a case.
#[derive(Debug, Clone, Default)]
pub struct CaseResult {
    /// The figures of the measurement.
    pub figures: NamedFigures,
    /// Further results.
    pub detail: Value,
    /// The data of the pictures.
    pub trace: Trace,
}

impl ScenarioCommand {
    /// Measures the scenario, or all of them; `tell` gets each report as soon as it is complete.
    ///
    /// # Errors
    ///
    /// If the machine lacks what a scenario needs, or one fails. Of all scenarios the others are measured nevertheless.
    pub fn carry_out(
        &self,
        programs: &Programs,
        tell: &mut dyn FnMut(&ScenarioReport) -> Result<()>,
    ) -> Result<()> {
        match self {
            Self::All(common) => carry_out_all(programs, common, tell),
            Self::Bulk(order) => order.carry_out(programs, tell),
            Self::Shaped(order) => order.carry_out(programs, tell),
            Self::Busy(order) => order.carry_out(programs, tell),
            Self::Outrun(order) => order.carry_out(programs, tell),
            Self::Postcopy(order) => order.carry_out(programs, tell),
            Self::Zero(order) => order.carry_out(programs, tell),
            Self::Compressible(order) => order.carry_out(programs, tell),
            Self::Encrypted(order) => order.carry_out(programs, tell),
            Self::LostPort(order) => order.carry_out(programs, tell),
            Self::Many(order) => order.carry_out(programs, tell),
            Self::Sparse(order) => order.carry_out(programs, tell),
            Self::Wan(order) => order.carry_out(programs, tell),
            Self::Qemu(order) => order.carry_out(programs, tell),
        }
    }
}

fn carry_out_all(
    programs: &Programs,
    common: &Common,
    tell: &mut dyn FnMut(&ScenarioReport) -> Result<()>,
) -> Result<()> {
    ensure!(
        common.hosts.hosts()?.is_none(),
        "not every scenario works with --hosts; name the scenarios to measure, instead of all"
    );
    let repetitions = common.repetitions.to_string();
    let mut failed = Vec::new();
    for order in
        Defaults::command().get_subcommands().map(clap::Command::get_name).filter(|name| *name != "all")
    {
        let defaults = Defaults::parse_from(["", order, "--repetitions", &repetitions]);
        if let Err(error) = defaults.order.carry_out(programs, tell) {
            eprintln!("{order}: {error:#}");
            failed.push(order.to_owned());
        }
    }
    if !failed.is_empty() {
        bail!("these scenarios could not be measured: {}", failed.join(", "));
    }
    Ok(())
}

/// The scenarios with their default options.
#[derive(Parser)]
struct Defaults {
    #[command(subcommand)]
    order: ScenarioCommand,
}

impl<S: Scenario + Args> With<S> {
    fn carry_out(
        &self,
        programs: &Programs,
        tell: &mut dyn FnMut(&ScenarioReport) -> Result<()>,
    ) -> Result<()> {
        let hosts = self.common.hosts.hosts()?;
        match &hosts {
            Some(_) if !S::ON_HOSTS => {
                bail!("{} needs hosts that the harness makes; run it without --hosts", S::NAME)
            }
            Some(_) => {}
            None => {
                if let Some(missing) = why_not(self.scenario.needs()) {
                    bail!("cannot measure {}: {missing}", S::NAME);
                }
            }
        }
        let bench = Bench { programs: programs.clone(), hosts, repetitions: self.common.repetitions };
        let mut report = self.scenario.measure(&bench)?;
        if let Some(hosts) = &bench.hosts {
            let [source, destination] = &hosts.targets;
            report.notes.push(format!("between {source} and {destination}, whose ports were not shaped"));
            report.settings.insert("hosts".to_owned(), json!(hosts.targets));
        }
        tell(&report)
    }
}

impl Bench {
    /// Makes two hosts whose daemons do not encrypt and accept slow ports, because the ports of some scenarios are slow on purpose. For
    /// hosts that exist already, `lab` only says how fast their ports are.
    ///
    /// # Errors
    ///
    /// Those of [`Rig::new`] or [`Rig::over_ssh`].
    pub fn rig(&self, lab: LabOptions) -> Result<Rig> {
        let tables = TABLES.to_owned();
        if let Some(hosts) = &self.hosts {
            return Rig::over_ssh(&self.programs, hosts, lab.port_rate, tables, true);
        }
        Rig::new(&self.programs, RigOptions { lab, tables, insecure: true, ..RigOptions::default() })
    }

    /// Makes two hosts as [`Bench::rig`] does, whose daemons encrypt.
    ///
    /// # Errors
    ///
    /// Those of [`Rig::new`].
    pub fn encrypted_rig(&self, lab: LabOptions) -> Result<Rig> {
        Rig::new(&self.programs, RigOptions { lab, tables: TABLES.to_owned(), ..RigOptions::default() })
    }

    /// Measures each of `cases` once in each repetition. What goes with a case tells `measure` what to do.
    ///
    /// In each repetition another case comes first, because the machine may be slower to give memory to the first one.
    ///
    /// # Errors
    ///
    /// Those of `measure`.
    pub fn interleave<T>(
        &self,
        scenario: &str,
        cases: &[(Case, T)],
        mut measure: impl FnMut(&T) -> Result<CaseResult>,
    ) -> Result<CaseRuns> {
        let mut runs = CaseRuns::default();
        for repetition in 1..=self.repetitions {
            for turn in 0..cases.len() {
                let (case, what) = &cases[(turn + repetition as usize - 1) % cases.len()];
                eprintln!("{scenario}: repetition {repetition} of {}, {case}", self.repetitions);
                let CaseResult { figures, detail, trace } =
                    measure(what).with_context(|| format!("measuring {case}"))?;
                runs.push(CaseRun { repetition, case: case.clone(), figures, detail, trace });
            }
        }
        Ok(runs)
    }
}

/// Measures how soon pages come over a connection that carries nothing else.
fn single_pages(rig: &Rig) -> Result<CaseResult> {
    let rpc = rpc::measure(rig.lab())?;
    let figures = NamedFigures::from([("rpc_p50_us", rpc.rpc_p50_us), ("rpc_p99_us", rpc.rpc_p99_us)]);
    let trace = Trace { timeline: None, waits: Some(rpc.waits) };
    Ok(CaseResult { figures, detail: Value::Null, trace })
}
