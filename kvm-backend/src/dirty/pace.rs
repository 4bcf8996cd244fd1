//! [`Pace`]: holding a guest's writes to a rate by keeping the vCPUs that write out of the guest.
//!
//! For trackers that learn which vCPU wrote, as KVM's dirty rings tell. Nothing is protected for it
//! that is not protected for tracking, so a vCPU that only reads or computes notices nothing; and what
//! a vCPU wrote is paid for after the fact, exactly, however late somebody looks.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memlane_protocol::throttle::Bucket;

/// How often it is looked what was written while nobody is held. A vCPU writes at full speed in between, so
/// this bounds what it may have to pay for at a time.
const LOOK: Duration = Duration::from_millis(1);
/// The same while somebody is held: most often that is whoever writes, and each look takes a processor away
/// from a vCPU that does not.
const LOOK_AT_OTHERS: Duration = Duration::from_millis(10);
/// Shorter waits are left to the next look: it takes about as long to leave the guest.
const LEAST_WAIT: Duration = Duration::from_micros(200);
/// A vCPU asks again after this whether it must wait, so that it hears of a new rate.
const LONGEST_SLEEP: Duration = Duration::from_millis(10);

/// How pacing has gone since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paced {
    /// Pages of 4 KiB that were written.
    pub written_pages: u64,
    /// Pages that there were to write, had the guest always wanted to.
    pub target_pages: u64,
}

/// What vCPU threads look at.
pub(super) struct Holds {
    epoch: Instant,
    /// Until when after the epoch each vCPU is to stay out of the guest.
    until: Mutex<Vec<Duration>>,
}

/// Makes a vCPU leave the guest, by number.
pub(super) type Kick = Arc<dyn Fn(usize) + Send + Sync>;

/// A thread that holds vCPUs to a rate until it is dropped. Then all of them go on.
pub(super) struct Pace {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    account: Mutex<Account>,
    changed: Condvar,
    holds: Arc<Holds>,
}

struct Account {
    bucket: Bucket,
    pages_per_second: u64,
    /// Since when, after the epoch.
    since: Duration,
    written_pages: u64,
    /// Up to `since`.
    target_pages: f64,
    ended: bool,
}

impl Holds {
    pub fn new() -> Self {
        Self { epoch: Instant::now(), until: Mutex::default() }
    }

    pub fn add_vcpu(&self) {
        self.lock().push(Duration::ZERO);
    }

    /// Until when a vCPU is to stay out of the guest, if it is; it asks again then.
    pub fn of(&self, vcpu: usize) -> Option<Instant> {
        let now = self.now();
        let until = self.lock().get(vcpu).copied()?;
        let left = until.checked_sub(now).filter(|left| !left.is_zero())?;
        Some(self.epoch + now + left.min(LONGEST_SLEEP))
    }

    fn hold(&self, vcpu: usize, until: Duration) {
        if let Some(held) = self.lock().get_mut(vcpu) {
            *held = until;
        }
    }

    /// Nobody is held for longer than `until`.
    fn hold_at_most(&self, until: Duration) {
        self.lock().iter_mut().for_each(|held| *held = until.min(*held));
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Duration>> {
        self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pace {
    /// Holds the guest's writes to `pages_per_second`. `look` tells how many pages each vCPU has written
    /// since it was last called.
    pub fn start(
        holds: Arc<Holds>,
        pages_per_second: u64,
        kick: Kick,
        mut look: impl FnMut() -> Vec<u32> + Send + 'static,
    ) -> std::io::Result<Self> {
        let now = holds.now();
        let account = Account {
            bucket: Bucket::new(pages_per_second, now),
            pages_per_second,
            since: now,
            written_pages: 0,
            target_pages: 0.0,
            ended: false,
        };
        let shared = Arc::new(Shared { account: Mutex::new(account), changed: Condvar::new(), holds });
        // What was written before costs nothing.
        look();
        let paced = shared.clone();
        let thread =
            std::thread::Builder::new().name("pace".into()).spawn(move || paced.run(&kick, &mut look))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Holds them to another rate from now on.
    pub fn set_rate(&self, pages_per_second: u64) {
        let (mut account, now) = (self.shared.lock(), self.shared.holds.now());
        account.settle(now);
        account.pages_per_second = pages_per_second;
        account.bucket.set_rate(pages_per_second, now);
        // What is owed is paid off sooner at a higher rate.
        let wait = account.bucket.take(0, now);
        self.shared.holds.hold_at_most(now.saturating_add(wait));
    }

    /// How it has gone so far.
    pub fn paced(&self) -> Paced {
        let mut account = self.shared.lock();
        account.settle(self.shared.holds.now());
        Paced { written_pages: account.written_pages, target_pages: account.target_pages as u64 }
    }
}

impl Drop for Pace {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by its hook.
            let _ = thread.join();
        }
        self.shared.holds.hold_at_most(Duration::ZERO);
    }
}

impl Shared {
    fn run(&self, kick: &Kick, look: &mut impl FnMut() -> Vec<u32>) {
        let mut held_until = Duration::ZERO;
        loop {
            let held = held_until.saturating_sub(self.holds.now());
            let (account, on) = (self.lock(), |account: &mut Account| !account.ended);
            let waited = self.changed.wait_timeout_while(account, held.clamp(LOOK, LOOK_AT_OTHERS), on);
            let (account, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if account.ended {
                return;
            }
            // Not with the lock held: looking waits for whoever collects the rings.
            drop(account);
            let written = look();
            let Some(until) = self.lock().pay(&written, self.holds.now()) else { continue };
            held_until = until;
            for (vcpu, _) in written.iter().enumerate().filter(|(_, pages)| **pages > 0) {
                self.holds.hold(vcpu, until);
                kick(vcpu);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Account {
    /// Pays for what the vCPUs have written; tells until when those that did must wait.
    fn pay(&mut self, written: &[u32], now: Duration) -> Option<Duration> {
        let pages = written.iter().map(|pages| u64::from(*pages)).sum();
        if pages == 0 {
            return None;
        }
        self.written_pages += pages;
        self.bucket.take(pages, now);
        // Those have gone already; it is the next that must wait.
        let wait = self.bucket.take(0, now);
        (wait >= LEAST_WAIT).then(|| now.saturating_add(wait))
    }

    fn settle(&mut self, now: Duration) {
        let passed = now.saturating_sub(std::mem::replace(&mut self.since, now));
        self.target_pages += self.pages_per_second as f64 * passed.as_secs_f64();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(pages_per_second: u64) -> Account {
        let bucket = Bucket::new(pages_per_second, Duration::ZERO);
        let (since, target_pages) = (Duration::ZERO, 0.0);
        Account { bucket, pages_per_second, since, written_pages: 0, target_pages, ended: false }
    }

    #[test]
    fn what_is_written_is_paid_for_afterwards() {
        let mut account = account(1000);
        assert_eq!(account.pay(&[0, 0], Duration::from_millis(1)), None);
        let until = account.pay(&[40, 10], Duration::from_millis(1)).expect("50 ms are owed");
        assert!((49..=51).contains(&until.as_millis()), "{until:?}");
        // Whoever writes on meanwhile owes the more.
        let until = account.pay(&[0, 10], Duration::from_millis(2)).expect("60 ms are owed");
        assert!((59..=61).contains(&until.as_millis()), "{until:?}");
    }

    #[test]
    fn a_guest_that_is_held_writes_at_the_rate_however_late_it_wakes() {
        let (mut account, mut now) = (account(28_000), Duration::ZERO);
        for turn in 0..1000u64 {
            let until = account.pay(&[300], now).unwrap_or(now);
            // It wakes up to 3 ms late, and is seen to have written a look later.
            now = until.max(now) + LOOK + Duration::from_micros(turn * 7919 % 3000);
        }
        let rate = account.written_pages as f64 / now.as_secs_f64();
        assert!((27_000.0..29_000.0).contains(&rate), "{rate}");
    }

    #[test]
    fn a_new_rate_counts_from_when_it_comes() {
        let mut account = account(1000);
        account.settle(Duration::from_secs(1));
        account.pages_per_second = 3000;
        account.settle(Duration::from_secs(2));
        assert!((account.target_pages - 4000.0).abs() < 1e-6);
    }

    #[test]
    fn vcpus_wait_until_they_are_let_go() {
        let holds = Arc::new(Holds::new());
        (0..2).for_each(|_| holds.add_vcpu());
        let (kicked, kicks) = std::sync::mpsc::channel();
        let kick: Kick = Arc::new(move |vcpu| _ = kicked.send(vcpu));
        let pace = Pace::start(holds.clone(), 1, kick, || vec![0, 5]).expect("a thread");
        assert_eq!(kicks.recv_timeout(Duration::from_secs(10)), Ok(1));
        assert!(holds.of(1).is_some_and(|until| until <= Instant::now() + LONGEST_SLEEP));
        assert_eq!(holds.of(0), None, "it wrote nothing");
        assert!(pace.paced().written_pages >= 5);
        // At a higher rate they owe less time. The thread may just have been about to hold somebody at the old one.
        let owes_less = (0..1000).any(|_| {
            pace.set_rate(u64::MAX);
            std::thread::sleep(LOOK);
            holds.lock()[1] <= holds.now() + LOOK
        });
        assert!(owes_less);
        drop(pace);
        assert_eq!([0, 1, 2].map(|vcpu| holds.of(vcpu)), [None; 3]);
    }
}
