//! A thread lets the writes of a stunned guest go.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memlane_kvm::userfault::{Userfault, is_gone};
use memlane_kvm::vmm_mapping::VmmMapping;
use memlane_lane::priority;
use memlane_protocol::throttle::{FaultAround, TokenBucket};
use memlane_protocol::{PAGE_SIZE, PageSet};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use tracing::error;

/// Lets writes that wait go at a rate, from a thread of its own, until it ends or is dropped. After the thread has
/// ended for any reason, all writes go on.
pub(crate) struct WriteFaultHandler {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The progress of a stun while it was in force.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// The stun has been in force for this long.
    pub in_force: Duration,
    /// This many pages of 4 KiB were let go in that time.
    pub released_pages: u64,
    /// This many pages would have been let go, had there always been enough writes.
    pub target_pages: f64,
}

struct Shared {
    /// This is notified when the order has changed.
    bell: OwnedFd,
    account: Mutex<Account>,
    released_pages: AtomicU64,
    /// These pages may be written without waiting: they were let go, and not protected since.
    open: PageSet,
}

/// The order to the thread, and since when it stands.
struct Account {
    order: Order,
    since: Instant,
    /// This is what was reported until then.
    before: Report,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// This many pages of 4 KiB per second are let go.
    Rate(u64),
    Open,
    End,
}

impl WriteFaultHandler {
    /// Starts a thread that lets writes to `memory` go of which `userfault` tells.
    ///
    /// # Errors
    ///
    /// Fails if the thread cannot be started.
    pub(crate) fn start(
        memory: Arc<VmmMapping>,
        userfault: Arc<Userfault>,
        pages_per_second: u64,
    ) -> io::Result<Self> {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let order = Order::Rate(pages_per_second);
        let account = Account { order, since: Instant::now(), before: Report::default() };
        let shared = Arc::new(Shared {
            bell,
            account: Mutex::new(account),
            released_pages: AtomicU64::new(0),
            open: PageSet::new(memory.ram().pages()),
        });
        let work = Work {
            shared: shared.clone(),
            memory,
            userfault,
            started: Instant::now(),
            bucket: TokenBucket::new(pages_per_second, Duration::ZERO),
            fault_around: FaultAround::default(),
            order,
            waiting: VecDeque::new(),
            due: None,
        };
        let thread = std::thread::Builder::new().name("stun".into()).spawn(|| work.run())?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Lets so many pages of 4 KiB go per second from now on.
    pub(crate) fn set_rate(&self, pages_per_second: u64) {
        self.shared.order(Order::Rate(pages_per_second));
    }

    /// Returns how many pages of 4 KiB are let go per second, if they do not all go.
    pub(crate) fn rate(&self) -> Option<u64> {
        match self.shared.account().order {
            Order::Rate(pages_per_second) => Some(pages_per_second),
            Order::Open | Order::End => None,
        }
    }

    /// Lets all go from now on, as soon as they come.
    pub(crate) fn open(&self) {
        self.shared.order(Order::Open);
    }

    /// Notes that writes to these pages wait again.
    pub(crate) fn protected(&self, pages: &PageSet) {
        pages.words(0..pages.pages()).for_each(|(word, bits)| self.shared.open.remove_word(word, bits));
    }

    /// Returns how the stun has gone so far.
    pub(crate) fn report(&self) -> Report {
        let report = self.shared.account().report();
        Report { released_pages: self.shared.released_pages.load(Ordering::Relaxed), ..report }
    }

    /// Ends the thread, and returns when it has ended.
    pub(crate) fn end(&self) {
        self.shared.order(Order::End);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic of the thread has been reported by its hook.
            let _ = thread.join();
        }
    }
}

impl Drop for WriteFaultHandler {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn account(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, order: Order) {
        let mut account = self.account();
        // Nothing follows the end.
        if account.order != order && account.order != Order::End {
            *account = Account { order, since: Instant::now(), before: account.report() };
            // An error would mean that the bell has been rung very often, and not been heard yet.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }
}

impl Account {
    /// Returns the report up to now.
    fn report(&self) -> Report {
        let Report { in_force, released_pages, target_pages } = self.before;
        let Order::Rate(rate) = self.order else { return self.before };
        let passed = self.since.elapsed();
        Report {
            in_force: in_force + passed,
            released_pages,
            target_pages: target_pages + rate as f64 * passed.as_secs_f64(),
        }
    }
}

/// The state of the thread.
struct Work {
    shared: Arc<Shared>,
    memory: Arc<VmmMapping>,
    userfault: Arc<Userfault>,
    /// The bucket's clock begins at this moment.
    started: Instant,
    bucket: TokenBucket,
    fault_around: FaultAround,
    order: Order,
    /// Writes wait for these addresses, each page once, in the order in which they came.
    waiting: VecDeque<u64>,
    /// This write goes next.
    due: Option<Due>,
}

/// The first write that waits, and the pages that go with it.
struct Due {
    addresses: Range<u64>,
    pages: Range<u64>,
    /// The write was made to wait this long.
    wait: Duration,
    at: Duration,
}

impl Work {
    fn run(mut self) {
        priority::raise();
        while self.order != Order::End {
            match self.turn() {
                Ok(()) => {}
                // The VMM has ended, and with it the threads that waited.
                Err(error) if is_gone(&error) => return,
                Err(error) => {
                    error!(%error, "cannot release a guest's writes one by one; all are let go");
                    return;
                }
            }
        }
    }

    /// Waits for something to do, and does it.
    fn turn(&mut self) -> io::Result<()> {
        let wait = self.due.as_ref().map(|due| due.at.saturating_sub(self.started.elapsed()));
        let wait = wait.and_then(|wait| Timespec::try_from(wait).ok());
        let mut ready =
            [PollFd::new(&self.shared.bell, PollFlags::IN), PollFd::new(&*self.userfault, PollFlags::IN)];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, wait.as_ref()))?;
        let [rung, told] = ready.map(|fd| !fd.revents().is_empty());
        if rung {
            self.hear()?;
        }
        if told {
            self.userfault.read(|fault| {
                if !self.waiting.contains(&fault.address) {
                    self.waiting.push_back(fault.address);
                }
            })?;
        }
        self.release()
    }

    /// Takes a new order.
    fn hear(&mut self) -> io::Result<()> {
        rustix::io::read(&self.shared.bell, &mut [0; 8])?;
        self.order = self.shared.account().order;
        match self.order {
            Order::Rate(rate) => self.bucket.set_rate(rate, self.started.elapsed()),
            Order::Open | Order::End => {
                self.bucket.open();
                self.due = None;
            }
        }
        Ok(())
    }

    /// Lets the write go that is due.
    fn release(&mut self) -> io::Result<()> {
        while let Some(&address) = self.waiting.front() {
            let now = self.started.elapsed();
            let due = match self.due.take() {
                Some(due) => due,
                None => self.next(address, now),
            };
            if due.at > now {
                self.due = Some(due);
                return Ok(());
            }
            self.waiting.retain(|address| !due.addresses.contains(address));
            let fresh = self.shared.open.insert_range(due.pages);
            self.userfault.write_protect(due.addresses, false)?;
            self.fault_around.on_release(due.wait, self.started.elapsed());
            if matches!(self.order, Order::Rate(_)) {
                self.shared.released_pages.fetch_add(fresh, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Returns what goes for a write to `address`, and when. Neighbours that are open already cost nothing.
    fn next(&mut self, address: u64, now: Duration) -> Due {
        let reach = match self.order {
            Order::Rate(_) => self.fault_around.on_write(now),
            // Each page more is one more to send, and the guest may be about to be paused.
            Order::Open | Order::End => 1,
        };
        let Some(page) = self.memory.page_at(address) else {
            // Nothing of the guest's.
            let addresses = address..address.saturating_add(PAGE_SIZE);
            return Due { addresses, pages: 0..0, wait: Duration::ZERO, at: now };
        };
        // It was waited for, so it was protected, even if that has not been reported yet.
        self.shared.open.remove_range(self.memory.whole(page..page + 1));
        let first = page - page % reach;
        let block = self.memory.whole(first..first + reach);
        let mut pieces = self.memory.pieces(block);
        let (addresses, pages) =
            pieces.find(|(addresses, _)| addresses.contains(&address)).expect("the page is in its block");
        let fresh = pages.clone().filter(|page| !self.shared.open.contains(*page)).count() as u64;
        let wait = self.bucket.take(fresh, now);
        Due { addresses, pages, wait, at: now + wait }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        for (addresses, _) in self.memory.pieces(0..self.memory.ram().pages()) {
            // It may be done already, or the VMM have ended.
            let _ = self.userfault.unregister(addresses);
        }
    }
}
