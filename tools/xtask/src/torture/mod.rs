//! `cargo xtask torture`: daemons and VMMs are killed at random moments of migrations.
//!
//! - [`plan`] is what a round does, out of the seed and its number by [`dice`].
//! - [`round`] does it, on two hosts, and gathers what there is to know, out of VMMs, daemons ([`api`]) and [`record`]s.
//! - [`judge`] says what the guest's fate is, and what must not be.
//! - [`run()`] has rounds done side by side, prints a line for each and the [`table`] of all, and keeps what is needed to
//!   understand those that failed.

mod api;
mod dice;
mod judge;
mod keep;
mod plan;
mod record;
mod report;
mod round;
mod run;
mod table;

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use memlane_lab::{Programs, Requirement, cleanup_on_signal, why_not};

use run::Run;

/// What to do.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Number of rounds, each of which moves a guest and has something go wrong
    #[arg(long, default_value_t = 100)]
    rounds: u64,
    /// Number that makes one run like another [default: another one each time, which is printed]
    #[arg(long)]
    seed: Option<u64>,
    /// Do this round of the seed alone
    #[arg(long, value_name = "ROUND", conflicts_with = "rounds")]
    only: Option<u64>,
    /// The first round's number: goes on where another run has ended
    #[arg(long, value_name = "ROUND", default_value_t = 0, conflicts_with = "only")]
    first: u64,
    /// Rounds that are done at once, each on two hosts of its own
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    jobs: u8,
    /// Who the daemons run as: root, the user of memlaned.service with its capabilities, or each in every other round
    #[arg(long, value_enum, default_value = "both")]
    user: User,
    /// Build and run the programs with cargo's dev profile, whose assertions are on
    #[arg(long)]
    dev: bool,
    /// Where to keep logs of rounds that fail [default: memlane-torture-SEED in the directory for temporary files]
    #[arg(long, value_name = "FOLDER")]
    logs: Option<PathBuf>,
    /// Print one JSON object a line: one for each round, and one for all of them at the end
    #[arg(long)]
    json: bool,
}

/// Who the daemons run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum User {
    Root,
    Unit,
    Both,
}

/// Does the rounds; true if every guest has one owner, or was lost as documented.
pub fn run(options: &Options) -> Result<bool> {
    if let Some(missing) = why_not(Requirement::LAB) {
        bail!(
            "this makes network namespaces and needs root: sudo env PATH=\"$PATH\" cargo xtask torture ({missing})"
        );
    }
    cleanup_on_signal().context("preparing to clean up")?;
    eprintln!("torture: building the programs");
    let programs = Programs::build(!options.dev)?;
    let run = Run::new(options.clone(), programs);
    let rounds = match options.only {
        Some(round) => round..round + 1,
        None => options.first..options.first.saturating_add(options.rounds),
    };
    run.rounds(rounds)
}

impl Options {
    /// The seed, which is chosen by the clock if none was given.
    fn seed(&self) -> u64 {
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_secs());
        self.seed.unwrap_or_else(clock)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use memlane_lab::skip;

    use super::*;

    #[derive(Parser)]
    struct Torture {
        #[command(flatten)]
        options: Options,
    }

    /// So that it can be run when it is needed.
    #[test]
    fn a_few_rounds_end_well() {
        if skip("a_few_rounds_end_well", Requirement::LAB_WITH_KVM) {
            return;
        }
        let options = Torture::parse_from("torture --rounds 6 --seed 1 --dev".split(' ')).options;
        let programs = Programs::build(false).expect("the programs");
        let good = Run::new(options, programs).rounds(0..6).expect("hosts");
        assert!(good, "see above for what was found, and where logs are kept");
    }
}
