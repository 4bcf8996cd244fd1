//! A process that went to the background by itself.

use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A process that is nobody's child, such as a QEMU after `-daemonize`. It is killed when this is dropped, unless it has
/// ended by then; no other process is, which may have its number.
#[derive(Debug)]
pub struct BackgroundProcess {
    pid: u32,
    handle: OwnedFd,
}

impl BackgroundProcess {
    /// Finds the process whose number it has written into a file (`-pidfile`).
    ///
    /// # Errors
    ///
    /// If the file has no number of a process in it.
    pub fn of_pid_file(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        let pid: i32 =
            text.trim().parse().with_context(|| format!("{} has no number in it", file.display()))?;
        let number = Pid::from_raw(pid).context("no process has the number 0")?;
        let handle =
            pidfd_open(number, PidfdFlags::empty()).with_context(|| format!("finding process {pid}"))?;
        Ok(Self { pid: pid.unsigned_abs(), handle })
    }

    /// Returns the number of the process.
    pub fn pid(&self) -> u32 {
        self.pid
    }
}

impl Drop for BackgroundProcess {
    fn drop(&mut self) {
        // It may have ended.
        let _ = pidfd_send_signal(&self.handle, Signal::KILL);
    }
}
