//! Folders below cargo's target directory that take long to make, and are kept for later calls and processes.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, flock};
use xxhash_rust::xxh3::xxh3_64;

/// The prefix of the names of folders that are not complete yet.
const UNFINISHED: &str = ".unfinished-";
/// The number of characters of a key.
const KEY: usize = 16;

/// Makes sure that `folder` is there, and makes it if `whole` says that it is not. `make` is given a path at which
/// nothing exists yet, beside `folder`, to which that is moved when it is complete; so nobody finds half of it. One process makes
/// folders of one parent at a time.
///
/// # Errors
///
/// If the system refuses, `make` fails, or what it made is not `whole`.
pub(crate) fn obtain(
    folder: &Path,
    whole: impl Fn() -> Result<()>,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    if whole().is_ok() {
        return Ok(());
    }
    let beside = folder.parent().context("a folder has a parent")?;
    fs::create_dir_all(beside).with_context(|| format!("creating {}", beside.display()))?;
    let lock = beside.join(".lock");
    let lock = File::create(&lock).with_context(|| format!("creating {}", lock.display()))?;
    flock(&lock, FlockOperation::LockExclusive).context("waiting for others who make it")?;
    // Nobody else is at work now, but somebody may have been before.
    if whole().is_ok() {
        return Ok(());
    }
    remove_siblings(beside, |name| name.starts_with(UNFINISHED))?;
    let unfinished =
        tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(beside).context("making a directory")?;
    let made = unfinished.path().join("made");
    make(&made)?;
    // What is there is of another version, or was damaged.
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing {}", folder.display()));
        }
        _ => {}
    }
    fs::rename(&made, folder).with_context(|| format!("moving what was made to {}", folder.display()))?;
    whole()
}

/// As [`obtain`], for the folder `ROLE-KEY` in `parent`, whose key says what it is made of. It is whole when it is there, and
/// older folders of that role are removed when a new one is made.
pub(crate) fn obtain_keyed(
    parent: &Path,
    role: &str,
    key: &str,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let folder = parent.join(format!("{role}-{key}"));
    let whole = || {
        ensure!(folder.is_dir(), "there is no {}", folder.display());
        Ok(())
    };
    obtain(&folder, whole, |made| {
        // First, since there may be no room for both.
        remove_siblings(parent, |name| is_keyed(name, role))?;
        make(made)
    })
}

/// Returns the key of something that is made of `parts`, for [`obtain_keyed`].
pub(crate) fn key(parts: &[&str]) -> String {
    // No part contains a zero byte, so that no two lists are one text.
    format!("{:016x}", xxh3_64(parts.join("\0").as_bytes()))
}

fn is_keyed(name: &str, role: &str) -> bool {
    let key = name.strip_prefix(role).and_then(|rest| rest.strip_prefix('-'));
    key.is_some_and(|key| key.len() == KEY && key.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn remove_siblings(directory: &Path, which: impl Fn(&str) -> bool) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| which(&name.to_string_lossy())) {
            fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).expect("a directory").flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().into_string().expect("a name of ours")).collect();
        names.sort();
        names.retain(|name| name != ".lock");
        names
    }

    #[test]
    fn what_is_there_is_kept_and_what_is_outdated_goes() {
        let parent = tempfile::tempdir().expect("a directory");
        let obtain = |role: &str, key: &str, text: &str| {
            obtain_keyed(parent.path(), role, key, |made| {
                fs::create_dir(made)?;
                Ok(fs::write(made.join("text"), text)?)
            })
        };
        let (old, new) = (key(&["a", "b"]), key(&["ab"]));
        assert_ne!(old, new);
        obtain("host", &old, "first").expect("a folder");
        obtain("host", &old, "second").expect("the same folder");
        let text = fs::read_to_string(parent.path().join(format!("host-{old}/text"))).expect("a text");
        assert_eq!(text, "first");
        obtain("host-image", &old, "another role").expect("a folder");
        fs::create_dir(parent.path().join(".unfinished-of-a-dead-process")).expect("a directory");
        obtain("host", &new, "third").expect("another folder");
        assert_eq!(names(parent.path()), [format!("host-{new}"), format!("host-image-{old}")]);
    }

    #[test]
    fn what_fails_leaves_nothing() {
        let parent = tempfile::tempdir().expect("a directory");
        let failed = obtain_keyed(parent.path(), "host", &key(&["a"]), |made| {
            fs::create_dir(made)?;
            anyhow::bail!("no archive answers")
        });
        assert_eq!(failed.expect_err("it failed").to_string(), "no archive answers");
        assert_eq!(names(parent.path()), [""; 0]);
        let failed = obtain_keyed(parent.path(), "host", &key(&["a"]), |_| Ok(()));
        assert!(failed.is_err(), "nothing was made");
    }
}
