//! Guests of this host, and the drivers that know how to handle their VMMs.

pub mod attach_socket;
mod attached;
mod process;

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use memlane_kvm::ram::GuestRam;
use memlane_protocol::PageSet;
use memlane_protocol::wire::WireError;
use memlane_protocol::wire::attach::{MigrationId, Standing};
use memlane_protocol::wire::machine::GuestShape;

pub use attached::Attached;
pub use process::Process;

/// Why a VMM did not do as it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The VMM closed its connection, or its process has ended.
    #[error("the connection to the VMM is lost")]
    Gone,
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

/// What every kind of VMM can be asked. One request is under way at a time; others wait.
#[async_trait(?Send)]
pub trait Driver {
    /// Begins to track writes, with nothing armed yet. No vCPU is stopped.
    async fn start_tracking(&self) -> Result<(), DriverError>;
    /// Notices writes to these pages from now on.
    async fn arm(&self, pages: Range<u64>) -> Result<(), DriverError>;
    /// Adds all pages written since they were armed or last harvested to `into`; returns how
    /// many are new there.
    async fn harvest(&self, into: &PageSet) -> Result<u64, DriverError>;
    /// Tracks no more.
    async fn stop_tracking(&self) -> Result<(), DriverError>;
    /// Stops all vCPUs.
    async fn pause(&self) -> Result<(), DriverError>;
    /// Lets the vCPUs run.
    async fn resume(&self) -> Result<(), DriverError>;
    /// Saves everything but RAM. The guest is paused.
    async fn save(&self) -> Result<SavedState, DriverError>;
    /// Loads what [`Driver::save`] gave at another host; returns the time that it took.
    async fn load(&self, state: &[u8]) -> Result<Duration, DriverError>;
    /// Makes sure that the paused guest does not run by itself any more.
    async fn relinquish(&self, migration: MigrationId) -> Result<(), DriverError>;
    /// Lets the VMM remember to which migration the guest that it loaded belongs.
    async fn prepare(&self, migration: MigrationId) -> Result<(), DriverError>;
    /// Ends the VMM: the guest runs elsewhere, or never will run here.
    async fn discard(&self) -> Result<(), DriverError>;
    /// Returns once the connection to the VMM is lost.
    async fn gone(&self);
    /// Ends the connection: the VMM then does what its own rules say.
    fn hang_up(&self);
}

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
    pub standing: Cell<Standing>,
    /// Its writes are being tracked.
    pub tracked: Cell<bool>,
    /// The migration that it takes part in, or (relinquished, loaded) took part in.
    pub migration: RefCell<Option<MigrationId>>,
}

impl Guest {
    /// Whether a migration of it is under way here.
    pub fn is_moving(&self) -> bool {
        self.migration.borrow().is_some()
    }
}
