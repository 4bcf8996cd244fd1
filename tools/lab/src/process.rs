//! Programs that a lab runs.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, LazyLock, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde_json::json;

use crate::remote::{Remote, Started};

/// How often a program on another host is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// The most that [`Process::log_tail`] returns.
const LOG_TAIL_BYTES: u64 = 4096;

/// A running program. Dropping it kills the program and waits for its end.
#[derive(Debug)]
pub struct Process {
    name: String,
    at: Place,
    log: PathBuf,
}

#[derive(Debug)]
enum Place {
    Here { child: Child, pidfd: OwnedFd },
    There(Started),
}

impl Process {
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
        let pidfd =
            rustix::process::pidfd_open(pid_of(&child), PidfdFlags::empty()).context("opening a pidfd")?;
        Ok(Self { name: name.to_owned(), at: Place::Here { child, pidfd }, log })
    }

    /// Starts `command` on a host that is reached over ssh.
    pub(crate) fn spawn_there(name: &str, command: &Command, host: &Arc<Remote>) -> Result<Self> {
        let text = |word: &OsStr| word.to_str().map(str::to_owned).context("a word that is no UTF-8");
        let arguments = command.get_args().map(text).collect::<Result<Vec<_>>>()?;
        let program = text(command.get_program())?;
        let order = json!({ "name": name, "program": program, "arguments": arguments });
        let pid = host.ask("start", order)?.as_u64().and_then(|pid| u32::try_from(pid).ok());
        let started = Started { host: Arc::clone(host), pid: pid.context("an agent that tells no process")? };
        let log = host.directory().join(format!("{name}.log"));
        Ok(Self { name: name.to_owned(), at: Place::There(started), log })
    }

    /// The name that the process was started under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process ID, on its host.
    pub fn pid(&self) -> u32 {
        match &self.at {
            Place::Here { child, .. } => child.id(),
            Place::There(started) => started.pid,
        }
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.status(), Ok(None))
    }

    /// Sends SIGKILL and waits for the end, as in a crash. Does nothing if the process has ended.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn kill(&mut self) -> io::Result<ExitStatus> {
        match &mut self.at {
            Place::Here { child, .. } => {
                child.kill()?;
                child.wait()
            }
            Place::There(started) => {
                started.signal("kill").and_then(|()| started.status()).map_err(io::Error::other)?.ok_or_else(
                    || io::Error::other("the host's agent says that a process runs which it has killed"),
                )
            }
        }
    }

    /// Sends SIGTERM, and does not wait. Does nothing if the process has ended.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn terminate(&mut self) -> io::Result<()> {
        match &self.at {
            Place::Here { pidfd, .. } => match rustix::process::pidfd_send_signal(pidfd, Signal::TERM) {
                Err(Errno::SRCH) => Ok(()),
                result => Ok(result?),
            },
            Place::There(started) => started.signal("terminate").map_err(io::Error::other),
        }
    }

    /// Waits for the end; `None` if the process still runs after `timeout`.
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
            let Place::Here { pidfd, .. } = &self.at else {
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

    /// How it has ended, if it has.
    fn status(&mut self) -> io::Result<Option<ExitStatus>> {
        match &mut self.at {
            Place::Here { child, .. } => child.try_wait(),
            Place::There(started) => started.status().map_err(io::Error::other),
        }
    }

    /// The file on its host that holds what the program wrote to stdout and stderr.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The last 4 KiB of the log, in whole lines, for error messages.
    pub fn log_tail(&self) -> String {
        let tail = match &self.at {
            Place::Here { .. } => tail(&self.log).map_err(anyhow::Error::from),
            Place::There(started) => started.log_tail(&self.name),
        };
        tail.unwrap_or_else(|error| format!("(cannot read {}: {error})", self.log.display()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only if the process has ended.
        let _ = self.kill();
    }
}

/// Makes `command` die with the thread that starts it, so that nothing survives a crash.
pub(crate) fn die_with_parent(command: &mut Command) {
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec the closure makes system calls only; it neither allocates nor takes locks.
    // (`Errno` converts to `io::Error` without allocating.)
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have died before the line above.
            if rustix::process::getppid() == Some(parent) { Ok(()) } else { Err(Errno::OWNERDEAD.into()) }
        });
    }
}

/// Kills every program that has `directory` among its arguments. What a daemon starts outlives it, and a service
/// manager may even have put it outside of the lab's namespaces.
pub(crate) fn kill_all_naming(directory: &Path) {
    let own = rustix::process::getpid();
    let needle = directory.as_os_str().as_encoded_bytes();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|name| Pid::from_raw(name.parse().ok()?));
        let Some(pid) = pid.filter(|pid| *pid != own) else { continue };
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if arguments.windows(needle.len()).any(|window| window == needle) {
            // Fails only if it has ended meanwhile.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

fn pid_of(child: &Child) -> Pid {
    // Unreaped, so the ID is still this child's.
    Pid::from_child(child)
}

/// `PR_SET_PDEATHSIG` goes by the thread that forked, so a program must not be started from one that may end first.
fn spawn_from_lasting_thread(command: Command) -> io::Result<Child> {
    type Order = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: LazyLock<mpsc::Sender<Order>> = LazyLock::new(|| {
        let (sender, orders) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in orders {
                // The one who ordered waits for the reply.
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });

    let (reply, answer) = mpsc::channel();
    SPAWNER.send((command, reply)).expect("the spawner runs as long as this process");
    answer.recv().expect("the spawner answers every order")
}

pub(crate) fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(LOG_TAIL_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let whole_lines = match text.split_once('\n') {
        Some((_, rest)) if start > 0 => rest,
        _ => &text,
    };
    Ok(whole_lines.trim_end().to_owned())
}
