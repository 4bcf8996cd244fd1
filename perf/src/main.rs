//! See the package description, and `memlane-perf --help`.

#![forbid(unsafe_code)]

use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use memlane_api::units::Span;
use memlane_lab::{Lab, LabOptions, Programs, Rate, Size, agent};
use memlane_perf::baseline::memcpy;
use memlane_perf::baseline::memory::MemoryState;
use memlane_perf::baseline::qemu::files;
use memlane_perf::baseline::raw::{self, RawAgent, RawOptions};
use memlane_perf::cpu;
use memlane_perf::page;
use memlane_perf::report::ScenarioReport;
use memlane_perf::scenario::ScenarioCommand;
use serde::Serialize;

/// Measures Memlane against the limits of the machine that it runs on, and against QEMU.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: PerfCommand,
    /// End the output with one line of JSON, or with one for each of several scenarios
    #[arg(long, global = true)]
    json: bool,
    /// Write a page with tables and pictures of what scenarios found; only the picture of a guest that moved, if the
    /// file ends with .svg
    #[arg(long, global = true, value_name = "FILE.html")]
    report: Option<PathBuf>,
}

#[derive(Subcommand)]
enum PerfCommand {
    #[command(flatten)]
    Scenario(ScenarioCommand),
    /// What sockets carry between two network namespaces, memory to memory, and how soon they bring a single page
    /// (needs root)
    Raw(RawArgs),
    /// What one core copies into shared memory
    Memcpy {
        /// How much to copy
        #[arg(long, default_value = "1GiB")]
        bytes: Size,
    },
    /// The harness's other half on a host that is reached over ssh
    #[command(hide = true)]
    Agent {
        /// The directory that the agent may write to, and removes at the end
        directory: PathBuf,
    },
}

#[derive(Args)]
struct RawArgs {
    /// Ports between the two hosts
    #[arg(long, default_value_t = 1)]
    ports: usize,
    /// What each port carries, such as 1gbit; unlimited if not given
    #[arg(long)]
    port_rate: Option<Rate>,
    /// How long a packet takes through a port, one way, such as 75ms; ports are then joined by a forwarder
    #[arg(long)]
    port_delay: Option<Span>,
    /// How much to move in all
    #[arg(long, default_value = "1GiB")]
    bytes: Size,
    /// The state of the memory received into
    #[arg(long, value_enum, default_value_t = MemoryState::Prepared)]
    memory: MemoryState,
    /// Connections over each port, with a thread at either end
    #[arg(long, default_value_t = 1)]
    connections_per_port: usize,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let of_scenario = matches!(cli.command, PerfCommand::Scenario(_));
    ensure!(
        of_scenario || cli.report.is_none(),
        "--report works only with scenarios, and not with raw or memcpy"
    );
    match cli.command {
        PerfCommand::Scenario(order) => {
            memlane_lab::cleanup_on_signal().context("installing signal handlers")?;
            let mut reports = Vec::new();
            order.carry_out(&Programs::build(true)?, &mut |report| {
                tell(report, cli.json)?;
                reports.push(report.clone());
                // After each, so that what was measured is there if another one fails.
                cli.report.as_deref().map_or(Ok(()), |file| write(&reports, file))
            })
        }
        PerfCommand::Raw(args) => {
            memlane_lab::cleanup_on_signal().context("installing signal handlers")?;
            let lab = Lab::new(LabOptions {
                ports: args.ports,
                port_rate: args.port_rate,
                port_delay: args.port_delay.map(|delay| delay.0),
                ..LabOptions::default()
            })?;
            let options = RawOptions {
                bytes: in_memory(args.bytes)?,
                connections_per_port: args.connections_per_port,
                destination: args.memory,
            };
            print(&raw::measure(&lab, &options)?, cli.json)
        }
        PerfCommand::Agent { directory } => agent(&directory),
        PerfCommand::Memcpy { bytes } => print(&memcpy::measure_memcpy(in_memory(bytes)?)?, cli.json),
    }
}

/// Carries out orders that come over ssh.
fn agent(directory: &Path) -> Result<()> {
    let mut receiver = RawAgent::default();
    agent::serve(directory, std::io::stdin().lock(), std::io::stdout(), &mut |name, order| match name {
        cpu::ORDER => Some(cpu::tell(order)),
        _ => receiver.carry_out(name, order).or_else(|| files::carry_out(name, order)),
    })
}

/// Converts a size to one that fits into the address space of this process.
fn in_memory(size: Size) -> Result<usize> {
    usize::try_from(size.bytes())
        .with_context(|| format!("{size} do not fit into the address space of this program; choose less"))
}

/// Prints what a scenario has found.
fn tell(report: &ScenarioReport, json: bool) -> Result<()> {
    println!("{report}");
    if json {
        println!("{}", report.json());
    }
    Ok(())
}

/// Writes a page about all results so far.
fn write(reports: &[ScenarioReport], file: &Path) -> Result<()> {
    let text = match file.extension().is_some_and(|extension| extension == "svg") {
        true => page::picture(reports),
        false => Some(page::page(reports)),
    };
    let Some(text) = text else {
        eprintln!("no scenario has recorded a guest so far, so no picture was written");
        return Ok(());
    };
    std::fs::write(file, text).with_context(|| format!("writing the report {}", file.display()))
}

fn print(report: &(impl Display + Serialize), json: bool) -> Result<()> {
    println!("{report}");
    if json {
        println!("{}", serde_json::to_string(report)?);
    }
    Ok(())
}
