//! A tree, and what it is made of.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Bootstrap;
use crate::cache;
use crate::programs::target_directory;

/// To be raised whenever the code below makes another tree of the same recipe.
const MAKER: &str = "1";

/// The directories of units that an administrator makes, in a tree.
const UNITS: &str = "etc/systemd/system";

/// The files that belong to one host, and are made anew for each. What mmdebstrap has copied from this machine is among them.
const OF_ONE_HOST: [&str; 3] = ["etc/hostname", "etc/resolv.conf", "var/lib/dbus/machine-id"];

/// A system of Debian's packages. Trees of a role are kept until one of another recipe is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tree {
    /// The first part of its folder's name.
    pub(crate) role: &'static str,
    /// The name of the Debian release.
    pub(crate) suite: &'static str,
    /// Whether what came later than the release, with its backports, is preferred.
    pub(crate) backported: bool,
    /// Whether the packages are installed as on a host. Otherwise only their files are laid out.
    pub(crate) installed: bool,
    /// The packages, without those that they depend on.
    pub(crate) packages: &'static [&'static str],
    /// The units of systemd that never start.
    pub(crate) masked: &'static [&'static str],
    /// The units of systemd that start only when something needs them.
    pub(crate) asleep: &'static [&'static str],
}

impl Tree {
    /// Returns the folder of this tree. It unpacks it there unless an earlier call has done so, which takes a minute or
    /// two. Nobody may write into it: it is for all labs.
    ///
    /// # Errors
    ///
    /// If it is not there and this is not root, or the packages cannot be had.
    pub fn obtain(&self) -> Result<PathBuf> {
        let folder = self.folder();
        cache::obtain_keyed(&trees(), self.role, &self.key(), |made| {
            eprintln!("unpacking Debian's {} for a {}", self.suite, self.role);
            self.make(made)
        })
        .with_context(|| format!("Debian's {} cannot be unpacked into {}", self.suite, folder.display()))?;
        Ok(folder)
    }

    /// Returns whether the tree is there already.
    pub fn is_there(&self) -> bool {
        self.folder().is_dir()
    }

    /// Returns a text that differs between trees of different recipes.
    pub(crate) fn key(&self) -> String {
        cache::key(&[MAKER, &format!("{self:?}")])
    }

    fn folder(&self) -> PathBuf {
        trees().join(format!("{}-{}", self.role, self.key()))
    }

    fn make(&self, root: &Path) -> Result<()> {
        let Self { suite, backported, installed, packages, .. } = *self;
        Bootstrap { suite, backported, installed, packages }.unpack(root)?;
        if !installed {
            return Ok(());
        }
        for unit in self.masked {
            let mask = root.join(UNITS).join(unit);
            remove_if_there(&mask)?;
            symlink("/dev/null", &mask).with_context(|| format!("masking a unit by {}", mask.display()))?;
        }
        for unit in self.masked.iter().chain(self.asleep) {
            let targets = root.join(UNITS);
            for target in fs::read_dir(&targets).with_context(|| format!("reading {}", targets.display()))? {
                let target = target?.path();
                if target.extension().is_some_and(|kind| kind == "wants" || kind == "requires") {
                    remove_if_there(&target.join(unit))?;
                }
            }
        }
        for file in OF_ONE_HOST {
            remove_if_there(&root.join(file))?;
        }
        let ssh = root.join("etc/ssh");
        for entry in fs::read_dir(&ssh).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("ssh_host_") {
                remove_if_there(&entry.path())?;
            }
        }
        // Empty: the host takes a number of its own when it boots, and does not take that for its first boot ever.
        fs::write(root.join("etc/machine-id"), "").context("emptying the number of the machine")
    }
}

fn trees() -> PathBuf {
    // Programs of a tree are mounted and started by this path, in whatever directory.
    let target = target_directory();
    target.canonicalize().unwrap_or(target).join("memlane-trees")
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_recipe_is_another_tree() {
        let tree = Tree::HOST;
        assert_eq!(tree.key(), Tree::HOST.key());
        assert_ne!(Tree { suite: "trixie", ..tree }.key(), tree.key());
        assert_ne!(Tree { masked: &[], ..tree }.key(), tree.key());
        assert!(tree.folder().is_absolute());
    }
}
