//! Keeping what is needed to understand a round that failed.

use std::fs;
use std::path::Path;

use anyhow::Result;
use memlane_lab::Rig;

use super::judge::RoundVerdict;
use super::plan::RoundPlan;
use super::round::RoundOutcome;
use crate::common::files::copy_if_there;

/// Writes everything about the round to `folder`.
///
/// # Errors
///
/// If that cannot be done.
pub(crate) fn keep(
    folder: &Path,
    plan: &RoundPlan,
    rig: &Rig,
    outcome: &RoundOutcome,
    verdict: &RoundVerdict,
) -> Result<()> {
    fs::create_dir_all(folder)?;
    let text = format!("{plan:#?}\n\n{verdict:#?}\n\n{:#?}\n\nmemlanectl:\n{}", outcome.facts, outcome.told);
    fs::write(folder.join("round.txt"), text)?;
    for (log, side) in outcome.logs.iter().zip(["source", "destination"]) {
        fs::write(folder.join(format!("memlaned-{side}.log")), log)?;
    }
    for (id, side) in [(plan.from, "source"), (plan.from.other(), "destination")] {
        let journal = rig.lab().host(id).directory().join("journal");
        copy_if_there(&journal, &folder.join(format!("journal-{side}")))?;
    }
    for (file, name) in outcome.files.iter().zip([
        "source.history",
        "destination.history",
        "vmm-source.log",
        "vmm-destination.log",
    ]) {
        copy_if_there(file, &folder.join(name))?;
    }
    Ok(())
}
