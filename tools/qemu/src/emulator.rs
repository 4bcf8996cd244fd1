//! The QEMU in front of which this program stands.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The environment variable that names the QEMU to start.
const VARIABLE: &str = "MEMLANE_EMULATOR";
/// This program has this name where it does not stand in the place of another.
const OWN_NAME: &str = "memlane-qemu";
/// `dpkg-divert` adds this to the name of a program that another one takes the place of.
const DIVERTED: &str = "distrib";
/// QEMU is at one of these paths: Debian's, Proxmox's and Red Hat's.
const USUAL: [&str; 3] = ["/usr/bin/qemu-system-x86_64", "/usr/bin/kvm", "/usr/libexec/qemu-kvm"];
/// So many links are followed on the way from a name to this program.
const MAX_LINKS: usize = 16;

/// A QEMU to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Emulator {
    /// The program is at this path.
    pub path: PathBuf,
    /// The program is told this name as its own.
    pub name: OsString,
}

/// There is no QEMU to start.
#[derive(Debug, thiserror::Error)]
#[error(
    "there is no QEMU to start: none of these is there and another program than this one: {looked_for}; install QEMU, \
     or set {VARIABLE} to its path"
)]
pub(crate) struct NoEmulator {
    /// These paths were looked at.
    looked_for: String,
}

impl Emulator {
    /// Finds the QEMU of this host. `called` is the name by which this program was started.
    ///
    /// # Errors
    ///
    /// Fails if there is none.
    pub(crate) fn find(called: &OsStr) -> Result<Self, NoEmulator> {
        Self::find_among(called, env::var_os(VARIABLE), &USUAL.map(PathBuf::from))
    }

    fn find_among(called: &OsStr, chosen: Option<OsString>, usual: &[PathBuf]) -> Result<Self, NoEmulator> {
        let stands_in = Path::new(called).file_name().is_some_and(|name| name != OWN_NAME);
        let path = match chosen.filter(|chosen| !chosen.is_empty()) {
            Some(chosen) if is_this_program(Path::new(&chosen)) => {
                return Err(NoEmulator { looked_for: chosen.display().to_string() });
            }
            Some(chosen) => chosen.into(),
            None => {
                let diverted = if stands_in { diverted(called) } else { Vec::new() };
                let candidates = [diverted.as_slice(), usual].concat();
                let is_other = |path: &&PathBuf| path.is_file() && !is_this_program(path);
                candidates.iter().find(is_other).cloned().ok_or_else(|| {
                    let shown: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
                    NoEmulator { looked_for: shown.join(", ") }
                })?
            }
        };
        // In the place of QEMU this is known by the name of QEMU: Proxmox takes a process for a guest by it, and QEMU
        // itself chooses KVM if its name ends so.
        let name = if stands_in { called.to_owned() } else { path.clone().into() };
        Ok(Self { path, name })
    }
}

/// Returns where the program may be that was at the path of this one before.
fn diverted(called: &OsStr) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut next = in_path(called);
    // One link may stand in the place of another: kvm, which leads to qemu-system-x86_64, which leads here.
    while let Some(path) = next.take().filter(|_| found.len() < MAX_LINKS) {
        let mut diverted = path.clone().into_os_string();
        diverted.push(".");
        diverted.push(DIVERTED);
        found.push(diverted.into());
        next = fs::read_link(&path).ok().map(|to| path.parent().unwrap_or(Path::new("/")).join(to));
    }
    found
}

/// Returns the path of a program that was called by this name.
fn in_path(called: &OsStr) -> Option<PathBuf> {
    let called = Path::new(called);
    if called.components().count() > 1 || called.is_absolute() {
        return Some(called.to_owned());
    }
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|directory| directory.join(called)).find(|path| path.is_file())
}

fn is_this_program(path: &Path) -> bool {
    let number = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    number(path) == number(Path::new("/proc/self/exe"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_environment_comes_first() {
        let found = Emulator::find_among(OsStr::new("memlane-qemu"), Some("/x/qemu".into()), &[]).unwrap();
        assert_eq!(found, Emulator { path: "/x/qemu".into(), name: "/x/qemu".into() });
    }

    #[test]
    fn the_diverted_program_is_found_behind_links() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        symlink("qemu-system-x86_64", at("kvm")).unwrap();
        symlink("/proc/self/exe", at("qemu-system-x86_64")).unwrap();
        fs::write(at("qemu-system-x86_64.distrib"), "").unwrap();
        fs::write(at("usual"), "").unwrap();
        for name in ["kvm", "qemu-system-x86_64"] {
            let found = Emulator::find_among(at(name).as_os_str(), None, &[at("usual")]).unwrap();
            assert_eq!(found, Emulator { path: at("qemu-system-x86_64.distrib"), name: at(name).into() });
        }
        fs::write(at("kvm.distrib"), "").unwrap();
        let found = Emulator::find_among(at("kvm").as_os_str(), None, &[at("usual")]).unwrap();
        assert_eq!(found.path, at("kvm.distrib"));
    }

    #[test]
    fn this_program_does_not_start_itself() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        symlink(std::env::current_exe().unwrap(), at("itself")).unwrap();
        let own = at("memlane-qemu");
        let told = Emulator::find_among(own.as_os_str(), None, &[at("itself"), at("absent")])
            .unwrap_err()
            .to_string();
        assert!(told.contains("MEMLANE_EMULATOR") && told.contains("/absent"), "{told}");
        Emulator::find_among(own.as_os_str(), Some(at("itself").into()), &[]).unwrap_err();
        fs::write(at("usual"), "").unwrap();
        let found = Emulator::find_among(own.as_os_str(), None, &[at("itself"), at("usual")]).unwrap();
        assert_eq!(found, Emulator { path: at("usual"), name: at("usual").into() });
    }
}
