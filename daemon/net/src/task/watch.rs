//! The watch over the polls of tasks, in debug builds.

use std::cell::Cell;
use std::fs::File;
use std::future::Future;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tracing::warn;

use super::{LONGEST_MS, LONGEST_WHERE_BUSY_MS};

mod sampler;

use sampler::Sampled;

/// This is set when the process goes on after it was stopped.
static CONTINUED: LazyLock<Arc<AtomicBool>> = LazyLock::new(|| {
    let continued = Arc::<AtomicBool>::default();
    // Without it, a poll in whose midst the process was stopped is taken for a long one.
    let _ = signal_hook::flag::register(libc::SIGCONT, continued.clone());
    continued
});

/// Returns the future with a watch over its polls.
pub(super) fn watched<F: Future>(name: &'static str, future: F) -> Watched<F> {
    Watched { name, future: Some(Box::pin(future)) }
}

/// A future whose polls, and whose end, are measured.
pub(super) struct Watched<F> {
    name: &'static str,
    /// This is `None` once the future is done.
    future: Option<Pin<Box<F>>>,
}

impl<F: Future> Future for Watched<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let started = Started::now();
        let future = self.future.as_mut().expect("a future that is done is not polled");
        let polled = future.as_mut().poll(context);
        if polled.is_ready() {
            // What it holds may take as long to let go of as it took to get.
            self.future = None;
        }
        started.end(self.name);
        polled
    }
}

impl<F> Drop for Watched<F> {
    fn drop(&mut self) {
        if let Some(future) = self.future.take() {
            let started = Started::now();
            drop(future);
            started.end(self.name);
        }
    }
}

/// The moment at which a poll began.
struct Started {
    at: Instant,
    delayed: Duration,
    stolen: Duration,
    computed: Duration,
    faults: u64,
    sampled: Sampled,
}

impl Started {
    fn now() -> Self {
        CONTINUED.store(false, Ordering::Relaxed);
        Self {
            at: Instant::now(),
            delayed: delayed(),
            stolen: stolen(),
            computed: computed(),
            faults: major_faults(),
            sampled: Sampled::begin(),
        }
    }

    fn end(self, task: &'static str) {
        let (took, busy) = (self.at.elapsed(), Busy::look(self.delayed));
        let seen = self.sampled.end();
        let longest = Duration::from_millis(LONGEST_MS);
        if took <= longest || CONTINUED.load(Ordering::Relaxed) {
            return;
        }
        let computed = computed().saturating_sub(self.computed);
        let others = delayed().saturating_sub(self.delayed);
        let busy = busy || processors_are_short();
        let most = if busy { Duration::from_millis(LONGEST_WHERE_BUSY_MS) } else { longest };
        if took.saturating_sub(others) <= most {
            return;
        }
        // The kernel books what was stolen at its next tick.
        std::thread::sleep(TICK);
        let blocked = took.saturating_sub(others + stolen().saturating_sub(self.stolen));
        if blocked > most {
            let millis = blocked.as_millis();
            let major_faults = major_faults() - self.faults;
            warn!(
                ?took,
                ?computed,
                major_faults,
                seen,
                "the control thread stood still for {millis} ms in {task}"
            );
        }
    }
}

/// Tells whether this thread has had to wait for a processor lately.
#[derive(Clone, Copy)]
struct Busy {
    /// This is when the present second began, and how long the thread had waited in all by then.
    since: Instant,
    delayed: Duration,
    /// This is how long the thread waited in the second before.
    before: Duration,
}

impl Busy {
    /// More waiting than this within two seconds is a sign of a busy host.
    const SIGN: Duration = Duration::from_millis(10);

    fn look(delayed: Duration) -> bool {
        thread_local! {
            static LATELY: Cell<Busy> = Cell::new(Busy {
                since: Instant::now(),
                delayed: Duration::ZERO,
                before: Duration::ZERO,
            });
        }
        let mut busy = LATELY.get();
        let here = delayed.saturating_sub(busy.delayed);
        let sign = busy.before + here > Self::SIGN;
        if busy.since.elapsed() > Duration::from_secs(1) {
            busy = Self { since: Instant::now(), delayed, before: here };
            LATELY.set(busy);
        }
        sign
    }
}

/// Whether threads of this host have waited for a processor in more than a quarter of the last ten
/// seconds, as the kernel counts it (PSI, `Documentation/accounting/psi.rst`); false where it does not.
fn processors_are_short() -> bool {
    const QUARTER: f64 = 25.0;
    let text = std::fs::read_to_string("/proc/pressure/cpu").unwrap_or_default();
    let average = text.lines().find_map(|line| line.strip_prefix("some avg10=")?.split(' ').next());
    average.and_then(|average| average.parse::<f64>().ok()).is_some_and(|average| average > QUARTER)
}

/// Returns how long this thread has waited for a processor in all.
fn delayed() -> Duration {
    thread_local! {
        static STATISTICS: Option<File> = File::open("/proc/thread-self/schedstat").ok();
    }
    let delay = STATISTICS.with(|file| field(file.as_ref()?, 1));
    Duration::from_nanos(delay.unwrap_or(0))
}

/// The kernel counts the time of processors in units of this (`USER_HZ`).
const TICK: Duration = Duration::from_millis(10);

/// Returns for how long the hypervisor has given this host's processors to others, in all (`steal` of proc_stat(5)).
fn stolen() -> Duration {
    thread_local! {
        static STATISTICS: Option<File> = File::open("/proc/stat").ok();
    }
    let steal = STATISTICS.with(|file| field(file.as_ref()?, 8));
    TICK * steal.and_then(|steal| steal.try_into().ok()).unwrap_or(0)
}

/// Returns a number of the first line of a file of the kernel's statistics.
fn field(file: &File, index: usize) -> Option<u64> {
    let mut bytes = [0; 256];
    let length = file.read_at(&mut bytes, 0).ok()?;
    let text = std::str::from_utf8(&bytes[..length]).ok()?;
    text.lines().next()?.split_ascii_whitespace().nth(index)?.parse().ok()
}

/// Returns how often this thread has waited for a disk to touch memory, in all (getrusage(2)).
fn major_faults() -> u64 {
    // SAFETY: any bytes are a `rusage`, and the kernel writes no more than one.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage);
        usage
    };
    usage.ru_majflt.try_into().unwrap_or(0)
}

/// Returns how long this thread has had a processor in all.
fn computed() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}
