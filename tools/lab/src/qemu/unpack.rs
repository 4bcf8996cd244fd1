//! Unpacking a QEMU from its package, with all that it depends on.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::Version;
use crate::cache;
use crate::debian::{Bootstrap, install_tools};
use crate::programs::run;

/// The path of the program in the folder that it was unpacked into.
pub(super) const PROGRAM: &str = "usr/bin/qemu-system-x86_64";

/// The packages that are unpacked. Network cards boot with code of ipxe-qemu.
const PACKAGES: &[&str] = &["qemu-system-x86", "ipxe-qemu"];
/// The directories of libraries in the folder. One of them contains the loader.
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
const LOADER: &str = "ld-linux-x86-64.so.2";
const PATCHELF: (&str, &str) = ("patchelf", "patchelf");

/// Makes sure that a version of QEMU is in `directory`, and unpacks it there if it is not.
pub(super) fn obtain(version: Version, directory: &Path) -> Result<()> {
    let Version { name, suite, backported } = version;
    let program = directory.join(PROGRAM);
    cache::obtain(
        directory,
        // It does not start if it was moved.
        || start(&program, name),
        |root| {
            eprintln!("unpacking QEMU {name} of Debian's {suite}");
            Bootstrap { suite, backported, installed: false, packages: PACKAGES }.unpack(root)?;
            install_tools(&[PATCHELF])?;
            make_own(root, directory)
        },
    )
}

/// Starts the program, and checks that it says that it is that version.
fn start(program: &Path, version: &str) -> Result<()> {
    let name = program.to_str().context("a path that is no UTF-8")?;
    let said = run(name, &["--version"], Path::new("/"))?;
    ensure!(said.contains(&format!("version {version}.")), "{name} is no QEMU {version}: {}", said.trim());
    Ok(())
}

/// Makes the program in `root` use only what is in its folder, which will be `directory`, and nothing of the machine's.
fn make_own(root: &Path, directory: &Path) -> Result<()> {
    let program = root.join(PROGRAM);
    let libraries = LIBRARIES.map(|libraries| directory.join(libraries).display().to_string());
    let at = LIBRARIES.iter().position(|libraries| root.join(libraries).join(LOADER).exists());
    let loader = format!("{}/{LOADER}", libraries[at.context("no loader was unpacked")?]);
    let program = program.to_str().context("a path that is no UTF-8")?;
    let search = libraries.join(":");
    let arguments = ["--set-interpreter", &loader, "--force-rpath", "--set-rpath", &search, program];
    run("patchelf", &arguments, Path::new("/"))?;
    // Where this is beside the program, it looks for its firmware below it, and nowhere else.
    symlink("../..", root.join(PROGRAM).with_file_name("qemu-bundle"))
        .context("showing QEMU its firmware")?;
    // What apt is told there is for nobody.
    let _ = fs::remove_dir_all(root.join("etc/apt"));
    Ok(())
}
