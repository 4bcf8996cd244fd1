//! This module tracks a VMM's writes from outside, through the descriptors that its process hands over.

use std::cell::Cell;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use memlane_kvm::dirty::{ExternalTracker, TrackError, WriteProtection};
use memlane_kvm::userfault::{Userfault, WRITE_PROTECT, WRITE_PROTECT_ASYNC};
use memlane_net::task;
use memlane_protocol::PageSet;

use super::memory::VmmMemory;
use super::write_faults::WriteFaultHandler;
use super::{DriverError, Harvest};

/// Tracks until it ends or is dropped, which lifts all protection.
pub(crate) struct Tracking {
    work: Arc<Work>,
    harvested: Arc<PageSet>,
    ended: Cell<bool>,
}

/// The work is done on other threads, because a large guest's page tables take long to walk.
struct Work {
    tracker: Mutex<ExternalTracker>,
    /// This lets writes go where they wait. It is dropped after the tracker.
    write_faults: Option<WriteFaultHandler>,
}

impl Tracking {
    /// Begins to track the writes of the VMM whose memory this is. Nothing is write-protected yet. Once it is, writes
    /// are held to so many `pages_per_second` of 4 KiB, if that is given.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses the tracker or the thread.
    pub(crate) async fn start(memory: VmmMemory, pages_per_second: Option<u64>) -> Result<Self, DriverError> {
        let harvested = Arc::new(PageSet::new(memory.memory.ram().pages()));
        // The VMM's mappings may be busy, and all of its memory is registered.
        let work = task::aside(move || Work::start(memory, pages_per_second)).await?;
        Ok(Self { work: Arc::new(work), harvested, ended: Cell::default() })
    }

    /// Does what [`Driver::write_protect`](crate::Driver::write_protect) says.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub(crate) async fn write_protect(&self, pages: Range<u64>) -> Result<Vec<Range<u64>>, DriverError> {
        self.work("arm", move |tracker, _| tracker.write_protect(pages)).await
    }

    /// Write-protects all memory, of which nothing is to be copied for that: another tracker tells what is written up
    /// to then.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub(crate) async fn write_protect_all(&self) -> Result<(), DriverError> {
        self.work("arm", |tracker, _| tracker.write_protect_all()).await
    }

    /// Does what [`Driver::harvest`](crate::Driver::harvest) says.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses.
    pub(crate) async fn harvest(&self, into: &PageSet) -> Result<Harvest, DriverError> {
        // Into a set of its own first: the caller may give up waiting, and what was found must
        // not be lost with it.
        let work = self.work.clone();
        let harvest = move |tracker: &mut ExternalTracker, harvested: &PageSet| {
            let found = tracker.harvest(harvested)?;
            if let Some(write_faults) = &work.write_faults {
                write_faults.protected(harvested);
            }
            Ok(found)
        };
        let found = self.work("harvest", harvest).await?;
        let mut new = 0;
        let drain = |piece| new += self.harvested.drain_into(piece, into);
        task::in_pieces(self.harvested.pages(), drain).await;
        Ok(Harvest { new, holes: found.holes })
    }

    /// Returns the handler that lets writes go, where they wait.
    pub(crate) fn write_faults(&self) -> Option<&WriteFaultHandler> {
        self.work.write_faults.as_ref()
    }

    /// Ends tracking, and returns when all protection is lifted.
    pub(crate) async fn end(&self) {
        let work = self.work.clone();
        task::aside(move || work.end()).await;
        self.ended.set(true);
    }

    async fn work<T: Send + 'static>(
        &self,
        request: &'static str,
        act: impl FnOnce(&mut ExternalTracker, &PageSet) -> Result<T, TrackError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let (work, harvested) = (self.work.clone(), self.harvested.clone());
        let done = task::aside(move || {
            let mut tracker = work.tracker.lock().unwrap_or_else(PoisonError::into_inner);
            act(&mut tracker, &harvested)
        });
        let done = done.await;
        done.map_err(|error| DriverError::Failed { request, reason: error.to_string() })
    }
}

impl Work {
    fn start(memory: VmmMemory, pages_per_second: Option<u64>) -> Result<Self, DriverError> {
        let failed = |reason: String| DriverError::Failed { request: "start tracking", reason };
        let VmmMemory { userfault, pagemap, memory, punches } = memory;
        let (features, writes) = match pages_per_second {
            None => (WRITE_PROTECT_ASYNC, WriteProtection::Async),
            Some(_) => (WRITE_PROTECT, WriteProtection::Sync),
        };
        let userfault = Userfault::from_fd(userfault, features).map_err(|error| failed(error.to_string()))?;
        let userfault = Arc::new(userfault);
        let tracker = ExternalTracker::new(memory.clone(), userfault.clone(), pagemap, writes);
        let tracker = tracker.map_err(|error| failed(error.to_string()))?;
        let tracker = Mutex::new(if punches { tracker } else { tracker.without_hole_watch() });
        let write_faults =
            pages_per_second.map(|rate| WriteFaultHandler::start(memory, userfault, rate)).transpose();
        let write_faults =
            write_faults.map_err(|error| failed(format!("no thread to release writes: {error}")))?;
        Ok(Self { tracker, write_faults })
    }

    fn end(&self) {
        if let Some(write_faults) = &self.write_faults {
            write_faults.open();
        }
        self.tracker.lock().unwrap_or_else(PoisonError::into_inner).stop();
        if let Some(write_faults) = &self.write_faults {
            write_faults.end();
        }
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        if self.ended.get() {
            return;
        }
        let work = self.work.clone();
        // Without a thread the kernel lifts the protection when the last of this is dropped.
        let _ = std::thread::Builder::new().name("tracking-end".into()).spawn(move || work.end());
    }
}
