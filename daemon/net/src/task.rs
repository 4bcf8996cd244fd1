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
//! A poll in whose midst the whole process was stopped (SIGSTOP, a debugger) is not judged. Where this host is a virtual
//! machine, time that its hypervisor took from a processor does not count either: the guest's kernel books it as neither.

use std::future::Future;
use std::ops::Range;

use tokio::task::{JoinHandle, JoinSet};

#[cfg(debug_assertions)]
mod watch;

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
        // What it waited for: the kernel tells at least root.
        if rustix::process::geteuid().is_root() {
            assert!(log.contains("nanosleep"), "{log}");
        }
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
