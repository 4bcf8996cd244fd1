//! The priority of threads that a guest's vCPU waits for.

use std::sync::Once;

use tracing::debug;

/// This is the most favourable niceness.
const NICENESS: i32 = -20;
/// This is the shortest time slice that the kernel grants, in nanoseconds (from Linux 6.12). A thread that asks for
/// short slices gets them soon.
const TURN: u64 = 100_000;

/// Lets the calling thread run soon whenever it has something to do, as far as the daemon is allowed to
/// (`RLIMIT_NICE`, `CAP_SYS_NICE`). Such a thread does little each time, and a vCPU waits until that is done.
///
/// The thread does not become a real-time thread: the kernel wakes a real-time thread on the processor where it ran
/// last, even if another one is idle, and the thread then waits until that processor leaves the kernel.
pub fn raise() {
    static WARNED: Once = Once::new();
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
        WARNED.call_once(|| debug!(%error, "cannot raise the priority of the threads that guests in post-copy wait for; set LimitNICE= in memlaned.service"));
    }
}
