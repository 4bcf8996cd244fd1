//! This module follows the process of a VMM: a connection may be lost and made again, and a process ends for good.

use std::collections::BTreeSet;
use std::fmt;
use std::future::pending;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use memlane_net::journal::VmmIdentity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;

/// If a process could not be watched, that is tried again after this time.
const AGAIN: Duration = Duration::from_secs(1);

/// A VMM's process.
pub struct Process {
    identity: VmmIdentity,
    watch: Watch,
}

/// A watch tells whether a process runs.
enum Watch {
    /// The process does not run.
    Ended,
    /// This pidfd becomes readable when the process ends.
    By(AsyncFd<OwnedFd>),
    /// The kernel refuses a pidfd, so that the process must be taken for alive until a later attempt gets one.
    Blind,
}

/// A process cannot be told from others, or its end would not be noticed.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The process is in another pid namespace, so that `SO_PEERCRED` gives the number 0.
    #[error(
        "its process cannot be seen from here: it is in a pid namespace of others; run it in the daemon's, \
         or in one below that"
    )]
    OtherNamespace,
    /// The process cannot be seen in `/proc`.
    #[error(
        "when process {0} started cannot be read from /proc/{0}/stat; mount /proc without hidepid for the \
         daemon's user"
    )]
    Hidden(u32),
    /// The kernel does not let the process be watched.
    #[error("process {pid} cannot be watched: {source}")]
    Unwatched {
        /// This is the number of the process.
        pid: u32,
        /// This is what the kernel said.
        source: io::Error,
    },
}

/// A process cannot be ended.
#[derive(Debug, thiserror::Error)]
pub enum KillError {
    /// The process belongs to another user.
    #[error(
        "cannot end the VMM (process {0}): not permitted; give memlaned CAP_KILL, as its unit for systemd \
         does, or end it yourself"
    )]
    NotPermitted(u32),
    /// The kernel refuses for another reason.
    #[error("cannot end the VMM (process {pid}): {source}; end it yourself")]
    Failed {
        /// This is the number of the process.
        pid: u32,
        /// This is what the kernel said.
        source: io::Error,
    },
}

/// The reason why a process does not answer, as far as it can be seen. Its text is empty or begins with a semicolon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hang {
    /// Nothing is to be seen: it may be busy.
    Unknown,
    /// The process of this number is stopped.
    Stopped(u32),
    /// A thread of the process of this number waits in the kernel, and cannot be interrupted.
    InKernel(u32),
}

impl fmt::Display for Hang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => Ok(()),
            Self::Stopped(pid) => write!(
                f,
                "; process {pid} is stopped, as by SIGSTOP or a debugger: `kill -CONT {pid}` lets it go on"
            ),
            Self::InKernel(pid) => write!(
                f,
                "; process {pid} waits in the kernel, as for storage that does not answer: see \
                 /proc/{pid}/task/*/wchan and the kernel's log"
            ),
        }
    }
}

impl Hang {
    /// Looks why the process of this number does not answer. It reads files in `/proc`.
    pub(crate) fn of(pid: u32) -> Self {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let states: Vec<char> = threads
            .filter_map(|thread| Stat::read(thread.path().join("stat")).ok())
            .map(|stat| stat.state)
            .collect();
        if !states.is_empty() && states.iter().all(|state| matches!(state, 'T' | 't')) {
            return Self::Stopped(pid);
        }
        if states.contains(&'D') { Self::InKernel(pid) } else { Self::Unknown }
    }
}

impl Process {
    /// Follows the process of this number that runs now, or ran until just now.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be told from a later process of the same number, or if its end would not be noticed.
    pub fn running(pid: u32) -> Result<Self, ProcessError> {
        if pid == 0 {
            return Err(ProcessError::OtherNamespace);
        }
        // In this order: the descriptor stays with the process whose start is read.
        let watch = watch(pid).map_err(|source| ProcessError::Unwatched { pid, source })?;
        let identity = VmmIdentity { pid, started: started(pid).unwrap_or(0) };
        match &watch {
            Watch::By(pidfd) if identity.started == 0 && !has_ended(pidfd) => Err(ProcessError::Hidden(pid)),
            _ => Ok(Self { identity, watch }),
        }
    }

    /// Follows the process that was written down, if it runs.
    pub fn remembered(identity: VmmIdentity) -> Self {
        Self { identity, watch: find(identity) }
    }

    /// Tells whether the process that was written down runs, and says true where that cannot be found out. A process
    /// that has ended and was not collected yet does not run.
    pub fn lives(identity: VmmIdentity) -> bool {
        identity.pid != 0
            && match Stat::read(format!("/proc/{}/stat", identity.pid)) {
                Ok(stat) => stat.started == identity.started && !stat.ended,
                Err(error) => !is_gone(&error),
            }
    }

    /// Tells whether the process that was written down has ended or is about to: all of its threads have begun to exit.
    /// Such a process has closed its connections, or does so next, and may take a while to give its memory back.
    pub fn exits(identity: VmmIdentity) -> bool {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", identity.pid)) else {
            return !Self::lives(identity);
        };
        let exits = |thread: io::Result<std::fs::DirEntry>| match thread {
            Ok(thread) => match Stat::read(thread.path().join("stat")) {
                Ok(stat) => stat.exits,
                Err(error) => is_gone(&error),
            },
            Err(error) => is_gone(&error),
        };
        threads.into_iter().all(exits) || !Self::lives(identity)
    }

    /// Returns the identity of the process.
    pub fn identity(&self) -> VmmIdentity {
        self.identity
    }

    /// Kills the process, if it runs. It ends a little later.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses, or if the process cannot be told from others now.
    pub fn kill(&self) -> Result<(), KillError> {
        let found = matches!(self.watch, Watch::Blind).then(|| find(self.identity));
        let VmmIdentity { pid, .. } = self.identity;
        match found.as_ref().unwrap_or(&self.watch) {
            Watch::Ended => Ok(()),
            Watch::By(pidfd) => match pidfd_send_signal(pidfd.get_ref(), Signal::KILL) {
                Ok(()) | Err(Errno::SRCH) => Ok(()),
                Err(Errno::PERM) => Err(KillError::NotPermitted(pid)),
                Err(error) => Err(KillError::Failed { pid, source: error.into() }),
            },
            Watch::Blind => {
                Err(KillError::Failed { pid, source: io::Error::other("it cannot be told from others now") })
            }
        }
    }

    /// Tells whether the process has ended, as far as that can be seen without waiting.
    pub fn has_ended(&self) -> bool {
        match &self.watch {
            Watch::Ended => true,
            Watch::By(pidfd) => has_ended(pidfd),
            Watch::Blind => false,
        }
    }

    /// Returns once the process has ended.
    pub async fn ended(&self) {
        let mut found;
        let mut watch = &self.watch;
        loop {
            match watch {
                Watch::Ended => return,
                Watch::By(pidfd) if pidfd.readable().await.is_ok() => return,
                Watch::By(_) => pending().await,
                Watch::Blind => {
                    tokio::time::sleep(AGAIN).await;
                    found = find(self.identity);
                    watch = &found;
                }
            }
        }
    }
}

/// Returns those of the `wanted` users as whom processes run that can be seen.
pub(crate) fn users(wanted: impl Fn(u32) -> bool) -> BTreeSet<u32> {
    let running = |entry: io::Result<std::fs::DirEntry>| {
        let entry = entry.ok()?;
        let user = entry.metadata().ok()?.uid();
        let runs = wanted(user) && Stat::read(entry.path().join("stat")).is_ok_and(|stat| !stat.ended);
        runs.then_some(user)
    };
    std::fs::read_dir("/proc").into_iter().flatten().filter_map(running).collect()
}

/// Finds a process that was written down.
fn find(identity: VmmIdentity) -> Watch {
    let Ok(watch) = watch(identity.pid) else { return Watch::Blind };
    match started(identity.pid) {
        Ok(started) if started == identity.started => watch,
        // Its number belongs to another process by now, or to none.
        Ok(_) => Watch::Ended,
        Err(error) if is_gone(&error) => Watch::Ended,
        Err(_) => Watch::Blind,
    }
}

fn watch(pid: u32) -> io::Result<Watch> {
    let Some(pid) = pid.try_into().ok().and_then(Pid::from_raw) else { return Ok(Watch::Ended) };
    let pidfd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Ok(Watch::Ended),
        Err(error) => return Err(error.into()),
    };
    // SAFETY: the descriptor is owned by the value, and never replaced or closed under it.
    Ok(Watch::By(unsafe { AsyncFd::register(pidfd) }?))
}

fn has_ended(pidfd: &AsyncFd<OwnedFd>) -> bool {
    let mut ready = [PollFd::new(pidfd.get_ref(), PollFlags::IN)];
    poll(&mut ready, Some(&Timespec::default())).is_ok_and(|found| found != 0)
}

/// Returns when a process started, in clock ticks since the host booted.
fn started(pid: u32) -> io::Result<u64> {
    Stat::read(format!("/proc/{pid}/stat")).map(|stat| stat.started)
}

/// Tells whether there was nothing to read in `/proc` because the process or thread is gone.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// What a file `stat` in `/proc` tells about a process or a thread.
struct Stat {
    /// Its state, as proc(5) has it, such as `T` for stopped.
    state: char,
    /// It has ended with all of its threads, and was not collected yet.
    ended: bool,
    /// The kernel has begun to end it, and none of its code runs any more.
    exits: bool,
    /// When it started, in clock ticks since the host booted.
    started: u64,
}

impl Stat {
    fn read(path: impl AsRef<Path>) -> io::Result<Self> {
        /// `PF_EXITING` of the kernel's `include/linux/sched.h`.
        const EXITING: u64 = 4;
        let stat = std::fs::read(path)?;
        // The program's name, field 2, may hold anything, and ends with the last parenthesis.
        let rest = stat.iter().rposition(|byte| *byte == b')').and_then(|end| stat.get(end + 2..));
        let rest = std::str::from_utf8(rest.unwrap_or_default()).unwrap_or_default();
        let fields: Vec<&str> = rest.split(' ').collect();
        // Numbered from 1, as proc(5) does.
        let number = |field: usize| fields.get(field - 3).and_then(|field| field.parse::<u64>().ok());
        let read = || {
            let (state, flags, threads, started) = (*fields.first()?, number(9)?, number(20)?, number(22)?);
            // The first thread may end before the others, and is a zombie then.
            let ended = matches!(state, "Z" | "X") && threads <= 1;
            Some(Self { state: state.chars().next()?, ended, exits: flags & EXITING != 0, started })
        };
        read().ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
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
            let process = Process::running(child.id()).unwrap();
            assert_ne!(process.identity().started, 0);
            let again = Process::remembered(process.identity());
            let soon = std::time::Duration::from_millis(1);
            assert!(tokio::time::timeout(soon, again.ended()).await.is_err());
            let other = VmmIdentity { started: 1, ..process.identity() };
            assert!(Process::lives(process.identity()) && !Process::lives(other));
            assert!(!Process::exits(process.identity()) && Process::exits(other));
            assert!(!process.has_ended() && !again.has_ended() && Process::remembered(other).has_ended());
            Process::remembered(other).ended().await;
            child.kill().unwrap();
            process.ended().await;
            again.ended().await;
            assert!(process.has_ended() && again.has_ended());
            assert!(!Process::lives(process.identity()), "it has not been collected");
            assert!(Process::exits(process.identity()));
            child.wait().unwrap();
            Process::running(child.id()).unwrap().ended().await;
            again.kill().unwrap();
        });
    }

    #[test]
    fn a_process_that_is_stopped_is_told_from_one_that_waits() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        assert_eq!(Hang::of(pid), Hang::Unknown);
        let process = Pid::from_raw(pid as i32).unwrap();
        rustix::process::kill_process(process, Signal::STOP).unwrap();
        let stopped = || (Hang::of(pid) == Hang::Stopped(pid)).then_some(());
        memlane_lab::wait_for("a process to stop", Duration::from_secs(60), stopped).unwrap();
        assert!(Hang::of(pid).to_string().contains(&format!("kill -CONT {pid}")));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(Hang::of(pid), Hang::Unknown);
    }

    #[test]
    fn a_process_lives_as_long_as_one_of_its_threads() {
        let test = "a_process_lives_as_long_as_one_of_its_threads";
        // The first thread ends, the second one lives on.
        let program = "import ctypes, threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
ctypes.CDLL(None).pthread_exit(None)";
        let Ok(mut child) = Command::new("python3").args(["-c", program]).spawn() else {
            return memlane_lab::say_skipped(test, "python3 is not installed");
        };
        let stat = || std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let ended = || stat().contains(") Z ").then_some(());
        memlane_lab::wait_for("the end of the first thread", Duration::from_secs(60), ended).unwrap();
        let identity = VmmIdentity { pid: child.id(), started: started(child.id()).unwrap() };
        assert!(Process::lives(identity) && !Process::exits(identity));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!Process::lives(identity) && Process::exits(identity));
    }

    #[test]
    fn a_process_of_another_pid_namespace_is_none_that_has_ended() {
        let error = Process::running(0).err().expect("no process is seen under this number");
        assert!(error.to_string().contains("pid namespace"), "{error}");
    }

    #[test]
    fn a_process_that_may_not_be_killed_is_told() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        // A thread has the rights of its user for itself.
        let told = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let process = Process::running(pid).unwrap();
                let nobody = rustix::process::Uid::from_raw(65534);
                rustix::thread::set_thread_uid(nobody).unwrap();
                process.kill().map_err(|error| error.to_string())
            })
        });
        let told = told.join().unwrap();
        assert_eq!(child.try_wait().unwrap(), None, "it lives");
        child.kill().unwrap();
        child.wait().unwrap();
        let told = told.unwrap_err();
        assert!(told.contains(&format!("process {pid}")) && told.contains("CAP_KILL"), "{told}");
    }
}
