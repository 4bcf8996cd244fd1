//! Stun: a guest that writes faster than the lanes carry has its writes held to a rate.
//!
//! A linked VMM whose tracker knows which vCPU writes holds up those vCPUs itself: that costs the others
//! nothing. The memory of all others is write-protected so that a write waits, and a thread of the daemon
//! lets writes go one by one: one mechanism for whatever VMM, to which its own tracker, and the asynchronous
//! protection of a QEMU, give way.

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

/// How a guest's writes are held up.
pub enum Stunned {
    /// By protection, whose tracker is the guest's for the time being.
    Protected(Rc<Tracking>),
    /// By its VMM, whose tracker goes on.
    Throttled {
        /// Since when.
        since: Instant,
        /// Pages of 4 KiB per second.
        rate: u64,
        /// As far as has been heard.
        report: Report,
    },
}

impl Stunned {
    /// What tracks in place of the VMM's tracker.
    pub fn protection(&self) -> Option<Rc<Tracking>> {
        match self {
            Self::Protected(tracking) => Some(tracking.clone()),
            Self::Throttled { .. } => None,
        }
    }
}

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
    /// until then is added to `into`. Pages of `in_flight` are being sent, as may be those of `into`.
    ///
    /// The guest runs on meanwhile. After an error writes may have been missed.
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

    /// Has the VMM hold up those who write, if it can.
    async fn throttle(&self, into: &PageSet, pages_per_second: u64) -> Result<Option<Switch>, DriverError> {
        let since = Instant::now();
        if self.shape.tracker != TrackerKind::Ring || self.driver.throttle(pages_per_second).await?.is_none()
        {
            return Ok(None);
        }
        let took = since.elapsed();
        let (rate, report) = (pages_per_second, Report::default());
        self.stunned.replace(Some(Stunned::Throttled { since, rate, report }));
        Ok(Some(Switch { harvest: self.driver.harvest(into).await?, took }))
    }

    /// What KVM tracks can be protected besides: from when all is, no write is missed without KVM.
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
        Ok(Switch { harvest, took: started.elapsed() })
    }

    /// Memory can be protected by one userfaultfd at a time. What is written while one gives way to the
    /// other is found by what memory holds before and after; but for what is sent in between, which may
    /// have been sent as it was neither before nor after: all of that is sent again.
    async fn exchange(
        &self,
        memory: VmmMemory,
        into: &PageSet,
        in_flight: &PageSet,
        pages_per_second: u64,
    ) -> Result<Switch, DriverError> {
        let started = Instant::now();
        let before = Fingerprints::take(self.ram.clone()).await?;
        // Whatever was in place when it was looked at, or was being written, is told of here.
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
        add(into, &unsettled).await;
        // And what is written from here on, by the tracker.
        let changed = before.compare(self.ram.clone(), into).await?;
        let harvest = Harvest { new: told.new + changed.new, holes: told.holes || changed.holes };
        Ok(Switch { harvest, took: started.elapsed() })
    }

    /// Holds the writes of a guest that is stunned to another rate.
    pub async fn set_stun(&self, pages_per_second: u64) -> Result<(), DriverError> {
        self.write_faults(|write_faults| write_faults.set_rate(pages_per_second));
        if let Some(Stunned::Throttled { rate, .. }) = &mut *self.stunned.borrow_mut() {
            *rate = pages_per_second;
        }
        self.learn_pace().await
    }

    /// Learns how it goes from a VMM that holds up writers itself, and tells it the rate.
    pub(super) async fn learn_pace(&self) -> Result<(), DriverError> {
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

    /// Ends the stun of a guest whose VMM is out of reach.
    pub fn end_stun(&self) {
        self.let_writes_go();
        self.stunned.take();
    }

    /// How the stun goes, if there is one.
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
