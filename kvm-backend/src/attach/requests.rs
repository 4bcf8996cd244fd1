//! The daemon's requests, and what each does to the VMM.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use memlane_protocol::PageSet;
use memlane_protocol::wire::attach::Request;
use rustix::time::ClockId;

use super::connection::Connection;
use super::state_memfd::{read_state, seal_state};
use super::{TrackingPhase, VmmError};
use crate::dirty::ThrottleStats;
use crate::shared::SharedWords;
use crate::userfault;

/// What a request returns: two values, and descriptors for the daemon.
pub(super) type Outcome = Result<([u64; 2], Vec<OwnedFd>), VmmError>;

impl Connection<'_> {
    /// Carries out a request, if it is in order and has the descriptors that it should have.
    ///
    /// # Errors
    ///
    /// The text of the error goes to the daemon.
    pub(super) fn serve(&mut self, request: &Request, mut descriptors: Vec<OwnedFd>) -> Outcome {
        let (least, most) = match request {
            Request::Load { .. } => (1, 1),
            Request::OpenUserfault { .. } => (0, 1),
            _ => (0, 0),
        };
        if !(least..=most).contains(&descriptors.len()) {
            return Err(format!("{} descriptors came with it instead of {most}", descriptors.len()).into());
        }
        self.lifecycle.check(request)?;
        let before = Instant::now();
        let elapsed = || before.elapsed().as_nanos() as u64;
        let none = Vec::new();
        let outcome = match *request {
            Request::StartTracking => ([0; 2], vec![self.start_tracking()?]),
            Request::WriteProtect { first, pages } => {
                self.write_protect(first, pages)?;
                ([elapsed(), 0], none)
            }
            Request::Harvest => {
                let dirty = self.dirty.as_ref().ok_or("tracking has not been started")?;
                let new = self.lock().tracker().harvest(dirty)?;
                ([elapsed(), new], none)
            }
            Request::Throttle { pages_per_second } => {
                let ThrottleStats { written_pages, target_pages } =
                    self.lock().tracker().throttle(pages_per_second)?;
                ([written_pages, target_pages], none)
            }
            Request::StopTracking => {
                self.stop_tracking()?;
                ([0; 2], none)
            }
            Request::Pause { limit_nanoseconds } => {
                self.pause(limit_nanoseconds)?;
                ([monotonic(), 0], none)
            }
            Request::Resume => {
                self.lock().resume()?;
                ([monotonic(), 0], none)
            }
            Request::Save => {
                let state = self.lock().save()?;
                let memfd = seal_state(&state)?;
                ([state.len() as u64, elapsed()], vec![memfd])
            }
            Request::Load { bytes } => {
                let memfd = descriptors.pop().ok_or("the state's descriptor is missing")?;
                let state = read_state(&File::from(memfd), bytes)?;
                self.lock().load(&state)?;
                ([elapsed(), 0], none)
            }
            Request::Relinquish(_) | Request::Prepare(_) | Request::Discard => ([0; 2], none),
            Request::OpenUserfault { keep } => ([0; 2], self.open_userfault(descriptors.pop(), keep)?),
            Request::KeptUserfault => {
                let kept = self.kept_userfault.as_ref().ok_or("no userfaultfd is kept")?;
                ([0; 2], with_views(kept.try_clone()?)?)
            }
            Request::MappedFile { .. } => return Err("its hello has all of its memory".into()),
        };
        self.lifecycle.done(request);
        self.pause_ends = self.pause_ends.filter(|_| self.lifecycle.must_resume());
        Ok(outcome)
    }

    /// Starts tracking, and returns the memfd of the shared set of dirty pages.
    fn start_tracking(&mut self) -> Result<OwnedFd, VmmError> {
        if self.dirty.is_some() {
            return Err("tracking has been started already".into());
        }
        let mut vmm = self.lock();
        let pages = vmm.ram().pages();
        let (words, memfd) = SharedWords::create(PageSet::words_needed(pages))?;
        let dirty = PageSet::over(pages, words)?;
        vmm.tracker().start()?;
        vmm.tracking_changed(TrackingPhase::Started);
        drop(vmm);
        self.dirty = Some(dirty);
        self.all_protected = false;
        Ok(memfd)
    }

    /// Write-protects a run of pages.
    fn write_protect(&mut self, first: u64, pages: u64) -> Result<(), VmmError> {
        let end = first.checked_add(pages).ok_or("the run of pages ends beyond any guest")?;
        let mut vmm = self.lock();
        vmm.tracker().write_protect(first..end)?;
        let all_protected = vmm.tracker().write_protected_pages() == vmm.ram().pages();
        if all_protected && !self.all_protected {
            vmm.tracking_changed(TrackingPhase::WriteProtected);
        }
        drop(vmm);
        self.all_protected = all_protected;
        Ok(())
    }

    /// Stops tracking, if it is on.
    pub(super) fn stop_tracking(&mut self) -> Result<(), VmmError> {
        let was_on = self.dirty.take().is_some();
        let mut vmm = self.lock();
        vmm.tracker().stop()?;
        if was_on {
            vmm.tracking_changed(TrackingPhase::Stopped);
        }
        Ok(())
    }

    /// Pauses the guest, for at most this time unless that is 0.
    fn pause(&mut self, limit_nanoseconds: u64) -> Result<(), VmmError> {
        self.lifecycle.pausing();
        let limit = (limit_nanoseconds != 0).then(|| Duration::from_nanos(limit_nanoseconds));
        // The time is taken before the vCPUs are paused, so that they are not paused for longer.
        self.pause_ends = limit.and_then(|limit| Instant::now().checked_add(limit));
        self.lock().pause()
    }

    /// Returns a userfaultfd of this process, its page tables (`/proc/self/pagemap`), and its mappings
    /// (`/proc/self/maps`). The userfaultfd is made by the rights of the process that opened `device`, or else by
    /// those of this process; `keep` says whether a copy outlives the connection.
    fn open_userfault(&mut self, device: Option<OwnedFd>, keep: bool) -> Result<Vec<OwnedFd>, VmmError> {
        let opened = match &device {
            Some(device) => userfault::open_by(device.as_fd()),
            None => userfault::open(),
        };
        let opened = opened.map_err(|error| format!("making a userfaultfd: {error}"))?;
        let copy = if keep { Some(opened.try_clone()?) } else { None };
        let descriptors = with_views(opened)?;
        // The kept copy is replaced before the daemon can register memory, which has one userfaultfd at a time.
        *self.kept_userfault = copy;
        Ok(descriptors)
    }
}

/// Returns a userfaultfd of this process with the views of its memory, in the order in which they are sent.
fn with_views(userfault: OwnedFd) -> Result<Vec<OwnedFd>, VmmError> {
    let file = |path| File::open(path).map_err(|error| format!("opening {path}: {error}"));
    Ok(vec![userfault, file("/proc/self/pagemap")?.into(), file("/proc/self/maps")?.into()])
}

/// Returns `CLOCK_MONOTONIC` in nanoseconds (clock_gettime(2)).
fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
