//! The initramfs that a guest boots into.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::cpio::CpioArchive;
use super::kernel::Kernel;
use crate::programs::{cargo_build, target_directory};

/// The modules that a guest of QEMU needs. The modules that they depend on come before them.
const MODULES: &[&str] = &["virtio_pci", "virtio_net", "virtio_balloon", "virtio_blk", "virtio_mem"];
/// The program is built for this target even where that is the host's own, since cargo keeps what is built with
/// `--target` and other flags apart.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A file for QEMU's `-initrd`.
#[derive(Debug, Clone)]
pub struct Initramfs {
    file: PathBuf,
}

impl Initramfs {
    /// Writes an initramfs to `file`, with `memlane-init` as its only program; builds that with cargo, unless it is
    /// up to date.
    ///
    /// # Errors
    ///
    /// If cargo fails, one of the kernel's modules cannot be read, or the file cannot be written.
    pub fn build(file: &Path, kernel: &Kernel) -> Result<Self> {
        let mut archive = CpioArchive::default();
        // No /dev/console: the kernel has one built in, and opens it before /dev is mounted.
        for directory in ["dev", "proc", "sys", "modules"] {
            archive.directory(directory);
        }
        archive.file("init", &init()?);
        for (number, module) in kernel.modules(MODULES)?.iter().enumerate() {
            archive.file(&format!("modules/{number:02}-{}.ko", module.name), &module.contents);
        }
        fs::write(file, archive.finish())
            .with_context(|| format!("writing the initramfs {}", file.display()))?;
        Ok(Self { file: file.to_owned() })
    }

    /// Returns the path of the file.
    pub fn file(&self) -> &Path {
        &self.file
    }
}

/// Builds the guest's program. It is always optimized, because it runs on an emulated processor.
fn init() -> Result<Vec<u8>> {
    let mut command = cargo_build();
    command.args(["--package", "memlane-init", "--release", "--target", TARGET]);
    // The guest has no C library to load, and its memory is better used than for symbols.
    command.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static\x1f-Cstrip=symbols");
    ensure!(command.status().context("running cargo build")?.success(), "cargo build of memlane-init failed");
    let program = target_directory().join(TARGET).join("release/memlane-init");
    fs::read(&program).with_context(|| format!("reading the guest's program {}", program.display()))
}
