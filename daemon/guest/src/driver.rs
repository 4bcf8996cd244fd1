//! What every kind of VMM can be asked.

use std::ops::Range;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use memlane_kvm::dirty::{Harvest, ThrottleStats};
use memlane_protocol::PageSet;
use memlane_protocol::wire::WireError;
use memlane_protocol::wire::attach::Bond;
use memlane_protocol::wire::control::QemuGuest;

use crate::memory::VmmMemory;

/// Why a VMM did not do as it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The VMM closed its connection, or its process has ended.
    #[error("the VMM is gone, or the connection to it is lost")]
    Gone,
    /// The same, and the VMM was gone before it could hear what it was asked.
    #[error("the VMM is gone, or the connection to it is lost")]
    Unheard,
    /// The VMM did not answer in time.
    #[error("the VMM did not answer to `{request}` within {after:.0?}")]
    Slow {
        /// What it was asked.
        request: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// The VMM said no.
    #[error("the VMM cannot {request}: {reason}")]
    Failed {
        /// What it was asked.
        request: &'static str,
        /// Its words.
        reason: String,
    },
    /// The VMM's answer makes no sense.
    #[error("the VMM broke the protocol in its answer to `{request}`: {reason}")]
    Broken {
        /// What it was asked.
        request: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A packet that is none.
    #[error("the VMM broke the protocol: {0}")]
    Protocol(#[from] WireError),
}

/// A VMM's state without RAM, and what saving it took.
#[derive(Clone, Debug)]
pub struct SavedState {
    /// The state, as the VMM of the destination reads it.
    pub bytes: Vec<u8>,
    /// Time that the VMM took.
    pub took: Duration,
}

/// Something that is in the way of moving a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// In which respect, one word.
    pub what: &'static str,
    /// What is wrong.
    pub detail: String,
    /// What to do about it, where `detail` does not say.
    pub remedy: Option<String>,
}

impl Blocker {
    /// A blocker in this respect.
    pub fn new(what: &'static str, detail: String, remedy: Option<String>) -> Self {
        Self { what, detail, remedy }
    }
}

/// What every kind of VMM can be asked. One request is under way at a time; others wait.
#[async_trait(?Send)]
pub trait Driver {
    /// Begins to track writes, with nothing armed yet. No vCPU is stopped.
    async fn start_tracking(&self) -> Result<(), DriverError>;
    /// Notices writes to these pages from now on. Returns what of them may hold something, where
    /// that had to be found out for it: of the rest, whatever comes into being is noticed as written.
    async fn write_protect(&self, pages: Range<u64>) -> Result<Option<Vec<Range<u64>>>, DriverError>;
    /// Adds all pages written since they were armed or last harvested to `into`; tells how
    /// many are new there.
    async fn harvest(&self, into: &PageSet) -> Result<Harvest, DriverError>;
    /// Holds the guest's writes to so many pages of 4 KiB per second until tracking stops, by holding up
    /// whoever writes and nobody else; tells how that went since it began. `None` if the VMM cannot.
    async fn throttle(&self, _pages_per_second: u64) -> Result<Option<ThrottleStats>, DriverError> {
        Ok(None)
    }
    /// Tracks no more.
    async fn stop_tracking(&self) -> Result<(), DriverError>;
    /// Makes a userfaultfd of the VMM's process, and finds the guest's memory there. With `keep` the
    /// process keeps a copy of it, so that whoever waits for a missing page waits on if this daemon ends.
    async fn open_memory(&self, keep: bool) -> Result<VmmMemory, DriverError>;
    /// Stops all vCPUs; returns the moment from which the guest may have stood still. Where the VMM has a clock
    /// of its own for that, the guest runs on by itself unless it was resumed or relinquished within `limit`.
    async fn pause(&self, limit: Duration) -> Result<Instant, DriverError>;
    /// Lets the vCPUs run, if they do not; returns since when they do, as Unix time, where the
    /// VMM tells that.
    async fn resume(&self) -> Result<Option<Duration>, DriverError>;
    /// Saves everything but RAM. The guest is paused.
    async fn save(&self) -> Result<SavedState, DriverError>;
    /// Prepares the VMM to be given a guest, so that nothing is left for the guest's pause but to load it.
    async fn get_ready(&self) -> Result<(), DriverError> {
        Ok(())
    }
    /// Undoes [`Driver::get_ready`]: no guest comes after all, and nothing was loaded.
    async fn stand_down(&self) {}
    /// Loads what [`Driver::save`] gave at another host; returns the time that it took.
    async fn load(&self, state: &[u8]) -> Result<Duration, DriverError>;
    /// Makes sure that the paused guest does not run by itself any more.
    async fn relinquish(&self, bond: &Bond) -> Result<(), DriverError>;
    /// Lets the VMM remember to which migration the guest that it loaded belongs.
    async fn prepare(&self, bond: &Bond) -> Result<(), DriverError>;
    /// Ends the VMM: the guest runs elsewhere, or never will run here.
    async fn discard(&self) -> Result<(), DriverError>;
    /// Returns once the connection to the VMM is lost.
    async fn gone(&self);
    /// Ends the connection: the VMM then does what its own rules say.
    fn hang_up(&self);
    /// Whether saving takes hold of more than memory, such as disks, so that it is begun only when
    /// nothing else is left to do.
    fn saves_last(&self) -> bool {
        false
    }
    /// Whether the VMM still waits for a guest, and nobody else is about to give it one.
    async fn awaits(&self) -> Result<bool, DriverError> {
        Ok(true)
    }
    /// What forbids to move the guest away, as far as can be known beforehand.
    async fn blockers(&self) -> Result<Vec<Blocker>, DriverError> {
        Ok(Vec::new())
    }
    /// What there is to know of the VMM if it is stock QEMU.
    fn qemu(&self) -> Option<&QemuGuest> {
        None
    }
}
