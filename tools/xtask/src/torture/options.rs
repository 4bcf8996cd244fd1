//! The options of the rounds.

use clap::{Args, ValueEnum};

use crate::common::options::RunOptions;

/// The options of `cargo xtask torture`.
#[derive(Args, Clone, Debug)]
pub(crate) struct TortureOptions {
    /// Number of rounds, each of which moves a guest and has something go wrong
    #[arg(long, default_value_t = 100)]
    pub rounds: u64,
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
    /// The options that it has in common with other commands.
    #[command(flatten)]
    pub run: RunOptions,
}

/// The user that the daemons run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum User {
    Root,
    Unit,
    Both,
}
