//! [`Throttle`]: a limit on a guest's write rate, which keeps the vCPUs that write out of the guest for a time.
//!
//! It is for trackers that learn which vCPU wrote, as KVM's dirty rings tell. It protects nothing that tracking
//! does not protect already, so a vCPU that only reads or computes notices nothing. What a vCPU wrote is paid for
//! afterwards from a token bucket, exactly, however late the rings are looked at. QEMU does the same for its
//! "dirty limit".

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memlane_protocol::throttle::TokenBucket;

/// The time between two looks at the rings while no vCPU is throttled. A vCPU writes at full speed in between, so
/// this bounds what it may have to pay for at a time.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// The longest time between two looks while a vCPU is throttled: most often that is the only one that writes, and
/// each look takes a processor away from a vCPU that does not.
const POLL_INTERVAL_THROTTLED: Duration = Duration::from_millis(10);
/// Shorter waits are left to the next look: it takes about as long to leave the guest.
const MIN_WAIT: Duration = Duration::from_micros(200);
/// The longest time that a vCPU waits before it asks again, so that it learns of a new rate.
const MAX_SLEEP: Duration = Duration::from_millis(10);

/// What a throttled guest has written, and what it was allowed to write, since its throttle was first set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThrottleStats {
    /// The number of pages of 4 KiB that were written.
    pub written_pages: u64,
    /// The number of pages of 4 KiB that the rate allowed in that time.
    pub target_pages: u64,
}

/// The times until which vCPUs must stay out of the guest, shared with the vCPU threads.
pub(super) struct VcpuDeadlines {
    epoch: Instant,
    /// For each vCPU, when it may enter the guest, as a time since the epoch.
    until: Mutex<Vec<Duration>>,
}

/// A function that makes a vCPU leave the guest, by the vCPU's number.
pub(super) type Kick = Arc<dyn Fn(usize) + Send + Sync>;

/// A thread that holds vCPUs to a rate until this value is dropped. Then all of them go on.
pub(super) struct Throttle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    account: Mutex<Account>,
    changed: Condvar,
    deadlines: Arc<VcpuDeadlines>,
}

struct Account {
    bucket: TokenBucket,
    pages_per_second: u64,
    /// When `target_pages` was last brought up to date, as a time since the epoch.
    since: Duration,
    written_pages: u64,
    /// The pages that were allowed up to `since`.
    target_pages: f64,
    ended: bool,
}

impl VcpuDeadlines {
    /// Returns deadlines for a guest that has no vCPU yet.
    pub(super) fn new() -> Self {
        Self { epoch: Instant::now(), until: Mutex::default() }
    }

    /// Adds a vCPU, numbered after those that were added before, which may enter the guest.
    pub(super) fn add_vcpu(&self) {
        self.lock().push(Duration::ZERO);
    }

    /// Returns until when a vCPU must stay out of the guest before it asks again; `None` if it may enter.
    pub(super) fn until(&self, vcpu: usize) -> Option<Instant> {
        let now = self.now();
        let until = self.lock().get(vcpu).copied()?;
        let left = until.checked_sub(now).filter(|left| !left.is_zero())?;
        Some(self.epoch + now + left.min(MAX_SLEEP))
    }

    fn set(&self, vcpu: usize, until: Duration) {
        if let Some(deadline) = self.lock().get_mut(vcpu) {
            *deadline = until;
        }
    }

    /// Moves every deadline that lies after `until` to `until`.
    fn cap(&self, until: Duration) {
        self.lock().iter_mut().for_each(|deadline| *deadline = until.min(*deadline));
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Duration>> {
        self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Throttle {
    /// Limits the guest's writes to `pages_per_second`. `count_written` returns how many pages each vCPU has
    /// written since it was last called.
    ///
    /// # Errors
    ///
    /// The thread could not be started.
    pub(super) fn start(
        deadlines: Arc<VcpuDeadlines>,
        pages_per_second: u64,
        kick: Kick,
        mut count_written: impl FnMut() -> Vec<u32> + Send + 'static,
    ) -> std::io::Result<Self> {
        let now = deadlines.now();
        let account = Account {
            bucket: TokenBucket::new(pages_per_second, now),
            pages_per_second,
            since: now,
            written_pages: 0,
            target_pages: 0.0,
            ended: false,
        };
        let shared = Arc::new(Shared { account: Mutex::new(account), changed: Condvar::new(), deadlines });
        // What was written before costs nothing.
        count_written();
        let throttle = shared.clone();
        let thread = std::thread::Builder::new()
            .name("throttle".into())
            .spawn(move || throttle.run(&kick, &mut count_written))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Sets another rate from now on.
    pub(super) fn set_rate(&self, pages_per_second: u64) {
        let (mut account, now) = (self.shared.lock(), self.shared.deadlines.now());
        account.settle(now);
        account.pages_per_second = pages_per_second;
        account.bucket.set_rate(pages_per_second, now);
        // What is owed is paid off sooner at a higher rate.
        let wait = account.bucket.take(0, now);
        self.shared.deadlines.cap(now.saturating_add(wait));
    }

    /// Returns what has been written and what was allowed so far.
    pub(super) fn stats(&self) -> ThrottleStats {
        let mut account = self.shared.lock();
        account.settle(self.shared.deadlines.now());
        ThrottleStats { written_pages: account.written_pages, target_pages: account.target_pages as u64 }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by its hook.
            let _ = thread.join();
        }
        self.shared.deadlines.cap(Duration::ZERO);
    }
}

impl Shared {
    fn run(&self, kick: &Kick, count_written: &mut impl FnMut() -> Vec<u32>) {
        let mut throttled_until = Duration::ZERO;
        loop {
            let left = throttled_until.saturating_sub(self.deadlines.now());
            let (account, on) = (self.lock(), |account: &mut Account| !account.ended);
            let interval = left.clamp(POLL_INTERVAL, POLL_INTERVAL_THROTTLED);
            let waited = self.changed.wait_timeout_while(account, interval, on);
            let (account, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if account.ended {
                return;
            }
            // The rings are not looked at with the lock held: that waits for a thread that collects them.
            drop(account);
            let written = count_written();
            let Some(until) = self.lock().pay(&written, self.deadlines.now()) else { continue };
            throttled_until = until;
            for (vcpu, _) in written.iter().enumerate().filter(|(_, pages)| **pages > 0) {
                self.deadlines.set(vcpu, until);
                kick(vcpu);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Account {
    /// Pays for what the vCPUs have written. Returns until when the vCPUs that wrote must wait, if they must.
    fn pay(&mut self, written: &[u32], now: Duration) -> Option<Duration> {
        let pages = written.iter().map(|pages| u64::from(*pages)).sum();
        if pages == 0 {
            return None;
        }
        self.written_pages += pages;
        self.bucket.take(pages, now);
        // These pages were written already; it is the next write that must wait.
        let wait = self.bucket.take(0, now);
        (wait >= MIN_WAIT).then(|| now.saturating_add(wait))
    }

    /// Brings the target up to date.
    fn settle(&mut self, now: Duration) {
        let passed = now.saturating_sub(std::mem::replace(&mut self.since, now));
        self.target_pages += self.pages_per_second as f64 * passed.as_secs_f64();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(pages_per_second: u64) -> Account {
        let bucket = TokenBucket::new(pages_per_second, Duration::ZERO);
        let (since, target_pages) = (Duration::ZERO, 0.0);
        Account { bucket, pages_per_second, since, written_pages: 0, target_pages, ended: false }
    }

    #[test]
    fn what_is_written_is_paid_for_afterwards() {
        let mut account = account(1000);
        assert_eq!(account.pay(&[0, 0], Duration::from_millis(1)), None);
        let until = account.pay(&[40, 10], Duration::from_millis(1)).expect("50 ms are owed");
        assert!((49..=51).contains(&until.as_millis()), "{until:?}");
        // A vCPU that writes on meanwhile owes more.
        let until = account.pay(&[0, 10], Duration::from_millis(2)).expect("60 ms are owed");
        assert!((59..=61).contains(&until.as_millis()), "{until:?}");
    }

    #[test]
    fn a_throttled_guest_writes_at_the_rate_however_late_it_wakes() {
        let (mut account, mut now) = (account(28_000), Duration::ZERO);
        for turn in 0..1000u64 {
            let until = account.pay(&[300], now).unwrap_or(now);
            // It wakes up to 3 ms late, and is seen to have written a look later.
            now = until.max(now) + POLL_INTERVAL + Duration::from_micros(turn * 7919 % 3000);
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
        let deadlines = Arc::new(VcpuDeadlines::new());
        (0..2).for_each(|_| deadlines.add_vcpu());
        let (kicked, kicks) = std::sync::mpsc::channel();
        let kick: Kick = Arc::new(move |vcpu| _ = kicked.send(vcpu));
        let throttle = Throttle::start(deadlines.clone(), 1, kick, || vec![0, 5]).expect("a thread");
        assert_eq!(kicks.recv_timeout(Duration::from_secs(10)), Ok(1));
        assert!(deadlines.until(1).is_some_and(|until| until <= Instant::now() + MAX_SLEEP));
        assert_eq!(deadlines.until(0), None, "it wrote nothing");
        assert!(throttle.stats().written_pages >= 5);
        // At a higher rate they owe less time. The thread may just have been about to set a deadline at the old
        // one.
        let owes_less = (0..1000).any(|_| {
            throttle.set_rate(u64::MAX);
            std::thread::sleep(POLL_INTERVAL);
            deadlines.lock()[1] <= deadlines.now() + POLL_INTERVAL
        });
        assert!(owes_less);
        drop(throttle);
        assert_eq!([0, 1, 2].map(|vcpu| deadlines.until(vcpu)), [None; 3]);
    }
}
