//! `postcopy`: how long a guest waits for pages that are still at its source, while the rest of its memory is streamed
//! over all ports as fast as they carry it.
//!
//! There are two guests, whose memory cannot be compressed:
//!
//! - one of `memlane-vmm` that writes its memory all the time, moved by Memlane with post-copy at **once**, so that all its
//!   memory follows it, and after one **round**, so that what it wrote meanwhile does. Its daemon tells how long it waited,
//!   from when a fault was seen until the page was placed. The baseline **raw** asks for single pages over the same ports
//!   while nothing moves (see [`rpc`](crate::baseline::rpc)): no page can come sooner.
//! - one of stock **QEMU** that reads its memory all the time and itself notes how long it waits (see [`toucher`]). It is
//!   moved by Memlane and by QEMU's own post-copy with preempt, from and to the same QEMU with the same memory.
//!
//! [`toucher`]: crate::baseline::qemu::toucher

use anyhow::{Context, Result, ensure};
use clap::Args;
use memlane_lab::{LabOptions, Rate, Requirement, Size, why_not};
use serde_json::{Value, json};

use super::{Bench, CaseResult, Scenario, single_pages};
use crate::baseline::qemu::toucher::{LEAST_WAIT, PostcopyMover, Touched, Toucher};
use crate::memlane::{BenchGuest, MemlaneMove, PAGE, WriteLoad};
use crate::report::{
    Case, CaseRuns, Contender, NamedFigures, ScenarioReport, Trace, Waits, microseconds_within,
};

/// The names of the figures that are found of every guest's waits.
const P50: &str = "fault_p50_us";
const P99: &str = "fault_p99_us";

/// The question is how long single pages take, and not how long the guest stands still: where programs are built
/// beside it, the forecast of a pause may be longer than the usual limit, and the order would be given up.
const LIMIT: [&str; 2] = ["--downtime-limit", "5s"];

/// The options of the scenario.
#[derive(Args, Debug, Clone)]
pub struct PostcopyScenario {
    /// Memory of the guests
    #[arg(long, default_value = "2GiB")]
    pub ram: Size,
    /// Memory that the writing guest writes [default: half of it]
    #[arg(long)]
    pub working_set: Option<Size>,
    /// Pages that the guest writes a second [default: as many as it can]
    #[arg(long, value_name = "PAGES_PER_S", value_parser = clap::value_parser!(u64).range(1..))]
    pub dirty_rate: Option<u64>,
    /// Virtual CPUs of the guest that write
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=8))]
    pub vcpus: u16,
    /// Further virtual CPUs of the guest, which only read
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=7))]
    pub readers: u16,
    /// Ports between the two hosts; Memlane has lanes on each, and QEMU all its connections on the first
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub ports: u8,
    /// What each port carries, such as 1gbit; unlimited if not given
    #[arg(long)]
    pub port_rate: Option<Rate>,
}

#[derive(Clone, Copy)]
enum PostcopyCase {
    /// The guest of `memlane-vmm`, moved as `memlanectl migrate --postcopy` names it.
    Writer(&'static str),
    Toucher(PostcopyMover),
    Page,
}

impl Scenario for PostcopyScenario {
    const NAME: &'static str = "postcopy";

    fn needs(&self) -> &'static [Requirement] {
        Requirement::LAB_WITH_QEMU
    }

    fn measure(&self, bench: &Bench) -> Result<ScenarioReport> {
        let lab =
            LabOptions { ports: usize::from(self.ports), port_rate: self.port_rate, ..LabOptions::default() };
        let mut rig = bench.rig(lab)?;
        let writer = self.writer();
        let toucher = Toucher::new(rig.lab(), self.ram.bytes().try_into()?)?;
        let shim = bench.programs.shim();

        let runs = bench.interleave(Self::NAME, &cases(), |what| match *what {
            PostcopyCase::Writer(mode) => {
                let order = [&["--postcopy", mode][..], &LIMIT].concat();
                told(writer.migrate(&mut rig, &order, |_, _| {})?.arrived()?)
            }
            PostcopyCase::Toucher(mover) => seen(toucher.migrate(&rig, &shim, mover)?),
            PostcopyCase::Page => single_pages(&rig),
        })?;
        self.report(runs, &writer)
    }
}

/// Returns all cases: the two guests moved by Memlane, and the baseline of each.
fn cases() -> [(Case, PostcopyCase); 5] {
    [
        (by_memlane("now"), PostcopyCase::Writer("now")),
        (by_memlane("hybrid"), PostcopyCase::Writer("hybrid")),
        (Contender::Raw.case("page"), PostcopyCase::Page),
        (by_memlane("qemu guest"), PostcopyCase::Toucher(PostcopyMover::Daemons)),
        (Contender::Qemu.case("postcopy-preempt"), PostcopyCase::Toucher(PostcopyMover::Qemu)),
    ]
}

fn by_memlane(how: &str) -> Case {
    Contender::Memlane.case(how)
}

/// Returns the figures that the daemon reports of a move.
fn told(moved: MemlaneMove) -> Result<CaseResult> {
    let postcopy = &moved.migration["postcopy"];
    let number =
        |key: &str| postcopy[key].as_f64().with_context(|| format!("no {key} of post-copy in {postcopy}"));
    let faults = number("faults")?;
    ensure!(
        faults > 0.0,
        "the guest waited for no page, so there is nothing to tell: let it write more of its memory \
         (--working-set, --dirty-rate), or shape the ports (--port-rate)"
    );
    let (streamed, seconds) = (number("pages_streamed")? * PAGE, number("seconds")?);
    let mut figures = NamedFigures::from([
        ("faults", faults),
        (P50, number("fault_p50_us")?),
        (P99, number("fault_p99_us")?),
        ("fault_max_us", number("fault_max_us")?),
        ("requests", faults),
        ("stream_gbit_per_second", streamed * 8.0 / 1e9 / seconds.max(1e-9)),
        ("postcopy_seconds", seconds),
    ]);
    figures.set("downtime_ms", moved.number("downtime_seconds")? * 1e3);
    Ok(moved.with_figures(figures))
}

/// Returns the figures that a guest has seen itself, and those that its mover reports of the pages that were asked for.
fn seen(touched: Touched) -> Result<CaseResult> {
    let Touched { moved, mut waits } = touched;
    ensure!(
        !waits.is_empty(),
        "the guest waited for no page, so there is nothing to tell: give it more --ram"
    );
    waits.sort_unstable();
    let within = |percent| microseconds_within(&waits, percent);
    let mut figures = NamedFigures::from([
        ("faults", waits.len() as f64),
        (P50, within(50)),
        (P99, within(99)),
        ("fault_max_us", within(100)),
    ]);
    let told = &moved.told;
    let requests = [&told["postcopy"]["faults"], &told["ram"]["postcopy-requests"]];
    figures.set_some("requests", requests.into_iter().find_map(Value::as_f64));
    figures.set("downtime_ms", moved.downtime * 1e3);
    let trace = Trace { timeline: None, waits: Some(Waits::of(&waits)) };
    Ok(CaseResult { figures, detail: moved.told, trace })
}

impl PostcopyScenario {
    fn working_set(&self) -> Size {
        self.working_set.unwrap_or_else(|| self.ram.part(2))
    }

    /// Returns the guest that writes. It is a virtual machine if there is KVM.
    fn writer(&self) -> BenchGuest {
        BenchGuest {
            writes: self.dirty_rate.map_or(WriteLoad::FlatOut, WriteLoad::Rate),
            working_set: Some(self.working_set()),
            vcpus: self.vcpus,
            readers: self.readers,
            ..BenchGuest::idle(self.ram, why_not(&[Requirement::Kvm]).is_none())
        }
    }

    fn report(&self, runs: CaseRuns, writer: &BenchGuest) -> Result<ScenarioReport> {
        let (now, page) = (by_memlane("now"), Contender::Raw.case("page"));
        let (ours, theirs) = (by_memlane("qemu guest"), Contender::Qemu.case("postcopy-preempt"));
        let p99s = runs.values(&now, P99)?.into_iter().zip(runs.values(&page, "rpc_p99_us")?);
        let least = LEAST_WAIT.as_micros();
        let ratios = [
            (
                "p50_vs_rpc",
                runs.quotients((&now, P50), (&page, "rpc_p50_us"))?,
                "what half of the waits of the guest that writes did not exceed, moved at once, by the daemon's \
                 clock: over the same of single pages over raw sockets"
                    .to_owned(),
            ),
            (
                "p99_over_rpc_us",
                p99s.map(|(fault, page)| fault - page).collect(),
                "what 99 of 100 of them did not exceed, less the same of single pages, in microseconds".to_owned(),
            ),
            (
                "p50_vs_qemu",
                runs.quotients((&ours, P50), (&theirs, P50))?,
                format!(
                    "what half of the waits of the guest in stock QEMU did not exceed, by the guest's own clock: \
                     moved by Memlane, over moved by QEMU's post-copy with preempt over the first port; reads from {least} µs are waits"
                ),
            ),
            (
                "p99_vs_qemu",
                runs.quotients((&ours, P99), (&theirs, P99))?,
                "the same of 99 of 100 of them".to_owned(),
            ),
        ];
        let Self { ram, ports, vcpus, readers, .. } = self;
        let rate = match self.dirty_rate {
            None => "as fast as it can".to_owned(),
            Some(rate) => format!("at {rate} pages a second"),
        };
        let carries = self.port_rate.map_or_else(|| "unlimited".to_owned(), |rate| format!("of {rate}"));
        let kind = if writer.kvm { "kvm" } else { "process" };
        let headline = format!(
            "a {kind} guest of {ram} writes {} of it {rate}, with {vcpus} vCPU(s) and {readers} that only read, and one \
             of {ram} in QEMU reads all of it, over {ports} port(s), {carries}",
            self.working_set()
        );
        let settings = json!({
            "guest": kind,
            "ram_bytes": ram.bytes(),
            "working_set_bytes": self.working_set().bytes(),
            "dirty_rate": self.dirty_rate,
            "vcpus": vcpus,
            "readers": readers,
            "ports": ports,
            "port_bits_per_second": self.port_rate.map(|rate| rate.bits_per_second()),
            "least_wait_seconds": LEAST_WAIT.as_secs_f64(),
        });
        let mut report = ScenarioReport::new(Self::NAME, headline, &settings, runs)?;
        for (name, values, meaning) in ratios {
            report.ratio(name, values, meaning);
        }
        report.columns = vec![
            "faults",
            "requests",
            P50,
            P99,
            "fault_max_us",
            "stream_gbit_per_second",
            "postcopy_seconds",
            "downtime_ms",
            "rpc_p50_us",
            "rpc_p99_us",
        ];
        Ok(report)
    }
}
