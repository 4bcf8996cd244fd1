//! `cargo xtask soak`: a small fleet of guests lives for long while things go wrong.
//!
//! - [`plan`] is what a step does, out of the seed and its number: who moves, by which [`policy`], and which
//!   [`trouble`] comes meanwhile.
//! - [`fleet`] is the hosts and the guests that live there: [`linked`] ones, and a [`linux`] in QEMU.
//! - [`step`] moves guests, has the [`turmoil`] begin and end, and waits until nothing is under way. [`judge`] says what
//!   must not be.
//! - [`run()`] does steps until the time is up, watches over [`logs`] and over the [`growth`] of daemons, prints a
//!   [`report`], and keeps what is needed to understand a fault.

mod fleet;
mod growth;
mod judge;
mod keep;
mod linked;
mod linux;
mod logs;
mod options;
mod plan;
mod policy;
mod report;
mod run;
mod step;
mod trouble;
mod turmoil;

use anyhow::{Context, Result, bail};
use memlane_lab::{Programs, Requirement, flag_on_signal, why_not};

use run::SoakRun;

pub(crate) use options::SoakOptions;

/// Does the steps; returns true if nothing was lost, and nothing else was found that must not be.
pub(crate) fn run(options: &SoakOptions) -> Result<bool> {
    if let Some(missing) = why_not(Requirement::LAB) {
        bail!(
            "this makes network namespaces and needs root: sudo env PATH=\"$PATH\" cargo xtask soak ({missing})"
        );
    }
    let interrupted = flag_on_signal().context("preparing to clean up")?;
    eprintln!("soak: building the programs");
    let programs = Programs::build(!options.run.dev)?;
    SoakRun::new(options.clone(), programs, interrupted)?.go()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use clap::Parser;
    use memlane_lab::skip;

    use super::*;

    #[derive(Parser)]
    struct Soak {
        #[command(flatten)]
        options: SoakOptions,
    }

    /// Keeps the command usable.
    #[test]
    fn a_few_steps_end_well() {
        if skip("a_few_steps_end_well", Requirement::LAB_WITH_KVM) {
            return;
        }
        let options = Soak::parse_from("soak --steps 5 --seed 1 --guests linked --dev".split(' ')).options;
        let programs = Programs::build(false).expect("the programs");
        let run = SoakRun::new(options, programs, Arc::new(AtomicBool::new(false)));
        let good = run.and_then(SoakRun::go).expect("hosts and guests");
        assert!(good, "see above for what was found, and where logs are kept");
    }
}
