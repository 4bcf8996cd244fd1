//! A driver asks a VMM to do what a migration needs, in the same way for every kind of VMM.

use std::ops::Range;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use memlane_kvm::dirty::{Harvest, ThrottleStats};
use memlane_protocol::PageSet;
use memlane_protocol::wire::WireError;
use memlane_protocol::wire::attach::Bond;
use memlane_protocol::wire::control::QemuGuest;

use crate::memory::VmmMemory;
use crate::process::Hang;
use crate::state::{StateReader, StateWriter};

/// A VMM did not do as it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The VMM closed its connection, or its process has ended.
    #[error("the VMM is gone, or the connection to it is lost")]
    Gone,
    /// The VMM was gone before it could hear the request.
    #[error("the VMM is gone, or the connection to it is lost")]
    Unheard,
    /// The VMM did not answer in time.
    #[error("the VMM did not answer to `{request}` within {after:.0?}{hang}")]
    Slow {
        /// This is the request.
        request: &'static str,
        /// The answer was waited for this long.
        after: Duration,
        /// This is why, as far as it can be seen.
        hang: Hang,
    },
    /// The VMM refused.
    #[error("the VMM cannot {request}: {reason}")]
    Failed {
        /// This is the request.
        request: &'static str,
        /// This is the reason in the VMM's own words.
        reason: String,
    },
    /// The VMM's answer makes no sense.
    #[error("the VMM broke the protocol in its answer to `{request}`: {reason}")]
    Broken {
        /// This is the request.
        request: &'static str,
        /// This is what is wrong with the answer.
        reason: String,
    },
    /// The VMM sent a packet that is not understood.
    #[error("the VMM broke the protocol: {0}")]
    Protocol(#[from] WireError),
}

/// What saving a VMM's state, without RAM, has come to.
#[derive(Clone, Debug)]
pub struct SavedState {
    /// The state has this many bytes.
    pub bytes: u64,
    /// The VMM took this long to save it.
    pub took: Duration,
    /// If this is a word, such as `paused`, the guest did not run when the VMM was told to pause it, and stays so.
    pub stays: Option<String>,
}

/// What loading a VMM's state has come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadedState {
    /// The VMM took this long to load it from when the last of it had come.
    pub took: Duration,
    /// If this is a word, such as `paused`, the guest did not run at the other host, and resuming it here leaves it so.
    pub stays: Option<String>,
}

/// How a VMM came to its end, in its own words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Farewell {
    /// The guest shut itself down, and the VMM ended with it. The text says what the guest did, such as `powered off`.
    PoweredOff(&'static str),
    /// Something else ended the VMM.
    Other(String),
}

/// A blocker is something that prevents a guest from being moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// This word names the part of the guest that is concerned.
    pub what: &'static str,
    /// This is what is wrong.
    pub detail: String,
    /// This is what the operator can do about it, where `detail` does not say that.
    pub remedy: Option<String>,
}

impl Blocker {
    /// Makes a blocker from its parts.
    pub fn new(what: &'static str, detail: String, remedy: Option<String>) -> Self {
        Self { what, detail, remedy }
    }
}

/// A driver passes requests to one VMM. One request is under way at a time, and others wait. Every request fails if the
/// VMM is gone, does not answer in time, refuses, or answers with nonsense.
#[async_trait(?Send)]
pub trait Driver {
    /// Begins to track writes, with no page write-protected yet. No vCPU is stopped.
    async fn start_tracking(&self) -> Result<(), DriverError>;
    /// Notices writes to these pages from now on. Where the driver has to find out which of them hold data, it returns
    /// those that may; among the others, every page that comes into being is noticed as written.
    async fn write_protect(&self, pages: Range<u64>) -> Result<Option<Vec<Range<u64>>>, DriverError>;
    /// Adds all pages to `into` that were written since they were write-protected or last harvested. Returns how many
    /// of them are new there.
    async fn harvest(&self, into: &PageSet) -> Result<Harvest, DriverError>;
    /// Holds the guest's writes to so many pages of 4 KiB per second until tracking stops, by holding up only the vCPUs
    /// that write. Returns how that has gone since it began, or `None` if the VMM cannot do it.
    async fn throttle(&self, _pages_per_second: u64) -> Result<Option<ThrottleStats>, DriverError> {
        Ok(None)
    }
    /// Returns once all block I/O has ended that was under way, if the guest has a disk that bypasses the page cache. Such
    /// a read is noticed as a write when it begins, and writes to memory until it ends. Returns how long the guest's
    /// I/O stood still for that, or `None` if there is no such disk.
    async fn drain(&self) -> Result<Option<Duration>, DriverError> {
        Ok(None)
    }
    /// Stops tracking.
    async fn stop_tracking(&self) -> Result<(), DriverError>;
    /// Makes a userfaultfd of the VMM's process, and finds the guest's memory there. With `keep` the process keeps a
    /// copy of it, so that a vCPU that waits for a missing page goes on waiting if this daemon ends.
    async fn open_memory(&self, keep: bool) -> Result<VmmMemory, DriverError>;
    /// Finds the guest's memory through the userfaultfd of which the VMM keeps a copy, because an earlier daemon asked it
    /// to. Pages that were missing then are missing still.
    async fn reopen_memory(&self) -> Result<VmmMemory, DriverError>;
    /// Prepares the VMM to be paused, so that only that is left for [`Driver::pause`]. The guest runs on meanwhile, and what
    /// holds up its writes still does. What the VMM writes of its state from then on goes to `state`, as the VMM of the
    /// destination reads it: all of it is there when [`Driver::save`] returns, and the first of it may be before the guest
    /// is paused. If this is `soon`, the guest is paused as soon as the VMM can, however much of its state is left then.
    async fn prepare_pause(&self, state: StateWriter, soon: bool) -> Result<(), DriverError>;
    /// Stops all vCPUs. Returns the earliest moment at which the guest may have stood still. Where the VMM has a clock
    /// of its own for that, the guest runs on by itself unless it was resumed or relinquished within `limit`.
    async fn pause(&self, limit: Duration) -> Result<Instant, DriverError>;
    /// Returns since when the guest stands still that is being paused, which was told to at `asked`, or `None` if it still
    /// runs, as far as the VMM has told.
    fn standing_since(&self, asked: Instant) -> Option<Instant> {
        Some(asked)
    }
    /// Begins to find out what [`Driver::resume`] needs to know, while something else is waited for.
    fn prepare_resume(&self) {}
    /// Lets the vCPUs run, if they do not and did so before the migration. Returns since when they do, as Unix time, where
    /// the VMM tells that.
    async fn resume(&self) -> Result<Option<Duration>, DriverError>;
    /// Saves everything but RAM. The guest must be paused.
    async fn save(&self) -> Result<SavedState, DriverError>;
    /// Prepares the VMM to be given a guest, so that only loading it is left for the guest's pause.
    async fn get_ready(&self) -> Result<(), DriverError> {
        Ok(())
    }
    /// Undoes [`Driver::get_ready`]: no guest comes after all, and nothing was loaded.
    async fn stand_down(&self) {}
    /// Loads what another host's VMM has saved, while it comes, and lets the VMM remember to which migration the guest
    /// belongs. After [`DriverError::Failed`] nothing was loaded, and the VMM can be given another guest.
    async fn load(&self, state: StateReader, bond: &Bond) -> Result<LoadedState, DriverError>;
    /// Makes sure that the paused guest does not run by itself any more.
    async fn relinquish(&self, bond: &Bond) -> Result<(), DriverError>;
    /// Ends the VMM: the guest runs elsewhere, or never will run here.
    async fn discard(&self) -> Result<(), DriverError>;
    /// Has what is asked while the guest runs, before it is paused, wait so long for a VMM that does not answer.
    fn be_patient(&self, _patience: Duration) {}
    /// Returns what is waited for, in words, if the VMM does not answer at present.
    fn waits_for(&self) -> Option<String> {
        None
    }
    /// Returns once the connection to the VMM is lost.
    async fn gone(&self);
    /// Ends the connection. The VMM then follows its own rules.
    fn hang_up(&self);
    /// Returns what the VMM has said about its end, before the connection to it was lost.
    fn farewell(&self) -> Option<Farewell> {
        None
    }
    /// Tells whether saving takes hold of more than memory, such as disks, so that it must begin only when nothing else
    /// is left to do.
    fn saves_last(&self) -> bool {
        false
    }
    /// Tells whether, when tracking began, the guest had a disk that bypasses the page cache: what is noticed as written may
    /// be read for sending only after [`Driver::drain`].
    fn reads_directly(&self) -> bool {
        false
    }
    /// Tells whether the VMM waits for a guest, and no program other than this daemon is about to give it one.
    async fn awaits(&self) -> Result<bool, DriverError> {
        Ok(true)
    }
    /// Finds what prevents the guest from being moved away, as far as that can be known beforehand.
    async fn blockers(&self) -> Result<Vec<Blocker>, DriverError> {
        Ok(Vec::new())
    }
    /// Looks anew at what the VMM is made of now, if it is stock QEMU.
    async fn look(&self) -> Result<Option<QemuGuest>, DriverError> {
        Ok(None)
    }
    /// Returns how many bytes the VMM's state has at most, without RAM, if the VMM tells.
    async fn state_bytes(&self) -> Result<Option<u64>, DriverError> {
        Ok(None)
    }
    /// Returns what was known of the VMM when the guest was taken in, if it is stock QEMU.
    fn qemu(&self) -> Option<&QemuGuest> {
        None
    }
}
