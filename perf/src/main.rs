//! See the package description, and `memlane-perf --help`.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use memlane_api::units::Span;
use memlane_lab::{Lab, LabOptions, Programs, Rate, Size, agent};
use memlane_perf::baseline::memory::{self, MemoryState};
use memlane_perf::baseline::qemu::files;
use memlane_perf::baseline::raw::{self, RawOptions, Receiver};
use memlane_perf::cpu;
use memlane_perf::page;
use memlane_perf::report::Report;
use memlane_perf::scenario::Order;
use serde::Serialize;

/// Measures Memlane against the limits of the machine that it runs on, and against QEMU.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// End the output with one line of JSON, or with one for each of several scenarios
    #[arg(long, global = true)]
    json: bool,
    /// Write a page with tables and pictures of what scenarios found; only the picture of a guest that moved, if the
    /// file ends with .svg
    #[arg(long, global = true, value_name = "FILE.html")]
    report: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    #[command(flatten)]
    Scenario(Order),
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
        /// What it may write to, and removes at the end
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
    let of_scenario = matches!(cli.command, Command::Scenario(_));
    ensure!(of_scenario || cli.report.is_none(), "--report is about scenarios only");
    match cli.command {
        Command::Scenario(order) => {
            memlane_lab::cleanup_on_signal().context("installing signal handlers")?;
            let mut reports = Vec::new();
            order.carry_out(&Programs::build(true)?, &mut |report| {
                tell(report, cli.json)?;
                reports.push(report.clone());
                // After each, so that what was measured is there if another one fails.
                cli.report.as_deref().map_or(Ok(()), |file| write(&reports, file))
            })
        }
        Command::Raw(args) => {
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
        Command::Agent { directory } => agent(&directory),
        Command::Memcpy { bytes } => print(&memory::measure_memcpy(in_memory(bytes)?)?, cli.json),
    }
}

/// Carries out orders that come over ssh.
fn agent(directory: &Path) -> Result<()> {
    let mut receiver = Receiver::default();
    agent::serve(directory, std::io::stdin().lock(), std::io::stdout(), &mut |name, order| match name {
        cpu::ORDER => Some(cpu::tell(order)),
        _ => receiver.carry_out(name, order).or_else(|| files::carry_out(name, order)),
    })
}

/// A size that this process can have.
fn in_memory(size: Size) -> Result<usize> {
    usize::try_from(size.bytes()).with_context(|| format!("{size} are too many for an address space"))
}

/// Prints what a scenario has found.
fn tell(report: &Report, json: bool) -> Result<()> {
    println!("{report}");
    if json {
        println!("{}", report.json());
    }
    Ok(())
}

/// Writes a page about all that was found so far.
fn write(reports: &[Report], file: &Path) -> Result<()> {
    let text = match file.extension().is_some_and(|extension| extension == "svg") {
        true => page::picture(reports),
        false => Some(page::page(reports)),
    };
    let Some(text) = text else {
        eprintln!("no guest was seen at work so far, so there is no picture of one");
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
