//! Questions to daemons and VMMs about a guest.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use memlane_lab::{HostId, LabVmm, Rig, wait_for};
use serde_json::Value;

use super::api;
use super::judge::DaemonFacts;

/// Longest wait for a VMM to attach, on a machine that is busy with other things.
pub(crate) const START: Duration = Duration::from_secs(60);
/// Longest wait for a VMM's answer, and for a guest to do a step.
const ANSWER: Duration = Duration::from_secs(20);

/// Asks a daemon about guest `name`.
pub(crate) fn ask_daemon(rig: &Rig, id: HostId, name: &str) -> Result<DaemonFacts> {
    let socket = rig.api_socket(id);
    let list = |path: &str| match api::get(&socket, path)? {
        Value::Array(list) => Ok(list),
        other => bail!("{other} is no list"),
    };
    let migration = list("/v1/migrations")?.into_iter().rfind(|migration| migration["guest"] == name);
    let guest = list("/v1/guests")?.into_iter().find(|guest| guest["name"] == name);
    let standing = guest.and_then(|guest| guest["standing"].as_str().map(str::to_owned));
    Ok(DaemonFacts { migration, standing })
}

/// Waits until the VMM of guest `name` has attached to the daemon of host `id`.
pub(crate) fn await_attached(rig: &Rig, id: HostId, name: &str, vmm: &mut LabVmm) -> Result<()> {
    let attached = wait_for("a VMM to attach", START, || {
        let known = ask_daemon(rig, id, name).is_ok_and(|daemon| daemon.standing.is_some());
        (known || !vmm.process().is_running()).then_some(())
    });
    attached.with_context(|| vmm.process().log_tail())?;
    if !vmm.process().is_running() {
        bail!("memlane-vmm has ended: {}", vmm.process().log_tail());
    }
    Ok(())
}

/// Checks that the guest goes on, and that its memory is what it must be.
pub(crate) fn examine(vmm: &mut LabVmm) -> Result<()> {
    let mut session = vmm.session()?;
    session.set_patience(ANSWER)?;
    let before = session.stats().context("its VMM does not answer")?;
    let goes_on = || session.stats().ok().filter(|now| now["steps"] != before["steps"]);
    wait_for("the guest to do a step", ANSWER, goes_on)?;
    let report = session.verify().context("its VMM does not compare its memory")?;
    if report["equal"] != true {
        bail!("its memory is not what it must be: {report}");
    }
    Ok(())
}
