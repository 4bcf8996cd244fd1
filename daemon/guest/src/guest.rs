//! A guest of this host.

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
    /// What it is made of.
    pub shape: GuestShape,
    /// Its memory.
    pub ram: Arc<GuestRam>,
    /// How its VMM is handled.
    pub driver: Rc<dyn Driver>,
    /// Process of the VMM.
    pub process: Rc<Process>,
    /// What it is doing.
    pub run_state: Cell<RunState>,
    /// Its writes are being tracked.
    pub tracked: Cell<bool>,
    /// How, if they are held up.
    pub(crate) stunned: RefCell<Option<Stunned>>,
    /// The migration that it takes part in.
    pub(crate) migration: Cell<Option<MigrationId>>,
    /// What its VMM said, when it attached, that it waits for word of.
    pub bond: RefCell<Option<Bond>>,
    /// The daemon started its VMM for a migration, and has no use for it without.
    pub launched_for_migration: Cell<bool>,
    /// Part of its memory never came, and accesses to that fail: it must not move any more.
    pub incomplete: Cell<bool>,
    /// Part of its memory never came, accesses to that wait for ever, and its VMM could not be ended.
    pub lost: Cell<bool>,
    /// Its memory is being mapped into this process.
    ahead: RefCell<Option<Prefault>>,
}

impl Guest {
    /// A guest that takes part in no migration.
    pub fn new(
        shape: GuestShape,
        ram: Arc<GuestRam>,
        driver: Rc<dyn Driver>,
        process: Rc<Process>,
        run_state: RunState,
    ) -> Self {
        let (run_state, migration) = (Cell::new(run_state), Cell::default());
        let (tracked, stunned, bond, launched_for_migration, incomplete, lost, ahead) = Default::default();
        Self {
            shape,
            ram,
            driver,
            process,
            run_state,
            tracked,
            stunned,
            migration,
            bond,
            launched_for_migration,
            incomplete,
            lost,
            ahead,
        }
    }

    /// Begins to map its memory into this process, in the background.
    pub fn prefault(&self) {
        self.ahead.replace(Some(Prefault::start(self.shape.name.to_string(), &self.ram)));
    }

    /// Returns when its memory is not being mapped any more: pages that are dropped from then on are not brought
    /// into being again from here.
    pub async fn stop_prefault(&self) {
        let ahead = self.ahead.take();
        if let Some(ahead) = ahead {
            ahead.stop().await;
        }
    }

    /// What it is made of, in a number: the same whenever its VMM attaches, and never 0.
    pub fn digest(&self) -> u64 {
        let GuestShape { name, machine, regions, .. } = &self.shape;
        let mut text = format!("{name} {} {}", machine.vmm, machine.vcpus);
        for region in regions {
            text.push_str(&format!(" {}+{}/{}", region.address, region.bytes, region.page_bytes));
        }
        xxhash_rust::xxh3::xxh3_64(text.as_bytes()).max(1)
    }

    /// See [`Driver::harvest`].
    pub async fn harvest(&self, into: &PageSet) -> Result<Harvest, DriverError> {
        let protection = self.stunned.borrow().as_ref().and_then(Stunned::protection);
        match protection {
            Some(tracking) => tracking.harvest(into).await,
            None => self.driver.harvest(into).await,
        }
    }

    /// See [`Driver::stop_tracking`].
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

    /// See [`Driver::pause`].
    pub async fn pause(&self, limit: Duration) -> Result<Instant, DriverError> {
        // A vCPU that waits for a page cannot be stopped. Huge pages go on being let go one by one: while
        // the vCPUs come to a stand, all of them would be written otherwise.
        if self.shape.regions.iter().all(|region| u64::from(region.page_bytes) == PAGE_SIZE) {
            self.let_writes_go();
        }
        // For the last time, and not in the pause.
        self.learn_pace().await?;
        self.driver.pause(limit).await
    }

    /// Whether a migration of it is under way here.
    pub fn is_moving(&self) -> bool {
        self.migration.get().is_some()
    }
}
