//! Signals to the programs of a lab.

use memlane_lab::LabProcess;
use rustix::process::{Pid, Signal, kill_process};

/// Sends a signal to a program, unless it has ended.
pub(crate) fn signal(process: &LabProcess, signal: Signal) {
    if let Some(pid) = Pid::from_raw(process.pid() as i32) {
        // Fails only if it has ended.
        let _ = kill_process(pid, signal);
    }
}
