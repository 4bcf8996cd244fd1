//! This module runs the tasks of the control thread, and watches how long each of them keeps the thread.
//!
//! All of the control plane is one thread: while a task computes or waits in the kernel, no ping is answered and no
//! guest's pause goes on. So in debug builds and tests each poll of a task is measured, and one that takes longer than
//! [`LONGEST_MS`] is logged with the task's name. The daemon's start and end are no tasks, because no request waits for
//! anything then. Release builds measure nothing.
//!
//! The time of a poll counts without the part in which the thread could have run and others had the processor
//! (`run_delay` of `/proc/PID/task/TID/schedstat`): a busy host delays every thread, and that tells nothing about this
//! one. What is left is what the task has computed, or waited for in the kernel. On a busy host the thread that holds a
//! kernel lock may have no processor itself, or the disk is busy with reading the program: while this thread has to
//! wait for a processor again and again, or the kernel tells that many threads do, the limit is [`LONGEST_WHERE_BUSY_MS`].
//! A poll in whose midst the whole process was stopped (SIGSTOP, a debugger) is not judged.

use std::future::Future;
use std::ops::Range;

use tokio::task::{JoinHandle, JoinSet};

/// A poll may keep the control thread for this many milliseconds.
pub const LONGEST_MS: u64 = 20;
/// A poll may take this many milliseconds where processors are short.
pub const LONGEST_WHERE_BUSY_MS: u64 = 500;

/// Runs a task on this thread beside the others. The name tells the log what the task is for.
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    tokio::task::spawn_local(watched(name, future))
}

/// Runs `work` on another thread, because it computes long or waits in the kernel. Other tasks of this thread go on
/// meanwhile.
///
/// The work is done to its end, even if the caller stops waiting for it.
pub async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only the end of all tasks cancels it.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Has `work` deal with the pages `0..pages` of a guest piece by piece, and lets other tasks run in between.
pub async fn in_pieces(pages: u64, mut work: impl FnMut(Range<u64>)) {
    /// This many pages take a millisecond or two, if a set that holds them all is read by words.
    const PIECE: u64 = 1 << 20;
    for first in (0..pages).step_by(PIECE as usize) {
        work(first..pages.min(first + PIECE));
        if first + PIECE < pages {
            tokio::task::yield_now().await;
        }
    }
}

/// Does the same as [`spawn`], for a task that is one of a set.
pub fn spawn_in<F>(set: &mut JoinSet<F::Output>, name: &'static str, future: F)
where
    F: Future + 'static,
    F::Output: 'static,
{
    set.spawn_local(watched(name, future));
}

/// Returns the future, which is watched in debug builds.
#[cfg(not(debug_assertions))]
fn watched<F: Future>(_name: &'static str, future: F) -> F {
    future
}

#[cfg(debug_assertions)]
use watch::watched;

#[cfg(debug_assertions)]
mod watch {
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
        computed: Duration,
        faults: u64,
    }

    impl Started {
        fn now() -> Self {
            CONTINUED.store(false, Ordering::Relaxed);
            Self { at: Instant::now(), delayed: delayed(), computed: computed(), faults: major_faults() }
        }

        fn end(self, task: &'static str) {
            let (took, busy) = (self.at.elapsed(), Busy::look(self.delayed));
            let longest = Duration::from_millis(super::LONGEST_MS);
            if took <= longest || CONTINUED.load(Ordering::Relaxed) {
                return;
            }
            let blocked = took.saturating_sub(delayed().saturating_sub(self.delayed));
            let computed = computed().saturating_sub(self.computed);
            let busy = busy || processors_are_short();
            let most = if busy { Duration::from_millis(super::LONGEST_WHERE_BUSY_MS) } else { longest };
            if blocked > most {
                let millis = blocked.as_millis();
                let major_faults = major_faults() - self.faults;
                warn!(
                    ?took,
                    ?computed,
                    major_faults,
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
        let mut text = [0; 128];
        let read = |file: &Option<File>| file.as_ref()?.read_at(&mut text, 0).ok();
        let length = STATISTICS.with(read).unwrap_or(0);
        let delay = std::str::from_utf8(&text[..length]).ok().and_then(|text| text.split(' ').nth(1));
        Duration::from_nanos(delay.and_then(|delay| delay.parse().ok()).unwrap_or(0))
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
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    use super::*;

    /// What is logged while a task does this, on a thread of its own.
    fn logged(work: impl FnOnce() + Send + 'static) -> String {
        #[derive(Clone, Default)]
        struct Log(Arc<Mutex<Vec<u8>>>);
        impl io::Write for Log {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let log = Log::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        let control = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let task = async { spawn("the task", async move { work() }).await.unwrap() };
            tracing::subscriber::with_default(subscriber, || {
                runtime.block_on(tokio::task::LocalSet::new().run_until(task))
            });
        });
        control.join().unwrap();
        let log = log.0.lock().unwrap();
        String::from_utf8(log.clone()).unwrap()
    }

    #[test]
    fn a_task_that_keeps_the_thread_is_told() {
        assert_eq!(logged(|| ()), "");
        // Long even for a busy host.
        let log = logged(|| std::thread::sleep(Duration::from_millis(550)));
        assert!(log.contains("the control thread stood still for ") && log.contains("in the task"), "{log}");
    }

    #[test]
    fn waiting_for_a_processor_is_not_told() {
        let busy = Arc::new(AtomicBool::new(true));
        let all = sched_getaffinity(None).unwrap();
        let mut one = CpuSet::new();
        one.set((0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)).unwrap());
        let others: Vec<_> = (0..12)
            .map(|_| {
                let busy = busy.clone();
                std::thread::spawn(move || {
                    sched_setaffinity(None, &one).unwrap();
                    while busy.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                })
            })
            .collect();
        let log = logged(move || {
            sched_setaffinity(None, &one).unwrap();
            let started = Instant::now();
            while started.elapsed() < Duration::from_millis(80) {
                std::hint::spin_loop();
            }
        });
        busy.store(false, Ordering::Relaxed);
        others.into_iter().for_each(|other| other.join().unwrap());
        assert_eq!(log, "");
    }
}
