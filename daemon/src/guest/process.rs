//! The process of a VMM: a connection may be lost and made again, a process ends for good.

use std::future::pending;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;

use crate::journal::VmmIdentity;

/// A VMM's process.
pub struct Process {
    identity: VmmIdentity,
    /// None once it has ended.
    pidfd: Option<AsyncFd<OwnedFd>>,
}

impl Process {
    /// The process of this number that runs now.
    pub fn running(pid: u32) -> Self {
        // In this order: the descriptor stays with the process whose start is read.
        let pidfd = open(pid);
        Self { identity: VmmIdentity { pid, started: started(pid).unwrap_or(0) }, pidfd }
    }

    /// The process that was written down, if it still runs.
    pub fn remembered(identity: VmmIdentity) -> Self {
        let pidfd = open(identity.pid);
        let same = started(identity.pid) == Some(identity.started);
        Self { identity, pidfd: pidfd.filter(|_| same) }
    }

    /// Which process it is, or was.
    pub fn identity(&self) -> VmmIdentity {
        self.identity
    }

    /// Kills it, if it runs.
    pub fn kill(&self) {
        if let Some(pidfd) = &self.pidfd {
            // It may have ended meanwhile.
            let _ = pidfd_send_signal(pidfd.get_ref(), Signal::KILL);
        }
    }

    /// Returns once it has ended.
    pub async fn ended(&self) {
        let Some(pidfd) = &self.pidfd else { return };
        // Readable from its end on.
        if pidfd.readable().await.is_err() {
            pending::<()>().await;
        }
    }
}

fn open(pid: u32) -> Option<AsyncFd<OwnedFd>> {
    let pid = Pid::from_raw(pid.try_into().ok()?)?;
    let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK).ok()?;
    // SAFETY: the descriptor is owned by the value, and never replaced or closed under it.
    unsafe { AsyncFd::register(pidfd) }.ok()
}

/// When a process started, in clock ticks since boot: field 22 of `/proc/PID/stat`.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name, field 2, may hold anything, and ends with the last parenthesis.
    stat[stat.rfind(')')? + 2..].split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_known_until_it_ends() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
            let process = Process::running(child.id());
            assert_ne!(process.identity().started, 0);
            let again = Process::remembered(process.identity());
            let soon = std::time::Duration::from_millis(1);
            assert!(tokio::time::timeout(soon, again.ended()).await.is_err());
            let other = VmmIdentity { started: 1, ..process.identity() };
            Process::remembered(other).ended().await;
            child.kill().unwrap();
            process.ended().await;
            again.ended().await;
            child.wait().unwrap();
            Process::running(child.id()).ended().await;
        });
    }
}
