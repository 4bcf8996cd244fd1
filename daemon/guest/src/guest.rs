//! This module holds what the daemon knows of one guest of this host.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memlane_kvm::dirty::Harvest;
use memlane_kvm::ram::GuestRam;
use memlane_protocol::wire::attach::{Bond, MigrationId, RunState};
use memlane_protocol::wire::machine::GuestShape;
use memlane_protocol::{PAGE_SIZE, PageSet};

use crate::driver::{Driver, DriverError};
use crate::prefault::Prefault;
use crate::process::Process;
use crate::stun::Stunned;

/// A guest whose VMM is attached.
pub struct Guest {
    /// This is what the guest is made of.
    pub shape: GuestShape,
    /// This is the guest's memory.
    pub ram: Arc<GuestRam>,
    /// The driver passes requests to the guest's VMM.
    pub driver: Rc<dyn Driver>,
    /// This is the process of the VMM.
    pub process: Rc<Process>,
    /// This is what the guest is doing.
    pub run_state: Cell<RunState>,
    /// This is true while the guest's writes are tracked.
    pub tracked: Cell<bool>,
    /// If this is true, the VMM has written to the guest's memory while it saved its state. The destination must then wait
    /// until all that is there before it loads the state.
    pub saves_into_memory: Cell<bool>,
    /// The VMM's state had so many bytes when it was last saved. It is `None` if it has not been saved here.
    pub saved_bytes: Cell<Option<u64>>,
    /// The VMM's state has so many bytes at most, as the VMM told when it was last asked.
    pub state_bytes: Cell<Option<u64>>,
    /// This is present while the guest's writes are held up.
    pub(crate) stunned: RefCell<Option<Stunned>>,
    /// This is true while block I/O is waited for, which must not be held up.
    pub(crate) draining: Cell<bool>,
    /// This is true while the guest is only looked at for a check, which ends soon.
    pub checked: Cell<bool>,
    /// The guest takes part in this migration.
    pub(crate) migration: Cell<Option<MigrationId>>,
    /// When it attached, the VMM said that the guest waits for the outcome of this migration.
    pub bond: RefCell<Option<Bond>>,
    /// If this is true, the daemon started the VMM for a migration, and has no use for it without one.
    pub launched_for_migration: Cell<bool>,
    /// If this is true, part of the guest's memory never came, and accesses to that fail: the guest must not move any
    /// more.
    pub incomplete: Cell<bool>,
    /// If this is true, part of the guest's memory never came, accesses to that wait for ever, and the VMM could not be
    /// ended.
    pub lost: Cell<bool>,
    /// A thread maps the guest's memory into this process.
    ahead: RefCell<Option<Prefault>>,
}

impl Guest {
    /// Makes a guest that takes part in no migration.
    pub fn new(
        shape: GuestShape,
        ram: Arc<GuestRam>,
        driver: Rc<dyn Driver>,
        process: Rc<Process>,
        run_state: RunState,
    ) -> Self {
        let (run_state, migration) = (Cell::new(run_state), Cell::default());
        let (tracked, stunned, draining, checked, bond) = Default::default();
        let (launched_for_migration, incomplete, lost, ahead, saves_into_memory) = Default::default();
        let (saved_bytes, state_bytes) = Default::default();
        Self {
            shape,
            ram,
            driver,
            process,
            run_state,
            tracked,
            saves_into_memory,
            saved_bytes,
            state_bytes,
            stunned,
            draining,
            checked,
            migration,
            bond,
            launched_for_migration,
            incomplete,
            lost,
            ahead,
        }
    }

    /// Begins to map the guest's memory into this process, in the background.
    pub fn prefault(&self) {
        self.ahead.replace(Some(Prefault::start(self.shape.name.to_string(), &self.ram)));
    }

    /// Returns when the guest's memory is no longer being mapped: pages that are dropped from then on are not brought
    /// into being again by this process.
    pub async fn stop_prefault(&self) {
        let ahead = self.ahead.take();
        if let Some(ahead) = ahead {
            ahead.stop().await;
        }
    }

    /// Returns a digest of what the guest is made of. It is the same each time its VMM attaches, and never 0.
    pub fn digest(&self) -> u64 {
        let GuestShape { name, machine, regions, .. } = &self.shape;
        let mut text = format!("{name} {} {}", machine.vmm, machine.vcpus);
        for region in regions {
            text.push_str(&format!(" {}+{}/{}", region.address, region.bytes, region.page_bytes));
        }
        xxhash_rust::xxh3::xxh3_64(text.as_bytes()).max(1)
    }

    /// Does what [`Driver::harvest`] says, with the tracker that is in use.
    ///
    /// # Errors
    ///
    /// Fails as [`Driver::harvest`] does.
    pub async fn harvest(&self, into: &PageSet) -> Result<Harvest, DriverError> {
        let protection = self.stunned.borrow().as_ref().and_then(Stunned::protection);
        match protection {
            Some(tracking) => tracking.harvest(into).await,
            None => self.driver.harvest(into).await,
        }
    }

    /// Does what [`Driver::drain`] says. What a device writes is not held up meanwhile, though the guest is stunned.
    ///
    /// # Errors
    ///
    /// Fails as [`Driver::drain`] does.
    pub async fn drain(&self) -> Result<Option<Duration>, DriverError> {
        let _open = self.driver.reads_directly().then(|| self.open_for_drain());
        self.driver.drain().await
    }

    /// Does what [`Driver::stop_tracking`] says, with the tracker that is in use.
    ///
    /// # Errors
    ///
    /// Fails as [`Driver::stop_tracking`] does.
    pub async fn stop_tracking(&self) -> Result<(), DriverError> {
        let protection = self.stunned.take().and_then(|stunned| stunned.protection());
        match protection {
            Some(tracking) => {
                tracking.end().await;
                Ok(())
            }
            None => self.driver.stop_tracking().await,
        }
    }

    /// Does what [`Driver::pause`] says, after it has ended a stun that would keep vCPUs from stopping.
    ///
    /// # Errors
    ///
    /// Fails as [`Driver::pause`] does.
    pub async fn pause(&self, limit: Duration) -> Result<Instant, DriverError> {
        // A vCPU that waits for a page cannot be stopped. Huge pages go on being let go one by one: while
        // the vCPUs come to a stand, all of them would be written otherwise.
        if self.shape.regions.iter().all(|region| u64::from(region.page_bytes) == PAGE_SIZE) {
            self.let_writes_go();
        }
        // For the last time, and not in the pause.
        self.update_throttle().await?;
        self.driver.pause(limit).await
    }

    /// Tells whether the guest's writes are held up.
    pub fn is_stunned(&self) -> bool {
        self.stunned.borrow().is_some()
    }

    /// Tells whether a migration of the guest is under way here.
    pub fn is_moving(&self) -> bool {
        self.migration.get().is_some()
    }
}
