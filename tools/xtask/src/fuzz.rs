//! `cargo xtask fuzz`: feeds decoders with bytes that libFuzzer makes up, guided by the code that they reach.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::cargo;

/// libFuzzer makes no input longer than so many bytes, a little more than the largest file of the corpora has.
const MAX_INPUT_BYTES: u64 = 8 << 10;

/// The options of `cargo xtask fuzz`.
#[derive(Args, Clone, Debug)]
pub(crate) struct FuzzOptions {
    /// The target [default: all of them, one after the other]
    target: Option<String>,
    /// How long each target runs
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
}

/// Fuzzes; returns true if nothing was found.
pub(crate) fn run(options: &FuzzOptions) -> Result<bool> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let all = targets(&workspace)?;
    let chosen = match &options.target {
        None => all,
        Some(target) => {
            ensure!(all.contains(target), "there is no target {target}, only {}", all.join(", "));
            vec![target.clone()]
        }
    };
    require_cargo_fuzz()?;
    for target in chosen {
        if !fuzz(&workspace, &target, options.seconds)? {
            println!(
                "\nfuzz/artifacts/{target} has the bytes; replay them with cargo fuzz run -s none {target} FILE"
            );
            return Ok(false);
        }
    }
    Ok(true)
}

/// Runs one target, and keeps what it finds beside the corpus that is committed.
fn fuzz(workspace: &Path, target: &str, seconds: u64) -> Result<bool> {
    println!("\n== {target}");
    let found = target_directory(workspace).join("fuzz/found").join(target);
    fs::create_dir_all(&found).with_context(|| format!("making {}", found.display()))?;
    let mut command = cargo::command();
    command.current_dir(workspace);
    // The sanitizers of C need a nightly toolchain, and find what safe Rust does not have.
    command.args(["fuzz", "run", "--sanitizer", "none", "--target-dir"]);
    command.arg(target_directory(workspace).join("fuzz")).arg(target).arg(&found);
    command.arg(Path::new("fuzz/corpus").join(target)).arg("--");
    command.arg(format!("-max_total_time={seconds}")).arg(format!("-max_len={MAX_INPUT_BYTES}"));
    command.args(["-timeout=10", "-print_final_stats=1"]);
    Ok(command.status().context("running cargo fuzz")?.success())
}

fn target_directory(workspace: &Path) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    workspace.join(target)
}

/// Returns the names of all targets.
fn targets(workspace: &Path) -> Result<Vec<String>> {
    let folder = workspace.join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry.with_context(|| format!("reading {}", folder.display()))?.path();
        names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

fn require_cargo_fuzz() -> Result<()> {
    let mut command = cargo::command();
    let version = command.args(["fuzz", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !version.is_ok_and(|status| status.success()) {
        bail!(
            "cargo-fuzz is not there; install it, and a C++ compiler for libFuzzer: cargo install cargo-fuzz"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_targets_are_found() {
        let targets = targets(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).expect("a folder");
        assert!(targets.iter().any(|target| target == "guest_file") && targets.len() > 5, "{targets:?}");
    }
}
