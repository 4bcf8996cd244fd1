//! `cargo xtask torture`: daemons and VMMs are killed at random moments of migrations.
//!
//! - [`plan`] is what a round does, out of the seed and its number.
//! - [`round`] does it, on two hosts, and gathers what there is to know, out of VMMs, daemons and records.
//! - [`judge`] says what the guest's fate is, and what must not be.
//! - [`run()`] has rounds done side by side, prints a line for each and the [`table`] of all, and keeps what is needed to
//!   understand those that failed.

pub(crate) mod judge;
pub(crate) mod keep;
mod options;
pub(crate) mod plan;
mod report;
pub(crate) mod round;
mod run;
mod table;

use anyhow::{Context, Result, bail};
use memlane_lab::{Programs, Requirement, cleanup_on_signal, why_not};

use run::TortureRun;

pub(crate) use options::TortureOptions;

/// Does the rounds; returns true if every guest has one owner, or was lost as documented.
pub(crate) fn run(options: &TortureOptions) -> Result<bool> {
    if let Some(missing) = why_not(Requirement::LAB) {
        bail!(
            "this makes network namespaces and needs root: sudo env PATH=\"$PATH\" cargo xtask torture ({missing})"
        );
    }
    cleanup_on_signal().context("preparing to clean up")?;
    eprintln!("torture: building the programs");
    let programs = Programs::build(!options.run.dev)?;
    let run = TortureRun::new(options.clone(), programs);
    let rounds = match options.only {
        Some(round) => round..round + 1,
        None => options.first..options.first.saturating_add(options.rounds),
    };
    run.rounds(rounds)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use memlane_lab::skip;

    use super::*;

    #[derive(Parser)]
    struct Torture {
        #[command(flatten)]
        options: TortureOptions,
    }

    /// Keeps the command usable.
    #[test]
    fn a_few_rounds_end_well() {
        if skip("a_few_rounds_end_well", Requirement::LAB_WITH_KVM) {
            return;
        }
        let options = Torture::parse_from("torture --rounds 6 --seed 1 --dev".split(' ')).options;
        let programs = Programs::build(false).expect("the programs");
        let good = TortureRun::new(options, programs).rounds(0..6).expect("hosts");
        assert!(good, "see above for what was found, and where logs are kept");
    }
}
