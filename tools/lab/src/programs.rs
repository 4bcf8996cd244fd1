//! Memlane's own programs, as cargo builds them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// The places of the programs.
#[derive(Clone, Debug)]
pub struct Programs {
    directory: PathBuf,
}

impl Programs {
    /// Builds `memlaned`, `memlanectl`, `memlane-vmm`, the shim, the starter and `memlane-qemu` with cargo, unless they are up to date; for
    /// tests also the example of a VMM.
    ///
    /// # Errors
    ///
    /// If cargo fails.
    pub fn build(release: bool) -> Result<Self> {
        Self::build_with(release, &[])
    }

    /// Builds the programs as [`Programs::build`] does, and those of the packages `more`.
    ///
    /// # Errors
    ///
    /// If cargo fails.
    pub fn build_with(release: bool, more: &[&str]) -> Result<Self> {
        let mut command = cargo_build();
        let packages =
            ["memlaned", "memlanectl", "memlane-vmm", "memlane-shim", "memlane-starter", "memlane-qemu"];
        for package in packages.iter().chain(more) {
            command.args(["--package", package]);
        }
        if release {
            command.arg("--release");
        } else {
            // To build an example, cargo counts in the features that tests need. The programs are then those that
            // `cargo test` has built already; otherwise nearly everything is built a second time.
            command.args(["--lib", "--bins", "--package", "memlane-kvm", "--example", "smallest_vmm"]);
        }
        ensure!(command.status().context("running cargo build")?.success(), "cargo build failed");
        let directory = target_directory().join(if release { "release" } else { "debug" });
        let directory = directory.canonicalize().context("looking for what cargo has built")?;
        Ok(Self { directory })
    }

    /// Returns the path of a program by its name.
    pub fn path(&self, program: &str) -> PathBuf {
        self.directory.join(program)
    }

    /// Returns the path of the library for LD_PRELOAD.
    pub fn shim(&self) -> PathBuf {
        self.path("libmemlane_shim.so")
    }
}

/// Returns a command `cargo build` in the workspace, still without packages.
pub(crate) fn cargo_build() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace()).args(["build", "--quiet", "--locked"]);
    command
}

/// Returns the directory in which cargo puts what it builds.
pub(crate) fn target_directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    workspace().join(target)
}

/// Returns whether a program can be started by its name alone.
pub(crate) fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// Runs a program to its end in `directory`, and returns what it prints.
pub(crate) fn run(program: &str, arguments: &[&str], directory: &Path) -> Result<String> {
    let what = || format!("{program} {}", arguments.join(" "));
    let output = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .env("LC_ALL", "C")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .output()
        .with_context(|| format!("running {}", what()))?;
    if !output.status.success() {
        bail!("{} failed with {}: {}", what(), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}
