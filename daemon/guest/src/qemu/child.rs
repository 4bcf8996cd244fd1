//! A process that the daemon has started has to be collected when it has ended.

use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use tracing::{debug, warn};

/// A process that was told to end, or has ended, is waited for this long.
pub(super) const ENDING: Duration = Duration::from_secs(20);
/// A process that is about to end is looked at in these intervals.
const LOOK: Duration = Duration::from_millis(5);

/// Waits for a process that has ended, or is about to, for at most 20 seconds. It must be called on a thread that has
/// nothing else to do.
pub(super) fn collect(child: &mut Child) -> Option<ExitStatus> {
    let until = Instant::now() + ENDING;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < until => std::thread::sleep(LOOK),
            Ok(None) => {
                warn!(pid = child.id(), "a process does not end; it is killed, and not waited for any more");
                let _ = child.kill();
                return None;
            }
            Err(error) => {
                debug!(pid = child.id(), %error, "cannot wait for a process");
                return None;
            }
        }
    }
}
