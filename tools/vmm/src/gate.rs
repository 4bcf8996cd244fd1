//! [`Gate`]: how all vCPU threads are brought to stand still, and let go.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What the threads of a guest are to do, and what they do.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    order: Order,
    threads: usize,
    standing: usize,
    failure: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Run,
    Stand,
    End,
}

impl Gate {
    /// A closed gate before `threads` threads, which come to it one by one.
    pub fn closed(threads: usize) -> Self {
        let state = State { order: Order::Stand, threads, standing: 0, failure: None };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// For a thread: whether it may run on without coming to the gate.
    pub fn is_open(&self) -> bool {
        self.lock().order == Order::Run
    }

    /// For a thread: stands still while the gate is closed. False if the thread must end.
    pub fn pass(&self) -> bool {
        let mut state = self.lock();
        state.standing += 1;
        self.changed.notify_all();
        while state.order == Order::Stand {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.standing -= 1;
        state.order == Order::Run
    }

    /// For a thread: sleeps until `deadline`, or until the gate is closed.
    pub fn sleep_until(&self, deadline: Instant) {
        let mut state = self.lock();
        while state.order == Order::Run {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// For a thread: runs `work`, which ends because of a failure if it says so, or panics. After
    /// that nobody waits for the thread any more.
    pub fn leave_after(&self, work: impl FnOnce() -> Option<String>) {
        let result = catch_unwind(AssertUnwindSafe(work));
        let mut state = self.lock();
        state.threads -= 1;
        let failure = result.unwrap_or_else(|_| Some("a vCPU's thread panicked".into()));
        state.failure = state.failure.take().or(failure);
        self.changed.notify_all();
    }

    /// Closes the gate and waits until all threads stand before it. `kick` makes them look;
    /// it is called after the gate is closed.
    pub fn close(&self, kick: impl Fn()) -> Result<(), String> {
        let mut state = self.lock();
        state.order = Order::Stand;
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
    pub fn open(&self) -> Result<(), String> {
        let mut state = self.lock();
        state.check()?;
        state.order = Order::Run;
        self.changed.notify_all();
        Ok(())
    }

    /// Makes all threads end, which the caller joins.
    pub fn end(&self, kick: impl Fn()) {
        self.lock().order = Order::End;
        self.changed.notify_all();
        kick();
    }

    /// Waits for a thread to fail, at most `patience`.
    pub fn failure(&self, patience: Duration) -> Option<String> {
        let state = self.lock();
        let fine = |state: &mut State| state.failure.is_none();
        let (state, _) =
            self.changed.wait_timeout_while(state, patience, fine).unwrap_or_else(PoisonError::into_inner);
        state.failure.clone()
    }

    /// The state is whole between any two statements, so that a panic elsewhere leaves it usable.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn check(&self) -> Result<(), String> {
        self.failure.clone().map_or(Ok(()), Err)
    }
}
