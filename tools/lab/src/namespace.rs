//! Named network namespaces, as `ip netns` keeps them.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Pid, Signal};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::child::{die_with_parent, kill_all_naming};
use crate::network;

/// The directory in which iproute2 keeps named namespaces; see ip-netns(8).
const DIRECTORY: &str = "/run/netns";

/// The directory for guests' memory: a tmpfs on every Linux.
pub(crate) const MEMORY: &str = "/dev/shm";

/// A network namespace, held open.
#[derive(Debug, Clone)]
pub(crate) struct Namespace {
    name: String,
    file: Arc<File>,
}

impl Namespace {
    /// Creates the namespace. Its name exists until [`remove`] is called.
    pub(crate) fn create(name: &str) -> Result<Self> {
        network::ip(&["netns", "add", name])
            .with_context(|| format!("creating the network namespace {name}"))?;
        let path = path(name);
        let file =
            File::open(&path).with_context(|| format!("opening the network namespace {}", path.display()))?;
        Ok(Self { name: name.to_owned(), file: Arc::new(file) })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn path(&self) -> PathBuf {
        path(&self.name)
    }

    /// Runs `work` on a thread of its own inside the namespace; sockets that it opens stay in there.
    pub(crate) fn run_in<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(&self.file)
                    .with_context(|| format!("entering the network namespace {}", self.name))
                    .map(|()| work())
            });
            // A panic of `work` (a failed assertion, say) goes on in the caller.
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Makes `command` run inside the namespace, and die with the thread that starts it.
    pub(crate) fn confine(&self, command: &mut Command) {
        let file = Arc::clone(&self.file);
        die_with_parent(command);
        // SAFETY: between fork and exec the closure makes system calls only; it neither allocates nor takes locks.
        // (`Errno` converts to `io::Error` without allocating.)
        unsafe {
            command.pre_exec(move || {
                enter(&file)?;
                show_own_interfaces_in_sys()
            });
        }
    }

    /// Makes `command` run with the network of the namespace, and die with the thread that starts it. What it mounts is seen by
    /// itself and by what it starts.
    pub(crate) fn confine_network(&self, command: &mut Command) {
        let file = Arc::clone(&self.file);
        die_with_parent(command);
        // SAFETY: as in `confine`.
        unsafe {
            command.pre_exec(move || {
                enter(&file)?;
                unshare_mounts()
            });
        }
    }
}

/// Kills what still runs in the namespace `name` and removes it. Errors are ignored, because this runs while something
/// else ends; a later [`sweep`] finds what is left.
pub(crate) fn remove(name: &str) {
    for pid in pids(name) {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
    let _ = network::ip(&["netns", "delete", name]);
}

/// Removes namespaces and directories of labs whose process is gone.
pub(crate) fn sweep() {
    for name in entries(Path::new(DIRECTORY)).filter(|name| is_stale(name)) {
        remove(&name);
    }
    for parent in [std::env::temp_dir(), PathBuf::from(MEMORY)] {
        for name in entries(&parent).filter(|name| is_stale(name)) {
            let path = parent.join(name);
            // Anybody may make a directory of that name in there: leave what is not ours.
            let own = fs::symlink_metadata(&path).is_ok_and(|metadata| {
                metadata.is_dir() && metadata.uid() == rustix::process::geteuid().as_raw()
            });
            if own {
                if parent == Path::new(MEMORY) {
                    kill_all_naming(&path);
                }
                let _ = fs::remove_dir_all(&path);
            }
        }
    }
}

fn path(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

fn enter(file: &File) -> io::Result<()> {
    Ok(move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?)
}

/// Mounts a new sysfs. It shows the interfaces of the namespace that mounted it, so /sys/class/net needs a new mount,
/// in a mount namespace of its own; `ip netns exec` does the same.
fn show_own_interfaces_in_sys() -> io::Result<()> {
    unshare_mounts()?;
    rustix::mount::unmount(c"/sys", UnmountFlags::DETACH)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(rustix::mount::mount(c"sysfs", c"/sys", c"sysfs", flags, None)?)
}

/// Gives the calling process a mount namespace of its own. Between fork and exec it has no other threads.
fn unshare_mounts() -> io::Result<()> {
    // SAFETY: a mount namespace does not touch descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS)? };
    // Mounts made outside later (hugetlbfs, say) shall be seen here, but not the other way round.
    Ok(rustix::mount::mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?)
}

/// Returns the processes inside the namespace `name`, but never this one.
fn pids(name: &str) -> Vec<Pid> {
    let own = rustix::process::getpid();
    let Ok(output) = Command::new("ip").args(["netns", "pids", name]).output() else { return Vec::new() };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| Pid::from_raw(line.trim().parse().ok()?))
        .filter(|pid| *pid != own)
        .collect()
}

fn entries(directory: &Path) -> impl Iterator<Item = String> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
}

/// Returns whether a name is of a lab whose process is gone.
pub(crate) fn is_stale(name: &str) -> bool {
    owner(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

/// Returns the process that made `memlane-PID-N-...`.
fn owner(name: &str) -> Option<u32> {
    let mut parts = name.strip_prefix("memlane-")?.splitn(3, '-');
    let pid = parts.next()?.parse().ok()?;
    parts.next()?.parse::<usize>().ok()?;
    parts.next()?;
    Some(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_names_of_labs_have_an_owner() {
        assert_eq!(owner("memlane-4711-0-a"), Some(4711));
        assert_eq!(owner("memlane-4711-0-kX81bq"), Some(4711));
        for other in
            ["memlane", "memlane-4711", "memlane-4711-0", "memlane-x-0-a", "memlane-4711-x-a", "blue"]
        {
            assert_eq!(owner(other), None, "{other}");
        }
    }

    #[test]
    fn a_lab_of_a_live_process_is_not_stale() {
        assert!(!is_stale(&format!("memlane-{}-0-a", std::process::id())));
        // Above the largest pid that Linux gives out (2^22).
        assert!(is_stale("memlane-4194305-0-a"));
    }
}
