//! This is the driver for stock QEMU: it uses QMP for the guest, and userfaultfd and page tables for its writes.
//!
//! QEMU's own migration carries the state of its devices, and nothing else: RAM that is shared
//! memory is left out (`x-ignore-shared`). It stops before devices (`pause-before-switchover`),
//! which is when the guest is paused, and goes on when the last page is at the destination.
//! Up to then a cancelled migration lets the guest run again; afterwards (`postmigrate`) QEMU
//! does not run it by itself.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use memlane_kvm::ram::GuestRam;
use memlane_net::task;
use memlane_protocol::wire::attach::Bond;
use memlane_protocol::wire::control::QemuGuest;
use memlane_protocol::{PAGE_SIZE, PageSet};
use serde_json::json;
use tokio::net::UnixStream;
use tracing::warn;

use super::block::{self, DiskFiles};
use super::definition::Definition;
use super::inspect::{self, Facts};
use super::machine::Parts;
use super::qmp::{Qmp, is_migrating};
use super::revision::{revise, with_identity};
use super::run_state;
use super::settings::{self, Settings};
use super::state_directory::{self, Record, StateDirectory, StateError};
use super::{blockers, launch, ram};
use crate::process::Hang;
use crate::shim::{ShimError, Shims};
use crate::tracking::Tracking;
use crate::{
    Blocker, Driver, DriverError, Farewell, Harvest, LoadedState, Process, SavedState, StateReader,
    StateWriter, VmmMemory,
};

mod loading;
mod pause;
mod reading;

use pause::Asked;
use reading::Reading;

/// QEMU's state travels over the descriptor of this name.
const CHANNEL: &str = "memlane";
/// A step of QEMU's own migration may take this long.
const PATIENCE: Duration = Duration::from_secs(10);

/// A QEMU and the guest in it.
pub(super) struct Qemu {
    qmp: Rc<Qmp>,
    guest: QemuGuest,
    /// This is the guest file, and what QEMU was made of when it was started from it.
    started_from: Option<(Definition, Parts)>,
    ram: Arc<GuestRam>,
    process: Rc<Process>,
    shims: Rc<Shims>,
    /// QEMU's output goes to this file, if this daemon started it.
    log: Option<PathBuf>,
    /// This remembers for the next daemon that QEMU's migration was started by this one.
    states: Rc<StateDirectory>,
    name: String,
    /// This is true if a guest comes here, or has come and not yet run.
    incoming: Cell<bool>,
    /// This is true if QEMU was told not to run by itself what it is given.
    held: Cell<bool>,
    /// This is true if a guest has come here and was not told to run yet.
    loaded: Cell<bool>,
    /// QEMU was asked how it stands, as it is about to let its guest run.
    asked: RefCell<Option<Asked>>,
    /// This is true from when QEMU was told to migrate its guest until it was told to run it again.
    migrates: Cell<bool>,
    /// The guest stood still before it was paused, or before it was paused at the host that it comes from, and stays so.
    stays: RefCell<Option<String>>,
    /// A QEMU that does not answer is waited for this long while its guest runs.
    patience: Cell<Duration>,
    /// The other host was told that QEMU is made of these parts.
    told: RefCell<Vec<String>>,
    /// These settings are restored when the migration is over.
    settings: RefCell<Option<Settings>>,
    tracking: RefCell<Option<Rc<Tracking>>>,
    /// This is true if a disk bypassed the page cache when tracking began.
    reads_directly: Cell<bool>,
    disk_files: DiskFiles,
    /// QEMU is about to write its state at the other end of this, and it is to be passed on to there.
    outgoing: RefCell<Option<(UnixStream, StateWriter)>>,
    state: RefCell<Option<Reading>>,
}

impl Qemu {
    /// Drives the QEMU at the other end of `qmp`, whose guest has been looked at.
    pub(super) fn new(
        qmp: Qmp,
        facts: Facts,
        process: Rc<Process>,
        (shims, states): (&Rc<Shims>, &Rc<StateDirectory>),
        record: &Record,
    ) -> Self {
        let Facts { qemu, ram, .. } = facts;
        let definition = record.definition.as_ref();
        let definition =
            definition.and_then(|text| Definition::parse(Path::new("the guest file"), text).ok());
        Self {
            qmp: Rc::new(qmp),
            guest: qemu,
            started_from: definition.zip(record.machine.clone()),
            ram,
            process,
            shims: shims.clone(),
            log: record.definition.as_ref().map(|_| state_directory::log_of(&record.qmp)),
            states: states.clone(),
            name: record.name.clone(),
            incoming: Cell::new(record.incoming),
            held: Cell::default(),
            loaded: Cell::default(),
            asked: RefCell::default(),
            migrates: Cell::new(record.migrating),
            stays: RefCell::new(record.stays.clone()),
            patience: Cell::new(PATIENCE),
            told: RefCell::default(),
            settings: RefCell::default(),
            tracking: RefCell::default(),
            reads_directly: Cell::default(),
            disk_files: DiskFiles::default(),
            outgoing: RefCell::default(),
            state: RefCell::default(),
        }
    }

    /// Returns what QEMU said last, or where to look for that.
    async fn last_words(&self) -> String {
        match &self.log {
            Some(log) => format!("QEMU says: {}", launch::tail(log).await),
            None => "see QEMU's log".to_owned(),
        }
    }

    /// Returns the error of a QEMU that has not done in time what it was told.
    fn slow(&self, request: &'static str, after: Duration) -> DriverError {
        DriverError::Slow { request, after, hang: Hang::of(self.qmp.pid()) }
    }

    /// Gives QEMU one end of a connection, and returns the other.
    async fn channel(&self) -> Result<UnixStream, DriverError> {
        let failed = |error: io::Error| DriverError::Failed { request: "getfd", reason: error.to_string() };
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        self.qmp.give(CHANNEL, OwnedFd::from(theirs).as_fd()).await?;
        UnixStream::from_std(ours).map_err(failed)
    }

    /// Takes down what is to be restored when the migration is over.
    async fn remember_settings(&self) -> Result<(), DriverError> {
        self.settings.replace(Some(Settings::read(&self.qmp).await?));
        Ok(())
    }

    /// Remembers for QEMU that its guest waits for the outcome of a migration.
    async fn bind(&self, request: &'static str, bond: &Bond) -> Result<(), DriverError> {
        let failed = |error: StateError| DriverError::Failed { request, reason: error.to_string() };
        let stays = self.stays.borrow().clone();
        self.states.bind(&self.name, bond, stays).await.map_err(failed)
    }

    fn tracking(&self, request: &'static str) -> Result<Rc<Tracking>, DriverError> {
        let reason = || "tracking has not been started".to_owned();
        self.tracking.borrow().clone().ok_or_else(|| DriverError::Failed { request, reason: reason() })
    }
}

#[async_trait(?Send)]
impl Driver for Qemu {
    async fn start_tracking(&self) -> Result<(), DriverError> {
        self.reads_directly.set(self.disk_files.late(&self.qmp).await?.is_some());
        let tracking = Tracking::start(self.open_memory(false).await?, None).await?;
        *self.tracking.borrow_mut() = Some(Rc::new(tracking));
        Ok(())
    }

    async fn write_protect(&self, pages: Range<u64>) -> Result<Option<Vec<Range<u64>>>, DriverError> {
        self.tracking("arm")?.write_protect(pages).await.map(Some)
    }

    async fn harvest(&self, into: &PageSet) -> Result<Harvest, DriverError> {
        self.tracking("harvest")?.harvest(into).await
    }

    async fn drain(&self) -> Result<Option<Duration>, DriverError> {
        let _patient = self.qmp.waiting_for(self.patience.get());
        // A disk that is gone by now was drained when it went.
        let Some(node) = self.disk_files.late(&self.qmp).await? else { return Ok(None) };
        if !self.reads_directly.get() {
            let what = "a disk that bypasses the page cache came while the guest was copied, and what it read may have \
                        been missed";
            let reason = format!("{what} ({}, node {}); order the move again", node.file, node.name);
            return Err(DriverError::Failed { request: "drain", reason });
        }
        block::drain(&self.qmp).await.map(Some)
    }

    fn reads_directly(&self) -> bool {
        self.reads_directly.get()
    }

    async fn stop_tracking(&self) -> Result<(), DriverError> {
        let tracking = self.tracking.borrow().clone();
        if let Some(tracking) = tracking {
            // It is there until it has ended, so that another task which stops it waits for that too.
            tracking.end().await;
            self.tracking.borrow_mut().take_if(|now| Rc::ptr_eq(now, &tracking));
        }
        Ok(())
    }

    async fn open_memory(&self, keep: bool) -> Result<VmmMemory, DriverError> {
        let failed = |reason: String| DriverError::Failed { request: "open userfaultfd", reason };
        // That of a QEMU which was started just now for a guest may not have come yet.
        self.shims.wait_for(self.qmp.pid(), blockers::CONNECTING).await;
        let handles = self.shims.open_userfault(self.qmp.pid(), keep).await;
        let handles = handles.map_err(|error| failed(error.to_string()))?;
        let ram = self.ram.clone();
        let found = task::aside(move || handles.find(&ram, true)).await;
        found.map_err(|error| failed(error.to_string()))
    }

    async fn reopen_memory(&self) -> Result<VmmMemory, DriverError> {
        let failed = |reason: String| DriverError::Failed { request: "reopen userfaultfd", reason };
        self.shims.wait_for(self.qmp.pid(), blockers::CONNECTING).await;
        let handles = self.shims.kept_userfault(self.qmp.pid()).await;
        let handles = handles.map_err(|error| match error {
            ShimError::Slow { after, hang, .. } => {
                DriverError::Slow { request: "reopen userfaultfd", after, hang }
            }
            ShimError::Broken { .. } => DriverError::Gone,
            error => failed(error.to_string()),
        })?;
        let ram = self.ram.clone();
        let found = task::aside(move || handles.find(&ram, true)).await;
        found.map_err(|error| failed(error.to_string()))
    }

    async fn prepare_pause(&self, state: StateWriter, soon: bool) -> Result<(), DriverError> {
        let _patient = self.qmp.waiting_for(self.patience.get());
        let status = self.check_unoccupied().await?;
        // By now: what QEMU writes of it tells, but a daemon that is started anew may never have read that.
        let stays = (status != "running").then_some(status);
        self.stays.replace(stays.clone());
        self.states.note_pause(&self.name, stays).await;
        // Not earlier: what others have QEMU do meanwhile is to go as they have set it.
        self.remember_settings().await?;
        settings::prepare_source(&self.qmp, if soon { settings::MOST_DOWNTIME } else { settings::DOWNTIME })
            .await?;
        self.outgoing.replace(Some((self.channel().await?, state)));
        Ok(())
    }

    async fn pause(&self, _: Duration) -> Result<Instant, DriverError> {
        let asked = Instant::now();
        let failed = |reason: String| DriverError::Failed { request: "pause", reason };
        let outgoing = self.outgoing.take().ok_or_else(|| failed("that was not prepared".into()))?;
        self.qmp.expect_migration();
        self.migrates.set(true);
        let migrate = json!({ "uri": format!("fd:{CHANNEL}") });
        let begun = self.qmp.execute("migrate", migrate).await;
        if let Err(DriverError::Failed { .. }) = &begun {
            // Another program was faster, and its migration is not ours to end.
            self.migrates.set(false);
        }
        begun?;
        self.state.replace(Some(Reading::begin(outgoing)));
        let states = ["pre-switchover", "completed", "failed", "cancelled"];
        match self.until_paused(&states).await?.as_str() {
            // A guest that stood still before has not been kept waiting by what QEMU wrote.
            "pre-switchover" if self.stays.borrow().is_some() => Ok(Instant::now()),
            "pre-switchover" => Ok(ago(self.qmp.stopped()).unwrap_or(asked).max(asked)),
            other => Err(failed(format!("its own migration is {other}; {}", self.last_words().await))),
        }
    }

    fn standing_since(&self, asked: Instant) -> Option<Instant> {
        let stopped =
            self.qmp.stopped().filter(|stopped| self.qmp.resumed().is_none_or(|resumed| resumed < *stopped));
        let ran = self.stays.borrow().is_none();
        ago(stopped).filter(|_| ran).map(|stopped| stopped.max(asked))
    }

    fn prepare_resume(&self) {
        self.asked.replace(Some(Asked::begin(self.qmp.clone())));
    }

    async fn resume(&self) -> Result<Option<Duration>, DriverError> {
        self.state.take();
        if self.outgoing.take().is_some() {
            // It was never used. Otherwise it would be replaced by the next one of its name.
            let _ = self.qmp.execute("closefd", json!({ "fdname": CHANNEL })).await;
        }
        if !self.incoming.get() && self.migrates.get() {
            self.cancel().await?;
        }
        let status = self.status_to_resume().await?;
        self.loaded.set(false);
        if self.is_to_run(&status).await? {
            self.qmp.execute("cont", json!({})).await?;
        }
        let (qmp, settings) = (self.qmp.clone(), self.settings.take());
        if self.incoming.take() {
            task::spawn("tidying a QEMU up", async move {
                announce(&qmp).await;
                settings.unwrap_or_default().restore_or_tell(&qmp).await;
            });
        } else if self.migrates.replace(false) || settings.is_some() || self.is_noted() {
            // What an earlier daemon has set is not known any more.
            settings.unwrap_or_default().restore_or_tell(&qmp).await;
            self.states.note_migration(&self.name, false).await;
        }
        Ok(self.qmp.resumed())
    }

    async fn save(&self) -> Result<SavedState, DriverError> {
        let started = Instant::now();
        let failed = |reason: String| DriverError::Failed { request: "save", reason };
        self.qmp.execute("migrate-continue", json!({ "state": "pre-switchover" })).await?;
        let states = ["completed", "failed", "cancelled"];
        let state = self.qmp.migration_reaches(&states, "save", PATIENCE).await?;
        let reading = self.state.take().ok_or_else(|| failed("the guest was not paused".into()))?;
        if state != "completed" {
            return Err(failed(format!("its own migration is {state}; {}", self.last_words().await)));
        }
        let late = |_| self.slow("save", PATIENCE);
        let bytes = tokio::time::timeout(PATIENCE, reading.finish()).await.map_err(late)?;
        let bytes = bytes.map_err(|error| failed(error.to_string()))?;
        let stays = run_state::standing_in(&bytes);
        let before = self.stays.replace(stays.clone());
        if before.is_some() && stays.is_none() {
            // It was continued in the last moment, or its machine type does not tell: better it stands still.
            self.stays.replace(before);
            return Err(failed(
                "QEMU's state does not say that the guest stood still; order the move again".into(),
            ));
        }
        if before != stays {
            // A daemon that is started anew could not learn it from QEMU.
            self.states.note_standing(&self.name, stays.clone()).await;
        }
        Ok(SavedState { bytes: bytes.len() as u64, took: started.elapsed(), stays })
    }

    async fn get_ready(&self) -> Result<(), DriverError> {
        self.remember_settings().await?;
        settings::prepare_destination(&self.qmp).await
    }

    async fn stand_down(&self) {
        if let Some(settings) = self.settings.take() {
            if self.held.take() {
                // QEMU refuses only what it has lost by itself.
                let _ = self.qmp.execute("cont", json!({})).await;
                let _ = self.qmp.execute("closefd", json!({ "fdname": CHANNEL })).await;
            }
            settings.restore_or_tell(&self.qmp).await;
            self.states.note_migration(&self.name, false).await;
        }
    }

    async fn load(&self, state: StateReader, bond: &Bond) -> Result<LoadedState, DriverError> {
        self.load_state(state, bond).await
    }

    async fn relinquish(&self, bond: &Bond) -> Result<(), DriverError> {
        // Its state was saved, and QEMU tells when a guest runs: it need not be asked while the guest waits.
        if self.qmp.resumed() > self.qmp.stopped() {
            let reason = "another program has let the guest run again".to_owned();
            return Err(DriverError::Failed { request: "relinquish", reason });
        }
        self.bind("relinquish", bond).await
    }

    async fn discard(&self) -> Result<(), DriverError> {
        match self.qmp.execute("quit", json!({})).await {
            Ok(_) | Err(DriverError::Gone) => {}
            Err(error) => warn!(%error, "QEMU does not quit by itself"),
        }
        if tokio::time::timeout(PATIENCE, self.process.ended()).await.is_ok() {
            return Ok(());
        }
        warn!(pid = self.process.identity().pid, "QEMU does not quit; it is killed");
        if let Err(error) = self.process.kill() {
            let reason = error.to_string();
            return Err(DriverError::Failed { request: "quit", reason });
        }
        match tokio::time::timeout(PATIENCE, self.process.ended()).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.slow("quit", 2 * PATIENCE)),
        }
    }

    fn be_patient(&self, patience: Duration) {
        self.patience.set(patience.max(PATIENCE));
    }

    fn waits_for(&self) -> Option<String> {
        self.qmp.waits_for()
    }

    async fn gone(&self) {
        self.qmp.gone().await;
    }

    fn hang_up(&self) {
        self.qmp.hang_up();
    }

    fn farewell(&self) -> Option<Farewell> {
        self.qmp.farewell()
    }

    fn saves_last(&self) -> bool {
        // With its devices QEMU gives up its disks, which another process may then take.
        true
    }

    async fn awaits(&self) -> Result<bool, DriverError> {
        let (status, migration) = (self.qmp.status().await?, self.qmp.migration().await?);
        Ok(status == "inmigrate" && !is_migrating(&migration))
    }

    async fn blockers(&self) -> Result<Vec<Blocker>, DriverError> {
        let mut found = blockers::find(&self.qmp, &self.shims).await?;
        found.extend(blockers::memory(&self.qmp, &self.ram).await?);
        found.extend(self.inactive_disks().await?);
        if let Some((definition, then)) = &self.started_from {
            let now = Parts::look(&self.qmp).await?;
            found.extend(revise(definition, then, &now).err().unwrap_or_default());
        }
        Ok(found)
    }

    async fn look(&self) -> Result<Option<QemuGuest>, DriverError> {
        let now = Parts::look(&self.qmp).await?;
        let mut guest = self.guest.clone();
        (guest.disks, guest.parts) = (inspect::disks(&self.qmp).await?, now.lines());
        self.told.replace(guest.parts.clone());
        if let Some((definition, then)) = &self.started_from {
            let revised = revise(definition, then, &now).ok().flatten();
            let revised = revised.as_ref().unwrap_or(definition);
            let kept = now.identity.as_ref().and_then(|guid| with_identity(revised, guid));
            guest.definition = kept.as_ref().unwrap_or(revised).text.clone();
        }
        Ok(Some(guest))
    }

    async fn state_bytes(&self) -> Result<Option<u64>, DriverError> {
        let blocks = self.qmp.human("info ramblock").await?;
        let ram = self.ram.pages() * PAGE_SIZE;
        Ok(ram::used_bytes(&blocks).map(|used| used.saturating_sub(ram)))
    }

    fn qemu(&self) -> Option<&QemuGuest> {
        Some(&self.guest)
    }
}

/// Has QEMU tell the network where the guest is, by frames of its own and of the guest's driver.
async fn announce(qmp: &Qmp) {
    // Milliseconds; as QEMU does by itself after a migration of its own.
    let times = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
    if let Err(error) = qmp.execute("announce-self", times).await {
        warn!(%error, "QEMU does not announce its guest; the daemon did");
    }
}

/// Returns the instant of a Unix time that has just been.
fn ago(time: Option<Duration>) -> Option<Instant> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.checked_sub(time?)?;
    Instant::now().checked_sub(since)
}
