//! Programs that a lab runs.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde_json::json;

use crate::child::{spawn_from_lasting_thread, tail};
use crate::remote::{Remote, RemoteProcess};

/// The time between two looks at a program on another host.
const LOOK: Duration = Duration::from_millis(20);
/// A running program. Dropping it kills the program and waits for its end.
#[derive(Debug)]
pub struct LabProcess {
    name: String,
    at: ProcessPlace,
    log: PathBuf,
}

#[derive(Debug)]
enum ProcessPlace {
    Here { child: Child, pidfd: OwnedFd },
    There(RemoteProcess),
}

impl LabProcess {
    pub(crate) fn spawn(name: &str, mut command: Command, log: PathBuf) -> Result<Self> {
        let output = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("opening the log {}", log.display()))?;
        let errors = output.try_clone().context("duplicating a descriptor")?;
        // A group of its own: Ctrl-C shall reach the harness, which then ends the programs in its own order.
        command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0);
        let program = command.get_program().to_owned();
        let child =
            spawn_from_lasting_thread(command).with_context(|| format!("running {}", program.display()))?;
        // Unreaped, so the ID is still this child's.
        let pidfd = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
            .context("opening a pidfd")?;
        Ok(Self { name: name.to_owned(), at: ProcessPlace::Here { child, pidfd }, log })
    }

    /// Starts `command` on a host that is reached over ssh.
    pub(crate) fn spawn_there(name: &str, command: &Command, host: &Arc<Remote>) -> Result<Self> {
        let text = |word: &OsStr| word.to_str().map(str::to_owned).context("a word that is no UTF-8");
        let arguments = command.get_args().map(text).collect::<Result<Vec<_>>>()?;
        let program = text(command.get_program())?;
        let order = json!({ "name": name, "program": program, "arguments": arguments });
        let pid = host.ask("start", order)?.as_u64().and_then(|pid| u32::try_from(pid).ok());
        let started =
            RemoteProcess { host: Arc::clone(host), pid: pid.context("an agent that tells no process")? };
        let log = host.directory().join(format!("{name}.log"));
        Ok(Self { name: name.to_owned(), at: ProcessPlace::There(started), log })
    }

    /// Returns the name that the process was started under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the process ID, as it is on the program's host.
    pub fn pid(&self) -> u32 {
        match &self.at {
            ProcessPlace::Here { child, .. } => child.id(),
            ProcessPlace::There(started) => started.pid,
        }
    }

    /// Returns whether the program still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.status(), Ok(None))
    }

    /// Sends SIGKILL and waits for the end, as in a crash. It does nothing if the process has ended.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn kill(&mut self) -> io::Result<ExitStatus> {
        match &mut self.at {
            ProcessPlace::Here { child, .. } => {
                child.kill()?;
                child.wait()
            }
            ProcessPlace::There(started) => {
                started.signal("kill").and_then(|()| started.status()).map_err(io::Error::other)?.ok_or_else(
                    || io::Error::other("the host's agent says that a process runs which it has killed"),
                )
            }
        }
    }

    /// Sends SIGTERM, and does not wait. It does nothing if the process has ended.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn terminate(&mut self) -> io::Result<()> {
        match &self.at {
            ProcessPlace::Here { pidfd, .. } => match rustix::process::pidfd_send_signal(pidfd, Signal::TERM)
            {
                Err(Errno::SRCH) => Ok(()),
                result => Ok(result?),
            },
            ProcessPlace::There(started) => started.signal("terminate").map_err(io::Error::other),
        }
    }

    /// Waits for the end; returns `None` if the process still runs after `timeout`.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn wait_timeout(&mut self, timeout: Duration) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.status()? {
                return Ok(Some(status));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let ProcessPlace::Here { pidfd, .. } = &self.at else {
                std::thread::sleep(left.min(LOOK));
                continue;
            };
            // A pidfd becomes readable when its process ends.
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Returns the exit status, if the program has ended.
    fn status(&mut self) -> io::Result<Option<ExitStatus>> {
        match &mut self.at {
            ProcessPlace::Here { child, .. } => child.try_wait(),
            ProcessPlace::There(started) => started.status().map_err(io::Error::other),
        }
    }

    /// Returns the file on the program's host that holds its output to stdout and stderr.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Returns the last 4 KiB of the log, in whole lines, for error messages.
    pub fn log_tail(&self) -> String {
        let tail = match &self.at {
            ProcessPlace::Here { .. } => tail(&self.log).map_err(anyhow::Error::from),
            ProcessPlace::There(started) => started.log_tail(&self.name),
        };
        tail.unwrap_or_else(|error| format!("(cannot read {}: {error})", self.log.display()))
    }
}

impl Drop for LabProcess {
    fn drop(&mut self) {
        // Fails only if the process has ended.
        let _ = self.kill();
    }
}
