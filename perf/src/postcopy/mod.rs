//! How long a guest waits for pages that are still at its source, beside how long a page takes over an idle connection.
//!
//! The guest is one of `memlane-vmm` whose memory cannot be compressed, and which writes it all the time. It is moved
//! with post-copy at once, so that all its memory follows it, and with post-copy after one round, so that what it wrote
//! meanwhile does. The rest of its memory is streamed over all ports as fast as they carry it, and the guest's faults
//! go beside that. In each run single pages are asked for over the same ports first ([`rpc`]), when no guest runs:
//! neither end can be quicker than that.

mod report;

use anyhow::{Context, Result, ensure};
use clap::Args;
use memlane_lab::{HostId, LabOptions, Programs, Rate, Requirement, Rig, RigOptions, Size, Vmm, why_not};
use serde_json::Value;

use crate::baseline::rpc;
pub use report::{Faults, Mode, ModeFigures, PostcopyReport, Run, Settings};

/// How long the guest runs before it is moved, so that it moves in full swing.
const WARM_UP: std::time::Duration = std::time::Duration::from_secs(1);
const GUEST: &str = "web1";

/// What to measure.
#[derive(Args, Debug, Clone)]
pub struct PostcopyOptions {
    /// Memory of the guest
    #[arg(long, default_value = "2GiB")]
    pub ram: Size,
    /// Memory that the guest writes [default: half of it]
    #[arg(long)]
    pub working_set: Option<Size>,
    /// Pages that the guest writes a second [default: as many as it can]
    #[arg(long, value_name = "PAGES_PER_S", value_parser = clap::value_parser!(u64).range(1..))]
    pub dirty_rate: Option<u64>,
    /// Virtual CPUs of the guest that write
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=8))]
    pub vcpus: u16,
    /// Virtual CPUs that it has moreover, which only read
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=7))]
    pub readers: u16,
    /// Ports between the two hosts
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub ports: u8,
    /// What each port carries, such as 1gbit; unlimited if not given
    #[arg(long)]
    pub port_rate: Option<Rate>,
    /// Moves in each mode
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub repetitions: u32,
}

/// Moves a guest in each mode as often as `options` say, in turn.
///
/// # Errors
///
/// If a move fails, the guest waits for no page in it, or its memory is not what it must be after it.
pub fn measure(programs: &Programs, options: &PostcopyOptions) -> Result<PostcopyReport> {
    let lab = LabOptions {
        ports: usize::from(options.ports),
        port_rate: options.port_rate,
        ..LabOptions::default()
    };
    // The ports may be slow on purpose.
    let tables = "[limits]\nmin_bandwidth = \"1mbit\"\n".to_owned();
    let mut rig = Rig::new(programs, RigOptions { lab, tables, ..RigOptions::default() })?;
    let kvm = why_not(&[Requirement::Kvm]).is_none();

    let mut runs = Mode::ALL.map(|_| Vec::new());
    for repetition in 1..=options.repetitions {
        for (mode, runs) in Mode::ALL.into_iter().zip(&mut runs) {
            eprintln!("postcopy: repetition {repetition} of {}, {mode}", options.repetitions);
            let run = run(&mut rig, options, mode, kvm);
            runs.push(run.with_context(|| format!("moving the guest with post-copy, {mode}"))?);
        }
    }
    Ok(PostcopyReport::new(Settings::new(options, kvm), runs))
}

/// One move of a guest from host A to host B.
fn run(rig: &mut Rig, options: &PostcopyOptions, mode: Mode, kvm: bool) -> Result<Run> {
    let rpc = rpc::measure(rig.lab()).context("asking for single pages")?;
    let arguments = options.vmm_arguments(kvm);
    let incoming = [&arguments[..], &["--incoming".to_owned()]].concat();
    let source = rig.start_vmm(HostId::A, GUEST, &arguments)?;
    let mut destination = rig.start_vmm(HostId::B, GUEST, &incoming)?;
    std::thread::sleep(WARM_UP);

    let host = rig.lab().host(HostId::B).name();
    let answer = rig.ctl(HostId::A, &["migrate", GUEST, host, "--postcopy", mode.as_str()])?;
    ensure!(answer.code == 0, "memlanectl migrate: {}", answer.text.trim());
    let run = Run::new(rpc, answer.last()?)?;
    check(&mut destination)?;
    // The source's VMM ends by itself.
    drop(source);
    destination.quit()?;
    Ok(run)
}

fn check(destination: &mut Vmm) -> Result<()> {
    let report: Value = destination.verify()?;
    ensure!(report["equal"] == true, "the guest's memory is not what it must be: {}", report["differences"]);
    Ok(())
}

impl PostcopyOptions {
    fn working_set(&self) -> Size {
        self.working_set.unwrap_or_else(|| self.ram.part(2))
    }

    fn vmm_arguments(&self, kvm: bool) -> Vec<String> {
        let mut arguments: Vec<String> =
            ["--fill", "zero=0,random=100,compressible=0"].map(str::to_owned).into();
        for (option, value) in [
            ("--guest", if kvm { "kvm" } else { "process" }.to_owned()),
            ("--ram", self.ram.to_string()),
            ("--working-set", self.working_set().to_string()),
            ("--vcpus", (self.vcpus + self.readers).to_string()),
            ("--readers", self.readers.to_string()),
        ] {
            arguments.extend([option.to_owned(), value]);
        }
        match self.dirty_rate {
            Some(rate) => arguments.extend(["--rate".to_owned(), rate.to_string()]),
            None => arguments.push("--flat-out".to_owned()),
        }
        arguments
    }
}
