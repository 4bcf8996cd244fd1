//! Stock QEMU as Debian builds it, in each version that is tested, unpacked into a folder of its own.
//!
//! What the machine has installed is not used: all machines test the same, and the package of one Debian cannot be
//! installed beside that of another. Nor is anything installed: `mmdebstrap` unpacks the package with all that it
//! depends on, and `patchelf` has the program start by the loader and with the libraries of its own folder. So it is a
//! program like any other, whose path is all that starts it, and /proc/PID/exe is its own.

mod unpack;

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result};

use crate::programs::{run, target_directory};

/// The environment variable that says which QEMU is used: the name of one of [`VERSIONS`], or the path of any other
/// QEMU.
pub const VARIABLE: &str = "MEMLANE_QEMU";

/// The environment variable that names a file for the names of all tests that use QEMU, so that these tests can be run
/// again with another version.
pub const TESTS: &str = "MEMLANE_QEMU_TESTS";

/// All versions that are tested, the oldest first. The last one is the default.
pub const VERSIONS: [Version; 3] = [
    Version { name: "7.2", suite: "bookworm", backported: false },
    Version { name: "10.0", suite: "trixie", backported: false },
    // Whichever of them is there: the backports go on.
    Version { name: "11", suite: "trixie", backported: true },
];

/// The QEMU that [`prefer`] was told.
static PREFERRED: OnceLock<OsString> = OnceLock::new();

/// The path of an installed QEMU, on hosts that the harness has not set up.
const INSTALLED: &str = "/usr/bin/qemu-system-x86_64";

/// A version of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// The version number, as in `7.2`, or its beginning.
    pub name: &'static str,
    /// The name of the Debian release that it was made for.
    suite: &'static str,
    /// Whether it came later than that release, with its backports.
    backported: bool,
}

impl Version {
    /// Returns the version that has that number.
    pub fn named(name: &str) -> Option<Self> {
        VERSIONS.into_iter().find(|version| version.name == name)
    }

    /// Returns the path of the program, which exists once it was [obtained](Self::obtain).
    pub fn program(self) -> PathBuf {
        self.directory().join(unpack::PROGRAM)
    }

    /// Unpacks this version into cargo's target directory, unless an earlier call has done so.
    ///
    /// # Errors
    ///
    /// If it is not there and cannot be unpacked, or does not start.
    pub fn obtain(self) -> Result<PathBuf> {
        let directory = self.directory();
        unpack::obtain(self, &directory)
            .with_context(|| format!("QEMU {} cannot be unpacked into {}", self.name, directory.display()))?;
        Ok(self.program())
    }

    fn directory(self) -> PathBuf {
        // The program has its own path in it, which must hold in whatever directory it is started.
        let target = target_directory();
        target.canonicalize().unwrap_or(target).join("memlane-qemu").join(self.name)
    }
}

/// Makes labs of this process use a QEMU, whatever [`VARIABLE`] says. `which` is what that variable could say. It must
/// be called before anything else of this module; later calls do nothing.
pub fn prefer(which: OsString) {
    let _ = PREFERRED.set(which);
}

/// Returns the QEMU that labs use, as [`prefer`] or [`VARIABLE`] says.
pub fn program() -> PathBuf {
    chosen().map_or_else(|path| path, Version::program)
}

/// Returns the QEMU of a host that the harness has not set up: the one whose path [`VARIABLE`] says, else the installed
/// one.
pub fn program_elsewhere() -> PathBuf {
    chosen().err().unwrap_or_else(|| INSTALLED.into())
}

/// Unpacks the QEMU that labs use, unless that has been done.
///
/// # Errors
///
/// As [`Version::obtain`].
pub fn obtain() -> Result<PathBuf> {
    chosen().map_or_else(Ok, Version::obtain)
}

/// Returns what the QEMU that labs use says to an argument.
fn says(argument: &str) -> Result<String> {
    run(program().to_str().context("a path that is no UTF-8")?, &[argument], Path::new("/"))
}

/// Returns the version of the QEMU that labs use, such as `11.1.3`.
///
/// # Errors
///
/// If it cannot be run, or does not say.
pub fn version() -> Result<String> {
    let said = says("--version")?;
    let version = said.split_once("version ").and_then(|(_, rest)| rest.split_whitespace().next());
    version.map(str::to_owned).with_context(|| format!("{} does not say its version", program().display()))
}

/// Returns the arguments that make the QEMU that labs use become another user, once it has started.
///
/// # Errors
///
/// If it cannot be run.
pub fn run_as(user: &str) -> Result<[String; 2]> {
    let help = says("--help")?;
    // 9.1 has both, 10.0 the new one only.
    Ok(match help.contains("-runas") {
        true => ["-runas".into(), user.into()],
        false => ["-run-with".into(), format!("user={user}")],
    })
}

/// Returns the arguments that give the QEMU that labs use another root directory, once it has started.
///
/// # Errors
///
/// If it cannot be run.
pub fn in_root(root: &Path) -> Result<[String; 2]> {
    let help = says("--help")?;
    Ok(match help.contains("-chroot") {
        true => ["-chroot".into(), root.display().to_string()],
        false => ["-run-with".into(), format!("chroot={}", root.display())],
    })
}

/// Writes into the file that [`TESTS`] names, if it names one, that a test uses QEMU.
pub(crate) fn note_test(test: &str) {
    let Some(file) = env::var_os(TESTS) else { return };
    let noted = File::options().append(true).open(file).and_then(|mut file| writeln!(file, "{test}"));
    noted.expect("the file for the names of tests exists and can be written");
}

/// Returns why there is no [`program`]; `None` if there is one.
pub(crate) fn why_not() -> Option<String> {
    let program = program();
    if program.exists() {
        // The shim is loaded from there.
        return [program, target_directory().join("debug")].iter().find_map(|path| closed(path));
    }
    Some(match chosen() {
        Ok(version) => format!("QEMU {} is not unpacked (`cargo xtask test` does it)", version.name),
        Err(_) => format!("there is no {}, which {VARIABLE} names", program.display()),
    })
}

/// Returns why the users that guests run as cannot reach a path, if they cannot.
fn closed(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let closed = |directory: &&Path| directory.metadata().is_ok_and(|found| found.mode() & 0o001 == 0);
    let directory = path.ancestors().skip(1).find(closed)?.display();
    Some(format!(
        "guests run as users of their own, who cannot pass {directory} to reach {}: `chmod o+x {directory}`, or \
         have the sources elsewhere",
        path.display()
    ))
}

fn chosen() -> Result<Version, PathBuf> {
    let which = PREFERRED.get().cloned().or_else(|| env::var_os(VARIABLE));
    choose(which.as_deref().map(Path::new))
}

fn choose(said: Option<&Path>) -> Result<Version, PathBuf> {
    match said {
        None => Ok(VERSIONS[VERSIONS.len() - 1]),
        Some(said) => said.to_str().and_then(Version::named).ok_or_else(|| said.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_or_a_path_can_be_said() {
        let choose = |said: Option<&str>| super::choose(said.map(Path::new)).map(|version| version.name);
        assert_eq!(choose(None), Ok("11"));
        assert_eq!(choose(Some("7.2")), Ok("7.2"));
        assert_eq!(choose(Some("/opt/qemu")), Err("/opt/qemu".into()));
    }
}
