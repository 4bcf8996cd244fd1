//! `cargo xtask simulate`: whole migrations in virtual time, one for each seed.

use std::time::Instant;

use anyhow::Result;
use clap::Args;
use memlane_sim::{Plant, Run, Tally, simulate};

/// So many seeds that fail are shown before the rest is left.
const MOST_SHOWN: u64 = 5;
/// The trace of a seed that fails ends with so many lines of it.
const TRACE_LINES: usize = 60;

/// The options of `cargo xtask simulate`.
#[derive(Args, Clone, Debug)]
pub(crate) struct SimulateOptions {
    /// Number of seeds, each of which is a run of its own
    #[arg(long, default_value_t = 10_000)]
    pub seeds: u64,
    /// The first seed
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub first: u64,
    /// Run this seed alone
    #[arg(long, conflicts_with_all = ["seeds", "first"])]
    pub seed: Option<u64>,
    /// Print everything that happens
    #[arg(long)]
    pub verbose: bool,
}

/// Runs the seeds; returns true if nothing was violated.
pub(crate) fn run(options: &SimulateOptions) -> Result<bool> {
    let seeds = match options.seed {
        Some(seed) => seed..seed.saturating_add(1),
        None => options.first..options.first.saturating_add(options.seeds),
    };
    let (began, mut tally, mut failed) = (Instant::now(), Tally::default(), 0);
    for seed in seeds {
        let run = simulate(seed, Plant::Nothing, options.verbose);
        tally += &run.tally;
        run.trace.iter().for_each(|line| println!("{line}"));
        if let Some(violation) = &run.violation {
            show(&run, violation, options.verbose);
            failed += 1;
        }
        if failed == MOST_SHOWN {
            println!("{failed} seeds have failed; the rest is left");
            break;
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    println!("{tally}");
    println!("{:.0} seeds a second; {failed} failed", tally.seeds as f64 / seconds);
    Ok(failed == 0)
}

/// Shows a seed that failed, and how to see it again.
fn show(run: &Run, violation: &str, shown_already: bool) {
    if !shown_already {
        let again = simulate(run.seed, Plant::Nothing, true);
        let from = again.trace.len().saturating_sub(TRACE_LINES);
        again.trace[from..].iter().for_each(|line| println!("{line}"));
    }
    println!("seed {} failed: {violation}", run.seed);
    println!("again, with all that happens: cargo xtask simulate --seed {} --verbose", run.seed);
}
