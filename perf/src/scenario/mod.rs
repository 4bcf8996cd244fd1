//! What is measured: a file for each scenario, which says against what.
//!
//! A scenario is a type that holds its options and implements [`Scenario`], and a line in [`Order`].

mod bulk;
mod busy;
mod compressible;
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
use memlane_lab::{Hosts, LabOptions, Programs, Requirement, Rig, RigOptions, why_not};
use serde_json::{Value, json};

use crate::baseline::rpc;
use crate::report::{Case, Figures, Report, Run, Runs, Trace};
pub use bulk::Bulk;
pub use busy::Busy;
pub use compressible::Compressible;
pub use hosts::OverSsh;
pub use lostport::LostPort;
pub use many::Many;
pub use outrun::Outrun;
pub use postcopy::Postcopy;
pub use qemu::Qemu;
pub use shaped::Shaped;
pub use sparse::Sparse;
pub use wan::Wan;
pub use zero::Zero;

/// One kind of migration, and what is asked about it. The type holds what it can be told on the command line.
pub trait Scenario {
    /// Its name, as on the command line.
    const NAME: &'static str;
    /// Whether it can do with hosts that are there already, whose ports nobody shapes, delays or takes down.
    const ON_HOSTS: bool = false;

    /// What it needs of the machine.
    fn needs(&self) -> &'static [Requirement] {
        Requirement::LAB
    }

    /// Measures.
    ///
    /// # Errors
    ///
    /// If something fails that has to work for the figures to mean anything: a guest that arrives other than it left
    /// is such a failure.
    fn measure(&self, bench: &Bench) -> Result<Report>;
}

/// The scenarios, on the command line.
#[derive(Subcommand, Debug, Clone)]
pub enum Order {
    /// All scenarios in turn, with their defaults
    All(Common),
    /// An idle guest of incompressible memory over unlimited ports, against raw sockets and QEMU's own migration
    Bulk(With<Bulk>),
    /// 4 ports of 1 Gbit/s, against what they can carry as TCP payload
    Shaped(With<Shaped>),
    /// A guest that writes at 30, 60 and 90 % of what 2 ports carry, against the ideal for that
    Busy(With<Busy>),
    /// A guest that writes faster than the ports carry: stun, post-copy, and the one after the other
    Outrun(With<Outrun>),
    /// How long guests wait for pages in post-copy, against single pages over raw sockets and QEMU's own post-copy
    Postcopy(With<Postcopy>),
    /// A guest most of whose pages hold zeros, against a plain read of such memory
    Zero(With<Zero>),
    /// A guest over one port of 1 Gbit/s with compression and without, of memory that LZ4 makes a third of, and of other
    Compressible(With<Compressible>),
    /// 4 ports of 1 Gbit/s of which one is lost in mid-copy, against the ideal time for those left
    #[command(name = "lostport")]
    LostPort(With<LostPort>),
    /// 8 guests at once, against one that has as much memory as all of them
    Many(With<Many>),
    /// A guest of 24 TiB of which 1 GiB is resident, against one that has nothing else
    Sparse(With<Sparse>),
    /// One port of 1 Gbit/s with a round trip of 150 ms, against what it carries
    Wan(With<Wan>),
    /// A Linux guest in QEMU, moved by Memlane and by QEMU itself
    Qemu(With<Qemu>),
}

/// A scenario's own options, and those that all have.
#[derive(Args, Debug, Clone)]
pub struct With<S: Args> {
    /// The scenario, with its options.
    #[command(flatten)]
    pub scenario: S,
    /// What all have.
    #[command(flatten)]
    pub common: Common,
}

/// What every scenario can be told.
#[derive(Args, Debug, Clone)]
pub struct Common {
    /// Measurements of each kind
    #[arg(long, value_name = "NUMBER", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub repetitions: u32,
    /// Hosts that are there already.
    #[command(flatten)]
    pub hosts: OverSsh,
}

/// What scenarios are measured with.
#[derive(Debug, Clone)]
pub struct Bench {
    /// Memlane's programs.
    pub programs: Programs,
    /// Hosts that are there already; else the harness makes some.
    pub hosts: Option<Hosts>,
    /// How often each case is measured.
    pub repetitions: u32,
}

/// What was found of a case once.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    /// Its figures.
    pub figures: Figures,
    /// What else there is to be known.
    pub detail: Value,
    /// What pictures show of it.
    pub trace: Trace,
}

impl Order {
    /// Measures the scenario, or all of them; `tell` gets each report as soon as it is there.
    ///
    /// # Errors
    ///
    /// If the machine lacks what a scenario needs, or one fails. Of all scenarios the others are measured nevertheless.
    pub fn carry_out(&self, programs: &Programs, tell: &mut dyn FnMut(&Report) -> Result<()>) -> Result<()> {
        match self {
            Self::All(common) => carry_out_all(programs, common, tell),
            Self::Bulk(order) => order.carry_out(programs, tell),
            Self::Shaped(order) => order.carry_out(programs, tell),
            Self::Busy(order) => order.carry_out(programs, tell),
            Self::Outrun(order) => order.carry_out(programs, tell),
            Self::Postcopy(order) => order.carry_out(programs, tell),
            Self::Zero(order) => order.carry_out(programs, tell),
            Self::Compressible(order) => order.carry_out(programs, tell),
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
    tell: &mut dyn FnMut(&Report) -> Result<()>,
) -> Result<()> {
    ensure!(common.hosts.hosts()?.is_none(), "name the scenarios: not all can do with --hosts");
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
        bail!("could not be measured: {}", failed.join(", "));
    }
    Ok(())
}

/// Scenarios that nobody has told anything.
#[derive(Parser)]
struct Defaults {
    #[command(subcommand)]
    order: Order,
}

impl<S: Scenario + Args> With<S> {
    fn carry_out(&self, programs: &Programs, tell: &mut dyn FnMut(&Report) -> Result<()>) -> Result<()> {
        let hosts = self.common.hosts.hosts()?;
        match &hosts {
            Some(_) if !S::ON_HOSTS => {
                bail!("{} needs hosts that the harness makes; leave --hosts away", S::NAME)
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
            report.notes.push(format!("between {source} and {destination}, whose ports nobody shaped"));
            report.settings.insert("hosts".to_owned(), json!(hosts.targets));
        }
        tell(&report)
    }
}

impl Bench {
    /// Two hosts with daemons that accept ports however slow: those of a scenario are slow on purpose. Of hosts that are
    /// there already `lab` says only how fast their ports are.
    ///
    /// # Errors
    ///
    /// Those of [`Rig::new`] or [`Rig::over_ssh`].
    pub fn rig(&self, lab: LabOptions) -> Result<Rig> {
        let tables = "[limits]\nmin_bandwidth = \"1mbit\"\n".to_owned();
        if let Some(hosts) = &self.hosts {
            return Rig::over_ssh(&self.programs, hosts, lab.port_rate, tables);
        }
        Rig::new(&self.programs, RigOptions { lab, tables, ..RigOptions::default() })
    }

    /// Measures each of `cases` once in each repetition. What goes with a case tells `measure` what to do.
    ///
    /// In each repetition another one is the first, to whom the machine itself may be slower to give memory.
    ///
    /// # Errors
    ///
    /// Those of `measure`.
    pub fn interleave<T>(
        &self,
        scenario: &str,
        cases: &[(Case, T)],
        mut measure: impl FnMut(&T) -> Result<Measured>,
    ) -> Result<Runs> {
        let mut runs = Runs::default();
        for repetition in 1..=self.repetitions {
            for turn in 0..cases.len() {
                let (case, what) = &cases[(turn + repetition as usize - 1) % cases.len()];
                eprintln!("{scenario}: repetition {repetition} of {}, {case}", self.repetitions);
                let Measured { figures, detail, trace } =
                    measure(what).with_context(|| format!("measuring {case}"))?;
                runs.push(Run { repetition, case: case.clone(), figures, detail, trace });
            }
        }
        Ok(runs)
    }
}

/// How soon pages come over a connection on which nothing else is.
fn single_pages(rig: &Rig) -> Result<Measured> {
    let rpc = rpc::measure(rig.lab())?;
    let figures = Figures::from([("rpc_p50_us", rpc.rpc_p50_us), ("rpc_p99_us", rpc.rpc_p99_us)]);
    let trace = Trace { timeline: None, waits: Some(rpc.waits) };
    Ok(Measured { figures, detail: Value::Null, trace })
}
