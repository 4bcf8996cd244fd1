//! Questions to daemons and VMMs about a guest.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use memlane_lab::{HostId, LabVmm, Rig, wait_for};
use serde_json::Value;

use super::api;

/// Longest wait for a VMM to attach, on a machine that is busy with other things.
pub(crate) const START: Duration = Duration::from_secs(60);

/// The answers of a daemon about a guest.
#[derive(Clone, Debug, Default)]
pub(crate) struct DaemonFacts {
    /// The guest's latest migration.
    pub migration: Option<Value>,
    /// The guest's state, as the daemon reports it.
    pub standing: Option<String>,
}

/// The lists of a daemon: all that it knows of guests and migrations.
#[derive(Clone, Debug, Default)]
pub(crate) struct DaemonView {
    /// The migrations, the latest one last.
    pub migrations: Vec<Value>,
    /// The guests.
    pub guests: Vec<Value>,
}

impl DaemonView {
    /// Asks a daemon for its lists.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub(crate) fn ask(rig: &Rig, id: HostId) -> Result<Self> {
        let socket = rig.api_socket(id);
        let list = |path: &str| match api::get(&socket, path)? {
            Value::Array(list) => Ok(list),
            other => bail!("{other} is no list"),
        };
        Ok(Self { migrations: list("/v1/migrations")?, guests: list("/v1/guests")? })
    }

    /// Returns what the lists say about guest `name`.
    pub(crate) fn about(&self, name: &str) -> DaemonFacts {
        let migration = self.migrations.iter().rfind(|migration| migration["guest"] == name).cloned();
        let guest = self.guests.iter().find(|guest| guest["name"] == name);
        let standing = guest.and_then(|guest| guest["standing"].as_str().map(str::to_owned));
        DaemonFacts { migration, standing }
    }
}

/// Asks a daemon about guest `name`.
pub(crate) fn ask_daemon(rig: &Rig, id: HostId, name: &str) -> Result<DaemonFacts> {
    Ok(DaemonView::ask(rig, id)?.about(name))
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

/// Checks that the guest goes on, and that its memory is what it must be. Its VMM has `patience` for each answer, and the guest
/// for a step.
pub(crate) fn examine(vmm: &mut LabVmm, patience: Duration) -> Result<()> {
    let mut session = vmm.session()?;
    session.set_patience(patience)?;
    let before = session.stats().context("its VMM does not answer")?;
    let goes_on = || session.stats().ok().filter(|now| now["steps"] != before["steps"]);
    wait_for("the guest to do a step", patience, goes_on)?;
    let report = session.verify().context("its VMM does not compare its memory")?;
    if report["equal"] != true {
        bail!("its memory is not what it must be: {report}");
    }
    Ok(())
}
