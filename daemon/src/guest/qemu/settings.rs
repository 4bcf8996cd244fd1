//! Capabilities and parameters of QEMU's own migration, for the time of ours.

use serde_json::{Value, json};

use super::qmp::Qmp;
use crate::guest::DriverError;

/// What is switched on at the source. `events` stays on: it harms nobody, and others may want it.
const SOURCE: [&str; 3] = ["x-ignore-shared", "pause-before-switchover", "events"];
/// The same at the destination. Disks are taken (and locked) only when the guest is to run.
const DESTINATION: [&str; 3] = ["x-ignore-shared", "late-block-activate", "events"];
/// What must be off, since state travels in one piece and one way.
const NEITHER: [&str; 3] = ["multifd", "return-path", "postcopy-ram"];
/// What must not stay on: without its RAM, a guest that is saved or moved by QEMU's own means is lost.
const NOT_AFTERWARDS: [&str; 3] = ["x-ignore-shared", "pause-before-switchover", "late-block-activate"];

/// The parameters as they were.
pub struct Settings(Value);

impl Default for Settings {
    /// As QEMU has them when it starts.
    fn default() -> Self {
        Self(json!({ "max-bandwidth": 128 << 20, "downtime-limit": 300, "announce-rounds": 5 }))
    }
}

impl Settings {
    /// Prepares QEMU to give up a guest; returns what to restore.
    pub async fn of_source(qmp: &Qmp) -> Result<Self, DriverError> {
        let before = Self::read(qmp).await?;
        set_capabilities(qmp, &SOURCE, true).await?;
        set_capabilities(qmp, &NEITHER, false).await?;
        // Nothing but devices travels that way: neither bandwidth nor rounds are to hold it up.
        let most = json!({ "max-bandwidth": 1u64 << 40, "downtime-limit": 2_000_000 });
        qmp.execute("migrate-set-parameters", most).await?;
        Ok(before)
    }

    /// Prepares QEMU to receive a guest; returns what to restore.
    pub async fn of_destination(qmp: &Qmp) -> Result<Self, DriverError> {
        let before = Self::read(qmp).await?;
        set_capabilities(qmp, &DESTINATION, true).await?;
        set_capabilities(qmp, &NEITHER, false).await?;
        // It is announced when it runs here, not before.
        qmp.execute("migrate-set-parameters", json!({ "announce-rounds": 0 })).await?;
        Ok(before)
    }

    /// Leaves QEMU as it was.
    pub async fn restore(self, qmp: &Qmp) -> Result<(), DriverError> {
        set_capabilities(qmp, &NOT_AFTERWARDS, false).await?;
        qmp.execute("migrate-set-parameters", self.0).await.map(drop)
    }

    async fn read(qmp: &Qmp) -> Result<Self, DriverError> {
        let mut parameters = Self::default().0;
        let found = qmp.execute("query-migrate-parameters", json!({})).await?;
        for (name, value) in parameters.as_object_mut().expect("an object").iter_mut() {
            if let Some(found) = found.get(name) {
                *value = found.clone();
            }
        }
        Ok(Self(parameters))
    }
}

async fn set_capabilities(qmp: &Qmp, names: &[&str], on: bool) -> Result<(), DriverError> {
    let capabilities: Vec<_> = names.iter().map(|name| json!({ "capability": name, "state": on })).collect();
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities })).await.map(drop)
}
