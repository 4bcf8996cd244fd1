//! Memlane's own programs, out of cargo.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    directory: PathBuf,
}

impl Programs {
    /// Builds `memlaned`, `memlanectl`, `memlane-vmm` and the shim with cargo, unless they are up to date.
    ///
    /// # Errors
    ///
    /// If cargo fails.
    pub fn build(release: bool) -> Result<Self> {
        let mut command = cargo_build();
        for package in ["memlaned", "memlanectl", "memlane-vmm", "memlane-shim"] {
            command.args(["--package", package]);
        }
        if release {
            command.arg("--release");
        }
        ensure!(command.status().context("running cargo build")?.success(), "cargo build failed");
        let directory = target_directory().join(if release { "release" } else { "debug" });
        let directory = directory.canonicalize().context("looking for what cargo has built")?;
        Ok(Self { directory })
    }

    /// A program by its name.
    pub fn path(&self, program: &str) -> PathBuf {
        self.directory.join(program)
    }

    /// The library for LD_PRELOAD.
    pub fn shim(&self) -> PathBuf {
        self.path("libmemlane_shim.so")
    }
}

/// `cargo build` in the workspace, without packages yet.
pub(crate) fn cargo_build() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace()).args(["build", "--quiet", "--locked"]);
    command
}

/// Where cargo puts what it builds.
pub(crate) fn target_directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    workspace().join(target)
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}
