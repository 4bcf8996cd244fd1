//! The options of commands that let things go wrong for as long as one likes.

use std::path::PathBuf;

use clap::Args;

use super::dice::seed_of_clock;

/// The options that these commands have in common.
#[derive(Args, Clone, Debug)]
pub(crate) struct RunOptions {
    /// Number that makes the plan of one run like that of another [default: another one each time, which is printed]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Build and run the programs with cargo's dev profile, whose assertions are on
    #[arg(long)]
    pub dev: bool,
    /// Where to keep logs of what fails; a soak keeps those of its whole run if this is given [default:
    /// memlane-COMMAND-SEED in the directory for temporary files]
    #[arg(long, value_name = "FOLDER")]
    pub logs: Option<PathBuf>,
    /// Print one JSON object a line: one for each round or move, and one for all of them at the end
    #[arg(long)]
    pub json: bool,
}

impl RunOptions {
    /// Returns the seed. If none was given, the clock chooses it.
    pub(crate) fn seed(&self) -> u64 {
        self.seed.unwrap_or_else(seed_of_clock)
    }

    /// Returns where this command keeps the logs of a run with this seed.
    pub(crate) fn logs(&self, command: &str, seed: u64) -> PathBuf {
        self.logs.clone().unwrap_or_else(|| std::env::temp_dir().join(format!("memlane-{command}-{seed}")))
    }
}
