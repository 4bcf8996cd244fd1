//! Looks from outside at a thread whose poll takes long: only so can be told what it waits for.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// The sampler looks this often at each thread. A poll that is too long is so seen at least once.
const INTERVAL: Duration = Duration::from_millis(super::LONGEST_MS / 2);

/// A thread that polls tasks.
struct Thread {
    /// Where the kernel tells of it.
    directory: String,
    /// When the present poll began, in nanoseconds since [`START`]; 0 outside of polls.
    polls_since: AtomicU64,
    /// The poll that was looked at last, and what was seen.
    seen: Mutex<(u64, String)>,
}

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

static THREADS: LazyLock<Mutex<Vec<Weak<Thread>>>> = LazyLock::new(|| {
    // Without it, the log tells how long a poll took, and no more.
    let _ = std::thread::Builder::new().name("sampler".into()).spawn(look);
    Mutex::default()
});

thread_local! {
    static THREAD: Arc<Thread> = {
        let thread = Arc::new(Thread {
            directory: format!("/proc/self/task/{}", rustix::thread::gettid().as_raw_nonzero()),
            polls_since: AtomicU64::new(0),
            seen: Mutex::default(),
        });
        THREADS.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&thread));
        thread
    };
}

/// A poll of this thread that the sampler may look at.
pub(super) struct Sampled {
    since: u64,
    /// The poll within which this one is; 0 for none.
    within: u64,
}

impl Sampled {
    /// Tells the sampler that a poll begins.
    pub(super) fn begin() -> Self {
        let since = nanoseconds();
        let within = THREAD.with(|thread| thread.polls_since.swap(since, Ordering::Relaxed));
        Self { since, within }
    }

    /// Tells the sampler that the poll is over, and returns what it has seen: the thread's state, and the call into the
    /// kernel and the place there at which it stood. Empty for a short poll.
    pub(super) fn end(self) -> String {
        THREAD.with(|thread| {
            thread.polls_since.store(self.within, Ordering::Relaxed);
            if nanoseconds() - self.since < INTERVAL.as_nanos() as u64 {
                return String::new();
            }
            let seen = thread.seen.lock().unwrap_or_else(PoisonError::into_inner);
            if seen.0 == self.since { seen.1.clone() } else { String::new() }
        })
    }
}

/// Looks at every thread again and again, as long as the process lives.
fn look() {
    loop {
        std::thread::sleep(INTERVAL);
        let mut threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| thread.strong_count() > 0);
        for thread in threads.iter().filter_map(Weak::upgrade) {
            let since = thread.polls_since.load(Ordering::Relaxed);
            if since != 0 && nanoseconds().saturating_sub(since) > INTERVAL.as_nanos() as u64 {
                let seen = thread.look();
                *thread.seen.lock().unwrap_or_else(PoisonError::into_inner) = (since, seen);
            }
        }
    }
}

impl Thread {
    /// Returns what the kernel tells of this thread (proc_pid_stat(5), proc_pid_syscall(5), proc_pid_stack(5)).
    fn look(&self) -> String {
        let read = |name| fs::read_to_string(format!("{}/{name}", self.directory)).unwrap_or_default();
        let stat = read("stat");
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('?');
        let (call, stack) = (read("syscall"), read("stack"));
        let call = call.split(' ').next().unwrap_or("?").trim_end();
        let places = stack.lines().filter_map(|line| line.split(' ').next_back()?.split('+').next());
        let stack: Vec<_> = places.take(8).collect();
        format!("{state}, call {call}, {}", stack.join(" < "))
    }
}

fn nanoseconds() -> u64 {
    START.elapsed().as_nanos() as u64
}
