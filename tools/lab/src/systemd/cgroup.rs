//! The cgroups of a host that systemd starts, in the hierarchies that systemd works with.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::wait::wait_for;

/// The longest wait for killed processes to leave a cgroup.
const LEFT: Duration = Duration::from_secs(10);

/// A cgroup of one name in each hierarchy.
#[derive(Debug)]
pub(super) struct Cgroup {
    directories: Vec<PathBuf>,
}

impl Cgroup {
    /// Makes the cgroup. Nothing of that name may be there.
    pub(super) fn create(name: &str) -> Result<Self> {
        let directories: Vec<PathBuf> = hierarchies().into_iter().map(|root| root.join(name)).collect();
        ensure!(!directories.is_empty(), "no cgroups are mounted on this machine");
        for directory in &directories {
            fs::create_dir(directory)
                .with_context(|| format!("creating the cgroup {}", directory.display()))?;
        }
        Ok(Self { directories })
    }

    /// Makes `command` begin in this cgroup.
    pub(super) fn confine(&self, command: &mut Command) -> Result<()> {
        let open = |directory: &PathBuf| File::options().write(true).open(directory.join("cgroup.procs"));
        let files = self.directories.iter().map(open).collect::<io::Result<Vec<_>>>();
        let files = files.context("opening a cgroup")?;
        // SAFETY: between fork and exec the closure makes system calls only, on files that are open already.
        unsafe {
            command.pre_exec(move || files.iter().try_for_each(|mut file| file.write_all(b"0")));
        }
        Ok(())
    }
}

/// Kills all processes of the cgroups of that name, and removes them. Errors are ignored, because this runs while something
/// else ends; a later sweep finds what is left.
pub(super) fn remove(name: &str) {
    let found: Vec<PathBuf> =
        hierarchies().into_iter().map(|root| root.join(name)).filter(|found| found.exists()).collect();
    for directory in &found {
        // Only the second version of cgroups has it; all processes are in that one, too.
        let _ = fs::write(directory.join("cgroup.kill"), "1");
    }
    for directory in found {
        let gone = || (remove_tree(&directory).is_ok()).then_some(());
        let _ = wait_for("the end of killed processes", LEFT, gone);
    }
}

/// Returns the names of all cgroups at the top.
pub(super) fn names() -> Vec<String> {
    let entries = |root: PathBuf| fs::read_dir(root).into_iter().flatten().flatten();
    let mut names: Vec<String> = hierarchies()
        .into_iter()
        .flat_map(entries)
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names.dedup();
    names
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)?.flatten() {
        // The files are the kernel's, and go with their directory.
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

/// Returns where the hierarchies are mounted that have processes and no limits: that of the second version, and where
/// both versions are in use, systemd's own of the first.
fn hierarchies() -> Vec<PathBuf> {
    read(&fs::read_to_string("/proc/self/mounts").unwrap_or_default())
}

fn read(mounts: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let mut words = line.split(' ').skip(1);
        let (Some(place), Some(kind), Some(options)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let named = kind == "cgroup" && options.split(',').any(|option| option == "name=systemd");
        if kind == "cgroup2" || named {
            found.push(PathBuf::from(place));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_without_limits_are_found() {
        let both = "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                    cgroup /sys/fs/cgroup/systemd cgroup rw,nosuid,name=systemd 0 0\n\
                    cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(read(both), [Path::new("/sys/fs/cgroup/systemd"), Path::new("/sys/fs/cgroup/unified")]);
        assert_eq!(read("none /sys/fs/cgroup cgroup2 rw 0 0\n"), [Path::new("/sys/fs/cgroup")]);
        assert!(read("").is_empty());
    }
}
