//! QEMU loads what another QEMU has written of its state.

use std::time::{Duration, Instant};

use memlane_protocol::wire::attach::Bond;
use serde_json::json;
use tokio::io::AsyncWriteExt;

use super::{CHANNEL, PATIENCE, Qemu};
use crate::qemu::run_state;
use crate::{DriverError, LoadedState, StateReader};

impl Qemu {
    /// Has QEMU load a state while it comes.
    pub(super) async fn load_state(
        &self,
        mut state: StateReader,
        bond: &Bond,
    ) -> Result<LoadedState, DriverError> {
        // What is bound and has not loaded everything is not taken for loaded.
        self.bind("prepare", bond).await?;
        // While a guest is awaited this means: do not run it by yourself.
        self.held.set(true);
        self.qmp.execute("stop", json!({})).await?;
        let mut channel = self.channel().await?;
        // So far it can do without the guest.
        let Some(mut piece) = state.recv().await else {
            return Err(DriverError::Failed { request: "load", reason: "the guest does not come".into() });
        };
        self.qmp.expect_migration();
        self.qmp.execute("migrate-incoming", json!({ "uri": format!("fd:{CHANNEL}") })).await?;
        let (mut bytes, mut whole) = (Vec::new(), Instant::now());
        let write = async {
            loop {
                // A QEMU that does not like what it reads says so below, by its end.
                let _ = channel.write_all(&piece).await;
                bytes.extend(piece);
                match state.recv().await {
                    Some(next) => piece = next,
                    None => break,
                }
            }
            whole = Instant::now();
            let _ = channel.shutdown().await;
            self.qmp.migration_reaches(&["completed", "failed"], "load", PATIENCE).await
        };
        // How long the other host takes for it is the other host's affair.
        let loaded = tokio::select! {
            loaded = write => loaded,
            ended = self.qmp.migration_reaches(&["failed"], "load", Duration::MAX) => ended,
        };
        // What it has loaded in part it must never run: none of these is a plain failure.
        let broken = async |what: String| {
            let reason = format!("{what}; {}", self.last_words().await);
            DriverError::Broken { request: "load", reason }
        };
        match loaded {
            Ok(state) if state == "completed" => {}
            Ok(state) => return Err(broken(format!("its own migration is {state}")).await),
            Err(DriverError::Gone) => return Err(broken("it is gone".into()).await),
            Err(error) => return Err(error),
        }
        let status = self.qmp.status().await?;
        let stays = run_state::standing_in(&bytes);
        if status != "paused" && Some(&status) != stays.as_ref() {
            return Err(broken(format!("its status is {status}")).await);
        }
        if stays.is_some() {
            self.stays.replace(stays.clone());
            self.states.note_standing(&self.name, stays.clone()).await;
        }
        self.loaded.set(true);
        Ok(LoadedState { took: whole.elapsed(), stays })
    }
}
