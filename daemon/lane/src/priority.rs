//! Threads on whose next step a guest's vCPU waits.

use std::sync::Once;

use tracing::debug;

/// The most favourable niceness, and the shortest turn that the kernel grants (in ns; from Linux 6.12):
/// who asks for short turns gets them soon.
const NICENESS: i32 = -20;
const TURN: u64 = 100_000;

/// Lets this thread run soon whenever it has something to do, as far as the daemon may
/// (`RLIMIT_NICE`, `CAP_SYS_NICE`): it does little each time, and a vCPU stands still until it is done.
///
/// It is no real-time thread: the kernel wakes such a one on the processor where it ran last, even if
/// another is idle, and it then waits for whatever that one is doing in the kernel.
pub fn raise() {
    static TOLD: Once = Once::new();
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        sched_flags: libc::SCHED_FLAG_RESET_ON_FORK as u64,
        sched_nice: NICENESS,
        sched_priority: 0,
        sched_runtime: TURN,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the attributes are of the type that the call reads, and as long as they say; the first 0
    // means this thread, the last one that there are no flags.
    let raised = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if raised != 0 {
        let error = std::io::Error::last_os_error();
        TOLD.call_once(|| debug!(%error, "threads that guests wait for have no priority (RLIMIT_NICE, LimitNICE= in its unit)"));
    }
}
