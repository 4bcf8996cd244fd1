//! The options of a soak.

use clap::{Args, ValueEnum};

use crate::common::options::RunOptions;

/// The options of `cargo xtask soak`.
#[derive(Args, Clone, Debug)]
pub(crate) struct SoakOptions {
    /// How long to go on, in minutes
    #[arg(long, default_value_t = 10)]
    pub minutes: u64,
    /// Steps after which it ends, instead of a time; most steps move one guest, some two
    #[arg(long, conflicts_with = "minutes")]
    pub steps: Option<u64>,
    /// The first step's number: begins with a fresh fleet where another run has failed
    #[arg(long, value_name = "STEP", default_value_t = 0)]
    pub first: u64,
    /// Which guests there are: those of memlane-vmm, a Linux in QEMU, or both
    #[arg(long, value_enum, default_value = "both")]
    pub guests: SoakGuests,
    /// After a fault, go on with a fresh fleet; otherwise the first fault ends the run
    #[arg(long)]
    pub go_on: bool,
    /// The options that it has in common with other commands.
    #[command(flatten)]
    pub run: RunOptions,
}

/// The guests of the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SoakGuests {
    Linked,
    Qemu,
    Both,
}
