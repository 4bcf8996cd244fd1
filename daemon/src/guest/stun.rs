//! Stun: a guest that writes faster than the lanes carry has its writes held to a rate.
//!
//! Its memory is write-protected so that a write waits, and a thread of the daemon's lets writes go
//! one by one. Whoever reads or computes is not slowed. One mechanism for all VMMs: a linked one's
//! own tracker, and the asynchronous protection of a QEMU, give way to it.

mod releaser;

use std::time::{Duration, Instant};

use memlane_protocol::PageSet;

use super::tracking::Tracking;
use super::{DriverError, Guest, Harvest, VmmMemory};

pub use releaser::{Releaser, Report};

/// What it took to have a guest's writes wait.
#[derive(Clone, Copy, Debug)]
pub struct Switch {
    /// What was written until then.
    pub harvest: Harvest,
    /// For how long the guest stood still.
    pub pause: Duration,
}

impl Guest {
    /// Holds the guest's writes to so many pages of 4 KiB per second from now on. It stands still while
    /// its tracker gives way to another; what it has written until then is added to `into`.
    ///
    /// After an error writes may have been missed; the guest runs, unless its VMM refuses.
    pub async fn stun(&self, into: &PageSet, pages_per_second: u64) -> Result<Switch, DriverError> {
        let memory = self.driver.open_memory(false).await?;
        let frozen = Instant::now();
        self.driver.freeze().await?;
        let switched = self.switch(memory, into, pages_per_second).await;
        self.driver.thaw().await?;
        Ok(Switch { harvest: switched?, pause: frozen.elapsed() })
    }

    async fn switch(
        &self,
        memory: VmmMemory,
        into: &PageSet,
        pages_per_second: u64,
    ) -> Result<Harvest, DriverError> {
        let harvest = self.driver.harvest(into).await?;
        self.driver.stop_tracking().await?;
        let tracking = Tracking::start(memory, Some(pages_per_second))?;
        tracking.arm(0..self.ram.pages()).await?;
        self.stunned.replace(Some(tracking.into()));
        Ok(harvest)
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
