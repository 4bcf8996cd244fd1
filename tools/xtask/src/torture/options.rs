//! The options of the rounds.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};

/// The options of `cargo xtask torture`.
#[derive(Args, Clone, Debug)]
pub(crate) struct TortureOptions {
    /// Number of rounds, each of which moves a guest and has something go wrong
    #[arg(long, default_value_t = 100)]
    pub rounds: u64,
    /// Number that makes one run like another [default: another one each time, which is printed]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Do this round of the seed alone
    #[arg(long, value_name = "ROUND", conflicts_with = "rounds")]
    pub only: Option<u64>,
    /// The first round's number: goes on where another run has ended
    #[arg(long, value_name = "ROUND", default_value_t = 0, conflicts_with = "only")]
    pub first: u64,
    /// Rounds that are done at once, each on two hosts of its own
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub jobs: u8,
    /// Who the daemons run as: root, the user of memlaned.service with its capabilities, or each in every other round
    #[arg(long, value_enum, default_value = "both")]
    pub user: User,
    /// Build and run the programs with cargo's dev profile, whose assertions are on
    #[arg(long)]
    pub dev: bool,
    /// Where to keep logs of rounds that fail [default: memlane-torture-SEED in the directory for temporary files]
    #[arg(long, value_name = "FOLDER")]
    pub logs: Option<PathBuf>,
    /// Print one JSON object a line: one for each round, and one for all of them at the end
    #[arg(long)]
    pub json: bool,
}

/// The user that the daemons run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum User {
    Root,
    Unit,
    Both,
}

impl TortureOptions {
    /// Returns the seed. If none was given, the clock chooses it.
    pub(crate) fn seed(&self) -> u64 {
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_secs());
        self.seed.unwrap_or_else(clock)
    }
}
