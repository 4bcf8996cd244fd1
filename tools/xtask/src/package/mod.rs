//! `cargo xtask package`: a Debian package of everything that a host needs.

mod stage;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use memlane_lab::Programs;

use crate::apt;
use stage::Stage;

/// The Debian packages that make one.
const TOOLS: [&str; 3] = ["debhelper", "dpkg-dev", "lintian"];

/// The program that writes man pages and completions.
const MANUAL: &str = "memlane-manual";

/// The options of `cargo xtask package`.
#[derive(Args, Clone, Debug)]
pub(crate) struct PackageOptions {
    /// Make a package of this version, such as 0.1.0-1+local1 [default: the workspace's, with -1]
    #[arg(long, value_name = "VERSION", value_parser = version)]
    revision: Option<String>,
    /// Pack programs that are built as for tests: sooner done, larger, and slower
    #[arg(long)]
    debug: bool,
}

/// What was made.
struct Package {
    /// The package.
    file: PathBuf,
    /// The package of its debug symbols.
    symbols: PathBuf,
}

/// Makes the package, has lintian look at it, and says where it is.
pub(crate) fn run(options: &PackageOptions) -> Result<bool> {
    let package = make(!options.debug, options.revision.as_deref())?;
    check(&package.file)?;
    for file in [&package.file, &package.symbols] {
        let bytes = file.metadata().with_context(|| format!("looking at {}", file.display()))?.len();
        println!("{} ({:.1} MB)", file.display(), bytes as f64 / 1e6);
    }
    Ok(true)
}

/// Makes the package as hosts should have it, and returns where it is.
///
/// # Errors
///
/// If it cannot be made.
pub(crate) fn make_for_release() -> Result<PathBuf> {
    Ok(make(true, None)?.file)
}

/// Makes the package of the programs that tests have built, for tests that install it, and has lintian look at it.
///
/// # Errors
///
/// If it cannot be made, or lintian finds mistakes.
pub(crate) fn make_and_check() -> Result<()> {
    check(&make(false, None)?.file)
}

/// Builds the programs, for release or as tests have them, and packs them.
///
/// # Errors
///
/// If something does not build, or a tool is missing and cannot be installed.
fn make(release: bool, version: Option<&str>) -> Result<Package> {
    let missing = apt::missing(&TOOLS)?;
    if !missing.is_empty() {
        apt::install(&missing)?;
    }
    let programs = Programs::build_with(release, &[MANUAL])?;
    let target = programs.path("..");
    let target = target.canonicalize().with_context(|| format!("looking for {}", target.display()))?;
    // Apart, so that nobody takes the one for the other.
    let place = target.join(if release { "package" } else { "package/debug" });
    let manual = place.join("manual");
    if manual.exists() {
        std::fs::remove_dir_all(&manual).with_context(|| format!("removing {}", manual.display()))?;
    }
    let written =
        Command::new(programs.path(MANUAL)).arg(&manual).status().context("running memlane-manual")?;
    ensure!(written.success(), "the manual cannot be written");
    // The first package of that version.
    let version = version.unwrap_or(concat!(env!("CARGO_PKG_VERSION"), "-1"));
    let stage = Stage::lay(&place, version, &programs, &manual)?;
    let mut build = Command::new("dpkg-buildpackage");
    // The sources are not packed, and nobody signs.
    build.args(["--build=binary", "--no-sign", "--no-check-builddeps"]).current_dir(stage.directory());
    let output = build.output().context("running dpkg-buildpackage")?;
    if !output.status.success() {
        let (out, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("dpkg-buildpackage ended with {}:\n{out}{errors}", output.status);
    }
    let file = |name: &str| {
        let file = place.join(format!("{name}_{version}_amd64.deb"));
        ensure!(file.exists(), "dpkg-buildpackage has left no {}", file.display());
        Ok(file)
    };
    Ok(Package { file: file("memlane")?, symbols: file("memlane-dbgsym")? })
}

/// Has lintian look for mistakes. What it may find is named, with the reason, in `systemd/debian/lintian-overrides`.
fn check(package: &Path) -> Result<()> {
    let mut lintian = Command::new("lintian");
    // Root packs here as well as anybody.
    lintian.args(["--fail-on", "error,warning", "--allow-root"]).arg(package);
    let output = lintian.output().context("running lintian")?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    ensure!(output.status.success(), "lintian finds mistakes in {}", package.display());
    Ok(())
}

/// Reads a version as Debian has it, which becomes part of file names here.
fn version(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ".+~-".contains(c);
    match text.starts_with(|c: char| c.is_ascii_digit()) && text.chars().all(allowed) {
        true => Ok(text.to_owned()),
        false => Err("a version begins with a digit, and has letters, digits and . + ~ - only".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_no_path() {
        assert!(version("0.1.0-1+local1~2").is_ok());
        for wrong in ["", "a1", "1/2", "1 2", "1_2", "../1"] {
            assert!(version(wrong).is_err(), "{wrong}");
        }
    }
}
