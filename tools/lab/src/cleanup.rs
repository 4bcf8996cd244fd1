//! Actions that must be undone, whether their guard is dropped or a signal ends the process.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

type Action = Box<dyn FnOnce() + Send>;

/// The actions that are still to be run, in the order of registration.
static PENDING: Mutex<BTreeMap<u64, Action>> = Mutex::new(BTreeMap::new());

/// Makes SIGINT, SIGTERM and SIGHUP remove all labs and give back all huge pages of this process, and then end
/// it as the signal would have. Call it once, first thing in `main`.
///
/// # Errors
///
/// If the handlers cannot be installed.
pub fn cleanup_on_signal() -> io::Result<()> {
    on_signals(None)
}

/// Makes the first of SIGINT, SIGTERM and SIGHUP set the flag that is returned, so that the program can end by itself; another
/// one does what [`cleanup_on_signal`] does. Call only one of them.
///
/// # Errors
///
/// If the handlers cannot be installed.
pub fn flag_on_signal() -> io::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    on_signals(Some(Arc::clone(&flag)))?;
    Ok(flag)
}

fn on_signals(first: Option<Arc<AtomicBool>>) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::Builder::new().name("cleanup".into()).spawn(move || {
        let mut signals = signals.forever();
        if let Some(flag) = first
            && signals.next().is_some()
        {
            flag.store(true, Ordering::Relaxed);
        }
        if let Some(signal) = signals.next() {
            run_all();
            // Returns only for a signal without a default action, which none of these is.
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    })?;
    Ok(())
}

/// A guard that runs its action when it is dropped, or earlier if a signal ends the process.
#[derive(Debug)]
pub(crate) struct Registration(u64);

impl Registration {
    pub(crate) fn new(action: impl FnOnce() + Send + 'static) -> Self {
        let mut pending = lock();
        let key = pending.last_key_value().map_or(0, |(last, _)| last + 1);
        pending.insert(key, Box::new(action));
        Self(key)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // Out of the lock before it runs: an action takes time, and other labs should not wait for it.
        let action = lock().remove(&self.0);
        if let Some(action) = action {
            action();
        }
    }
}

fn run_all() {
    // Holds the lock to the end, so that no other thread makes a new lab meanwhile.
    let mut pending = lock();
    while let Some((_, action)) = pending.pop_last() {
        action();
    }
    std::mem::forget(pending);
}

fn lock() -> MutexGuard<'static, BTreeMap<u64, Action>> {
    // Actions never run under the lock of a live process, so a poisoned map is a whole one.
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}
