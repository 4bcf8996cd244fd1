//! Stun holds the writes of a guest that writes faster than the lanes carry to a rate.
//!
//! A linked VMM whose tracker knows which vCPU writes holds up those vCPUs itself, which costs the others nothing. The
//! memory of all other VMMs is write-protected so that a write waits, and a thread of the daemon lets writes go one by
//! one. This mechanism is the same for every kind of VMM, and it replaces the VMM's own tracker and the asynchronous
//! protection of a QEMU for as long as it lasts.

mod fingerprints;

use std::rc::Rc;
use std::time::{Duration, Instant};

use memlane_net::task;
use memlane_protocol::PageSet;
use memlane_protocol::wire::machine::TrackerKind;

use super::tracking::Tracking;
use super::write_faults::{Report, WriteFaultHandler};
use super::{DriverError, Guest, Harvest, ThrottleStats, VmmMemory};

use fingerprints::Fingerprints;

/// A guest's writes are held up in one of two ways.
pub(crate) enum Stunned {
    /// Write protection holds them up, and its tracker is the guest's for that time.
    Protected(Rc<Tracking>),
    /// The VMM holds them up, and its tracker goes on.
    Throttled {
        /// The stun began at this moment.
        since: Instant,
        /// The guest may write this many pages of 4 KiB per second.
        rate: u64,
        /// This is the VMM's last report.
        report: Report,
    },
}

impl Stunned {
    /// Returns the tracker that works in place of the VMM's.
    pub(crate) fn protection(&self) -> Option<Rc<Tracking>> {
        match self {
            Self::Protected(tracking) => Some(tracking.clone()),
            Self::Throttled { .. } => None,
        }
    }
}

/// The change from tracking to a stun took this.
#[derive(Clone, Copy, Debug)]
pub struct Switch {
    /// This was written before the stun began.
    pub harvest: Harvest,
    /// The change took this long, and the guest ran on meanwhile.
    pub took: Duration,
    /// Block I/O stood still for this long, if it had to be waited for.
    pub stall: Option<Duration>,
}

/// Nothing holds up the writes of a stunned guest while this is there.
pub(crate) struct Open<'g> {
    guest: &'g Guest,
    /// They are held to this rate afterwards, in pages of 4 KiB per second.
    rate: Option<u64>,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.guest.draining.set(false);
        if let Some(rate) = self.rate {
            self.guest.write_faults(|write_faults| write_faults.set_rate(rate));
        }
    }
}

impl Guest {
    /// Holds the guest's writes to so many pages of 4 KiB per second from now on. Pages that it has written before are
    /// added to `into`. Pages of `in_flight` are being sent, as may be those of `into`.\n\nThe guest runs on meanwhile.
    ///
    /// # Errors
    ///
    /// Fails if the VMM or the kernel refuses. Writes may then have been missed.
    pub async fn stun(
        &self,
        into: &PageSet,
        in_flight: &PageSet,
        pages_per_second: u64,
    ) -> Result<Switch, DriverError> {
        if let Some(switch) = self.throttle(into, pages_per_second).await? {
            return Ok(switch);
        }
        let memory = self.driver.open_memory(false).await?;
        match self.shape.tracker {
            TrackerKind::Log | TrackerKind::Ring => self.overlap(memory, into, pages_per_second).await,
            TrackerKind::Pagemap => self.exchange(memory, into, in_flight, pages_per_second).await,
        }
    }

    /// Has the VMM hold up the vCPUs that write, if it can.
    async fn throttle(&self, into: &PageSet, pages_per_second: u64) -> Result<Option<Switch>, DriverError> {
        let since = Instant::now();
        if self.shape.tracker != TrackerKind::Ring || self.driver.throttle(pages_per_second).await?.is_none()
        {
            return Ok(None);
        }
        let took = since.elapsed();
        let (rate, report) = (pages_per_second, Report::default());
        self.stunned.replace(Some(Stunned::Throttled { since, rate, report }));
        Ok(Some(Switch { harvest: self.driver.harvest(into).await?, took, stall: None }))
    }

    /// Protects memory that KVM tracks: once all of it is protected, no write is missed without KVM.
    async fn overlap(
        &self,
        memory: VmmMemory,
        into: &PageSet,
        pages_per_second: u64,
    ) -> Result<Switch, DriverError> {
        let started = Instant::now();
        let tracking = Tracking::start(memory, Some(pages_per_second)).await?;
        tracking.write_protect_all().await?;
        let harvest = self.driver.harvest(into).await?;
        self.stunned.replace(Some(Stunned::Protected(tracking.into())));
        self.driver.stop_tracking().await?;
        Ok(Switch { harvest, took: started.elapsed(), stall: None })
    }

    /// Exchanges one userfaultfd for another, since memory can be protected by one at a time. What is written in
    /// between is found by a comparison of what memory holds before and after. A page that is sent in between may have
    /// been sent as it was neither before nor after, so all of those are sent again.
    async fn exchange(
        &self,
        memory: VmmMemory,
        into: &PageSet,
        in_flight: &PageSet,
        pages_per_second: u64,
    ) -> Result<Switch, DriverError> {
        let started = Instant::now();
        let before = Fingerprints::take(self.ram.clone()).await?;
        // This has all pages that were in place when they were looked at, or were being written.
        let unsettled = PageSet::new(self.ram.pages());
        // In the order in which a page goes.
        add(&unsettled, into).await;
        add(&unsettled, in_flight).await;
        let told = self.driver.harvest(&unsettled).await?;
        add(into, &unsettled).await;
        self.driver.stop_tracking().await?;
        let tracking = Tracking::start(memory, Some(pages_per_second)).await?;
        tracking.write_protect_all().await?;
        self.stunned.replace(Some(Stunned::Protected(tracking.into())));
        // What devices write that had begun before has landed when it is compared.
        let stall = self.drain().await?;
        add(into, &unsettled).await;
        // And what is written from here on, by the tracker.
        let changed = before.compare(self.ram.clone(), into).await?;
        let harvest = Harvest { new: told.new + changed.new, holes: told.holes || changed.holes };
        Ok(Switch { harvest, took: started.elapsed(), stall })
    }

    /// Holds the writes of a guest that is stunned to another rate, in pages of 4 KiB per second.
    ///
    /// # Errors
    ///
    /// Fails if the VMM refuses.
    pub async fn set_stun(&self, pages_per_second: u64) -> Result<(), DriverError> {
        if !self.draining.get() {
            self.write_faults(|write_faults| write_faults.set_rate(pages_per_second));
        }
        if let Some(Stunned::Throttled { rate, .. }) = &mut *self.stunned.borrow_mut() {
            *rate = pages_per_second;
        }
        self.update_throttle().await
    }

    /// Asks a VMM that holds up writers itself for a report, and tells it the rate.
    pub(super) async fn update_throttle(&self) -> Result<(), DriverError> {
        let rate = match &*self.stunned.borrow() {
            Some(Stunned::Throttled { rate, .. }) => *rate,
            _ => return Ok(()),
        };
        let Some(ThrottleStats { written_pages, target_pages }) = self.driver.throttle(rate).await? else {
            return Ok(());
        };
        if let Some(Stunned::Throttled { since, report, .. }) = &mut *self.stunned.borrow_mut() {
            let (in_force, target_pages) = (since.elapsed(), target_pages as f64);
            *report = Report { in_force, released_pages: written_pages, target_pages };
        }
        Ok(())
    }

    /// Lets all writes of a guest that is stunned go, as fast as they come.
    pub fn let_writes_go(&self) {
        self.write_faults(WriteFaultHandler::open);
    }

    /// Lets all writes of a guest that is stunned go until what this returns is dropped.
    pub(crate) fn open_for_drain(&self) -> Open<'_> {
        self.draining.set(true);
        let rate = self.write_faults(WriteFaultHandler::rate).flatten();
        self.let_writes_go();
        Open { guest: self, rate }
    }

    /// Ends the stun of a guest whose VMM is out of reach.
    pub fn end_stun(&self) {
        self.let_writes_go();
        self.stunned.take();
    }

    /// Returns how the stun goes, if there is one.
    pub fn stun_report(&self) -> Option<Report> {
        match &*self.stunned.borrow() {
            Some(Stunned::Throttled { report, .. }) => Some(*report),
            Some(Stunned::Protected(tracking)) => tracking.write_faults().map(WriteFaultHandler::report),
            None => None,
        }
    }

    fn write_faults<T>(&self, act: impl FnOnce(&WriteFaultHandler) -> T) -> Option<T> {
        let protection = self.stunned.borrow().as_ref().and_then(Stunned::protection);
        protection.as_ref().and_then(|tracking| tracking.write_faults()).map(act)
    }
}

async fn add(to: &PageSet, pages: &PageSet) {
    let add = |range| pages.words(range).for_each(|(word, bits)| _ = to.insert_word(word, bits));
    task::in_pieces(pages.pages(), add).await;
}
