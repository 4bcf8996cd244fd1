//! Stun: a guest that writes faster than the lanes carry has its writes held to a rate.
//!
//! Its memory is write-protected so that a write waits, and a thread of the daemon's lets writes go
//! one by one. Whoever reads or computes is not slowed. One mechanism for all VMMs: a linked one's
//! own tracker, and the asynchronous protection of a QEMU, give way to it.

mod fingerprints;
mod releaser;

use std::time::{Duration, Instant};

use memlane_protocol::PageSet;
use memlane_protocol::wire::machine::TrackerKind;

use super::tracking::Tracking;
use super::{DriverError, Guest, Harvest, VmmMemory};

pub use releaser::{Releaser, Report};

use fingerprints::Fingerprints;

/// What it took to have a guest's writes wait.
#[derive(Clone, Copy, Debug)]
pub struct Switch {
    /// What was written until then.
    pub harvest: Harvest,
    /// Time that it took, in which the guest ran on.
    pub took: Duration,
}

impl Guest {
    /// Holds the guest's writes to so many pages of 4 KiB per second from now on; what it has written
    /// until then is added to `into`.
    ///
    /// The guest runs on meanwhile. After an error writes may have been missed.
    pub async fn stun(&self, into: &PageSet, pages_per_second: u64) -> Result<Switch, DriverError> {
        let memory = self.driver.open_memory(false).await?;
        match self.shape.tracker {
            TrackerKind::Log | TrackerKind::Ring => self.overlap(memory, into, pages_per_second).await,
            TrackerKind::Pagemap => self.exchange(memory, into, pages_per_second).await,
        }
    }

    /// What KVM tracks can be protected besides: from when all is, no write is missed without KVM.
    async fn overlap(
        &self,
        memory: VmmMemory,
        into: &PageSet,
        pages_per_second: u64,
    ) -> Result<Switch, DriverError> {
        let started = Instant::now();
        let tracking = Tracking::start(memory, Some(pages_per_second))?;
        tracking.arm_all().await?;
        let harvest = self.driver.harvest(into).await?;
        self.stunned.replace(Some(tracking.into()));
        self.driver.stop_tracking().await?;
        Ok(Switch { harvest, took: started.elapsed() })
    }

    /// Memory can be protected by one userfaultfd at a time. What is written while one gives way to the
    /// other is found by what memory holds before and after.
    async fn exchange(
        &self,
        memory: VmmMemory,
        into: &PageSet,
        pages_per_second: u64,
    ) -> Result<Switch, DriverError> {
        let started = Instant::now();
        let before = Fingerprints::take(self.ram.clone()).await?;
        // Whatever was in place when it was looked at, or was being written, is told of here.
        let told = self.driver.harvest(into).await?;
        self.driver.stop_tracking().await?;
        let tracking = Tracking::start(memory, Some(pages_per_second))?;
        tracking.arm_all().await?;
        self.stunned.replace(Some(tracking.into()));
        // And what is written from here on, by the tracker.
        let changed = before.compare(self.ram.clone(), into).await?;
        let harvest = Harvest { new: told.new + changed.new, holes: told.holes || changed.holes };
        Ok(Switch { harvest, took: started.elapsed() })
    }

    /// Holds the writes of a guest that is stunned to another rate.
    pub fn set_stun(&self, pages_per_second: u64) {
        self.releaser(|releaser| releaser.set_rate(pages_per_second));
    }

    /// Lets all writes of a guest that is stunned go, as fast as they come.
    pub fn let_writes_go(&self) {
        self.releaser(Releaser::open);
    }

    /// Ends the stun of a guest whose VMM is out of reach.
    pub fn end_stun(&self) {
        self.let_writes_go();
        self.stunned.take();
    }

    /// How the stun goes, if there is one.
    pub fn stun_report(&self) -> Option<Report> {
        self.releaser(Releaser::report)
    }

    fn releaser<T>(&self, act: impl FnOnce(&Releaser) -> T) -> Option<T> {
        self.stunned.borrow().as_ref().and_then(|tracking| tracking.releaser()).map(act)
    }
}
