//! [`Gate`]: how all vCPU threads are stopped and released.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The gate at which the threads of a guest stop. It holds what they are to do, and what they do.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug)]
struct GateState {
    order: GateOrder,
    threads: usize,
    standing: usize,
    failure: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GateOrder {
    Run,
    Stand,
    End,
}

impl Gate {
    /// Makes a closed gate for `threads` threads, which come to it one by one.
    pub(crate) fn closed(threads: usize) -> Self {
        let state = GateState { order: GateOrder::Stand, threads, standing: 0, failure: None };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Returns whether a thread may run on without coming to the gate. Threads of the guest call this.
    pub(crate) fn is_open(&self) -> bool {
        self.lock().order == GateOrder::Run
    }

    /// Waits while the gate is closed; returns false if the thread must end. Threads of the guest call this.
    pub(crate) fn pass(&self) -> bool {
        let mut state = self.lock();
        state.standing += 1;
        self.changed.notify_all();
        while state.order == GateOrder::Stand {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.standing -= 1;
        state.order == GateOrder::Run
    }

    /// Sleeps until `deadline`, or until the gate is closed. Threads of the guest call this.
    pub(crate) fn sleep_until(&self, deadline: Instant) {
        let mut state = self.lock();
        while state.order == GateOrder::Run {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Runs `work`, which returns a failure or panics if it fails, and then leaves the gate for good: the thread is not
    /// waited for any more. Threads of the guest call this.
    pub(crate) fn leave_after(&self, work: impl FnOnce() -> Option<String>) {
        let result = catch_unwind(AssertUnwindSafe(work));
        let mut state = self.lock();
        state.threads -= 1;
        let failure = result.unwrap_or_else(|_| Some("a vCPU's thread panicked".into()));
        state.failure = state.failure.take().or(failure);
        self.changed.notify_all();
    }

    /// Closes the gate and waits until all threads stand before it. `kick` makes them look;
    /// it is called after the gate is closed.
    pub(crate) fn close(&self, kick: impl Fn()) -> Result<(), String> {
        let mut state = self.lock();
        state.order = GateOrder::Stand;
        self.changed.notify_all();
        drop(state);
        kick();
        state = self.lock();
        while state.standing < state.threads {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.check()
    }

    /// Opens the gate.
    pub(crate) fn open(&self) -> Result<(), String> {
        let mut state = self.lock();
        state.check()?;
        state.order = GateOrder::Run;
        self.changed.notify_all();
        Ok(())
    }

    /// Makes all threads end, which the caller joins.
    pub(crate) fn end(&self, kick: impl Fn()) {
        self.lock().order = GateOrder::End;
        self.changed.notify_all();
        kick();
    }

    /// Waits for a thread to fail, at most `patience`.
    pub(crate) fn failure(&self, patience: Duration) -> Option<String> {
        let state = self.lock();
        let fine = |state: &mut GateState| state.failure.is_none();
        let (state, _) =
            self.changed.wait_timeout_while(state, patience, fine).unwrap_or_else(PoisonError::into_inner);
        state.failure.clone()
    }

    /// Locks the state. It is whole between any two statements, so that a panic elsewhere leaves it usable.
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GateState {
    fn check(&self) -> Result<(), String> {
        self.failure.clone().map_or(Ok(()), Err)
    }
}
