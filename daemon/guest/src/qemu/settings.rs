//! This module sets the capabilities and parameters of QEMU's own migration for the time of a migration by Memlane.

use std::time::Duration;

use serde_json::{Value, json};
use tracing::warn;

use super::qmp::{Qmp, items};
use crate::DriverError;

/// These capabilities are switched on at the source.
const SOURCE: [&str; 3] = ["x-ignore-shared", "pause-before-switchover", "events"];
/// These capabilities are switched on at the destination. Disks are taken (and locked) only when the guest is to run.
const DESTINATION: [&str; 3] = ["x-ignore-shared", "late-block-activate", "events"];
/// These capabilities must be off, since state travels in one piece and one way.
const NEITHER: [&str; 3] = ["multifd", "return-path", "postcopy-ram"];
/// These capabilities must not stay on, even if they were: without its RAM, a guest that is saved or moved by QEMU's
/// own means is lost.
const NOT_AFTERWARDS: [&str; 3] = ["x-ignore-shared", "pause-before-switchover", "late-block-activate"];

/// QEMU pauses its guest when what is left of its state takes this long by its own count, which is of whole tenths of a second
/// before it has counted anything.
pub(super) const DOWNTIME: Duration = Duration::from_millis(10);
/// QEMU takes no longer downtime limit.
pub(super) const MOST_DOWNTIME: Duration = Duration::from_secs(2000);

/// From this version on, QEMU gives up disks that it has never taken.
pub(super) const GIVES_UP_TWICE: [u32; 3] = [10, 0, 0];

/// These are the settings that QEMU had before.
pub(super) struct Settings {
    /// These are the capabilities as `migrate-set-capabilities` takes them.
    capabilities: Vec<Value>,
    /// These are the parameters as `migrate-set-parameters` takes them.
    parameters: Value,
    /// This tells whether a state is written without a description of itself, where that is known.
    undescribed: Option<bool>,
}

/// QEMU writes a description of each state after it, for programs that show states. Nobody is going to look at this one,
/// and writing it takes up to a third of the time that saving takes.
const UNDESCRIBED: &str = "suppress-vmdesc";

impl Default for Settings {
    /// Returns the settings that QEMU has when it starts.
    fn default() -> Self {
        Self {
            capabilities: Vec::new(),
            parameters: json!({ "max-bandwidth": 128 << 20, "downtime-limit": 300, "announce-rounds": 5 }),
            undescribed: None,
        }
    }
}

impl Settings {
    /// Asks what is set, for [`Self::restore`].
    ///
    /// # Errors
    ///
    /// Fails if QEMU does not answer.
    pub(super) async fn read(qmp: &Qmp) -> Result<Self, DriverError> {
        let capabilities = qmp.execute("query-migrate-capabilities", json!({})).await?;
        let parameters = qmp.execute("query-migrate-parameters", json!({})).await?;
        let undescribed = json!({ "path": "/machine", "property": UNDESCRIBED });
        let undescribed = qmp.execute("qom-get", undescribed).await?.as_bool();
        Ok(Self { undescribed, ..Self::from_answers(&capabilities, &parameters) })
    }

    /// Undoes what was set over a connection that has been lost since, or by a daemon that was killed. The settings
    /// before that are not known any more.
    ///
    /// # Errors
    ///
    /// Fails if QEMU does not answer.
    pub(super) async fn restore_lost(qmp: &Qmp) -> Result<(), DriverError> {
        let capabilities = qmp.execute("query-migrate-capabilities", json!({})).await?;
        if is_on(&capabilities, "x-ignore-shared") { Self::default().restore(qmp).await } else { Ok(()) }
    }

    fn from_answers(capabilities: &Value, parameters: &Value) -> Self {
        let is_on = |name: &str| is_on(capabilities, name);
        let mut before = Self::default();
        if is_on("x-ignore-shared") {
            // By a migration before this one, whose own settings are not to be kept.
            return before;
        }
        for (name, value) in before.parameters.as_object_mut().expect("an object").iter_mut() {
            if let Some(found) = parameters.get(name) {
                *value = found.clone();
            }
        }
        before.capabilities =
            NEITHER.iter().chain(&["events"]).map(|name| switch(name, is_on(name))).collect();
        before
    }

    /// Does as [`Self::restore`], and logs it if that fails.
    pub(super) async fn restore_or_tell(self, qmp: &Qmp) {
        if let Err(error) = self.restore(qmp).await {
            warn!(%error, "cannot restore QEMU's settings for its own migration; x-ignore-shared may be on");
        }
    }

    /// Leaves QEMU as it was, and safe to be used by others.
    ///
    /// # Errors
    ///
    /// Fails if QEMU does not answer.
    pub(super) async fn restore(self, qmp: &Qmp) -> Result<(), DriverError> {
        // First and by itself: it must not fail with anything else.
        set_capabilities(qmp, switches(&NOT_AFTERWARDS, false).collect()).await?;
        qmp.execute("migrate-set-parameters", self.parameters).await?;
        set_capabilities(qmp, self.capabilities).await?;
        match self.undescribed {
            Some(before) => leave_undescribed(qmp, before).await,
            None => Ok(()),
        }
    }
}

/// Prepares QEMU to give up a guest, which it pauses when what is left of its state takes so long.
///
/// # Errors
///
/// Fails if QEMU does not answer.
pub(super) async fn prepare_source(qmp: &Qmp, downtime: Duration) -> Result<(), DriverError> {
    // Nothing but devices and their memory travels that way: no bound on bandwidth is to hold it up.
    let most = json!({ "max-bandwidth": 1u64 << 40, "downtime-limit": downtime.as_millis() as u64 });
    prepare(qmp, &SOURCE, most).await
}

/// Lets QEMU pause its guest when what is left of its state takes so long.
///
/// # Errors
///
/// Fails if QEMU does not answer.
pub(super) async fn allow_downtime(qmp: &Qmp, downtime: Duration) -> Result<(), DriverError> {
    let milliseconds = downtime.as_millis() as u64;
    qmp.execute("migrate-set-parameters", json!({ "downtime-limit": milliseconds })).await.map(drop)
}

/// Prepares QEMU to receive a guest.
///
/// # Errors
///
/// Fails if QEMU does not answer.
pub(super) async fn prepare_destination(qmp: &Qmp) -> Result<(), DriverError> {
    // It is announced when it runs here, not before.
    prepare(qmp, &DESTINATION, json!({ "announce-rounds": 0 })).await
}

async fn prepare(qmp: &Qmp, on: &[&str], parameters: Value) -> Result<(), DriverError> {
    set_capabilities(qmp, switches(on, true).chain(switches(&NEITHER, false)).collect()).await?;
    qmp.execute("migrate-set-parameters", parameters).await?;
    leave_undescribed(qmp, true).await
}

async fn leave_undescribed(qmp: &Qmp, undescribed: bool) -> Result<(), DriverError> {
    let property = json!({ "path": "/machine", "property": UNDESCRIBED, "value": undescribed });
    qmp.execute("qom-set", property).await.map(drop)
}

/// Tells whether a capability is on in the answer to `query-migrate-capabilities`.
fn is_on(capabilities: &Value, name: &str) -> bool {
    items(capabilities).iter().any(|found| found["capability"] == name && found["state"] == true)
}

fn switches(names: &[&str], on: bool) -> impl Iterator<Item = Value> {
    names.iter().map(move |name| switch(name, on))
}

fn switch(capability: &str, on: bool) -> Value {
    json!({ "capability": capability, "state": on })
}

async fn set_capabilities(qmp: &Qmp, capabilities: Vec<Value>) -> Result<(), DriverError> {
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities })).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_is_remembered_but_for_what_is_dangerous() {
        let capabilities = |ignores: bool| {
            json!([switch("multifd", true), switch("x-ignore-shared", ignores), switch("zero-blocks", true)])
        };
        let parameters = json!({ "announce-rounds": 0, "max-bandwidth": 7, "cpu-throttle-initial": 20 });
        let before = Settings::from_answers(&capabilities(false), &parameters);
        let expected = ["multifd", "return-path", "postcopy-ram", "events"];
        assert_eq!(before.capabilities, expected.map(|name| switch(name, name == "multifd")));
        let expected = json!({ "announce-rounds": 0, "max-bandwidth": 7, "downtime-limit": 300 });
        assert_eq!(before.parameters, expected);

        let before = Settings::from_answers(&capabilities(true), &parameters);
        assert_eq!(before.parameters, Settings::default().parameters);
        assert!(before.capabilities.is_empty());
    }
}
