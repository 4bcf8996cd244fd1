//! Threads on whose next step a guest's vCPU waits.

use std::sync::Once;

use tracing::debug;

/// Lets this thread run before others whenever it has something to do, as far as the daemon may
/// (`CAP_SYS_NICE`): it does little each time, and a vCPU stands still until it is done.
pub fn raise() {
    static TOLD: Once = Once::new();
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameters are of the type that the call reads; 0 means this thread.
    let raised =
        unsafe { libc::sched_setscheduler(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &parameters) };
    if raised != 0 {
        let error = std::io::Error::last_os_error();
        TOLD.call_once(|| debug!(%error, "threads that guests wait for have no priority (CAP_SYS_NICE)"));
    }
}
