//! Programs of tests, as cargo builds them.

use std::fs;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use memlane_lab::qemu::{self, Version};
use serde_json::Value;

use crate::cargo;

/// The programs that take longest, the longest first. If one of them started last, it would run alone at the end.
const LONGEST: &[&str] =
    &["qemu_crashes", "matrix", "postcopy", "crashes", "qemu_refusals", "qemu_moves", "stun", "hostile_peer"];

/// The results of tests, counted.
#[derive(Default)]
pub(crate) struct TestCounts {
    /// The number of tests that passed, in all versions of QEMU together. Skipped tests are among them.
    pub passed: u64,
    /// The number of tests that failed.
    pub failed: u64,
    /// The number of tests that were skipped.
    pub skipped: u64,
}

/// A program of tests.
pub(crate) struct TestProgram {
    name: String,
    path: PathBuf,
    /// The directory in which cargo would run it.
    directory: PathBuf,
}

/// Builds the test programs that `chosen` names. Those that may take longest come first.
pub(crate) fn build(chosen: &[&str]) -> Result<Vec<TestProgram>> {
    let output = cargo::command()
        .args(["test", "--locked", "--no-run", "--message-format", "json-render-diagnostics"])
        .args(chosen)
        .stderr(Stdio::inherit())
        .output()
        .context("building the tests")?;
    if !output.status.success() {
        bail!("the tests cannot be built");
    }
    let mut programs: Vec<TestProgram> =
        String::from_utf8_lossy(&output.stdout).lines().filter_map(TestProgram::of_message).collect();
    programs.sort_by_key(|program| {
        LONGEST.iter().position(|name| *name == program.name).unwrap_or(LONGEST.len())
    });
    Ok(programs)
}

/// Runs the tests in the documentation.
pub(crate) fn run_documentation() -> (TestCounts, bool) {
    let mut command = cargo::strict();
    command.args(["test", "--workspace", "--locked", "--doc"]);
    run("documentation", command)
}

impl TestProgram {
    /// Returns the program that a message of cargo describes, if it describes one.
    fn of_message(line: &str) -> Option<Self> {
        let message: Value = serde_json::from_str(line).ok()?;
        if message["profile"]["test"] != true {
            return None;
        }
        Some(Self {
            name: message["target"]["name"].as_str()?.to_owned(),
            path: message["executable"].as_str()?.into(),
            directory: Path::new(message["manifest_path"].as_str()?).parent()?.to_owned(),
        })
    }

    /// Runs the program's tests, and runs those of them that use QEMU with every version. `arguments` are for the test
    /// runner.
    pub(crate) fn run(&self, arguments: &[&str]) -> Result<(TestCounts, bool)> {
        let noted = tempfile::NamedTempFile::new().context("making a file")?;
        let (newest, older) = qemu::VERSIONS.split_last().context("no version of QEMU is tested")?;
        let mut command = self.command(*newest, arguments);
        command.env(qemu::TESTS, noted.path());
        let (mut tally, mut ok) = run(&self.name, command);
        let noted = fs::read_to_string(noted.path()).context("reading which tests use QEMU")?;
        let noted: Vec<&str> = noted.lines().collect();
        for version in older.iter().filter(|_| !noted.is_empty()) {
            let mut command = self.command(*version, arguments);
            command.args(&noted);
            let (with_it, well) = run(&format!("{} with QEMU {}", self.name, version.name), command);
            tally.add(&with_it);
            ok &= well;
        }
        Ok((tally, ok))
    }

    fn command(&self, version: Version, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.path);
        command.args(arguments).current_dir(&self.directory).env(qemu::VARIABLE, version.program());
        command
    }
}

/// Runs tests, and prints their output in one piece.
fn run(name: &str, mut command: Command) -> (TestCounts, bool) {
    let started = Instant::now();
    let (ok, text) = match command.stdin(Stdio::null()).output() {
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            (output.status.success(), String::from_utf8_lossy(&text).into_owned())
        }
        Err(error) => (false, format!("cannot run it: {error}\n")),
    };
    let mut out = std::io::stdout().lock();
    // Whoever reads may be gone; the tests go on.
    let _ = writeln!(out, "\n-- {name}, {:.0} s", started.elapsed().as_secs_f64());
    (tally(text.as_bytes(), out), ok)
}

impl TestCounts {
    /// Adds other counts to these.
    pub(crate) fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// Passes lines on to `out`, and counts results and skips.
fn tally(stream: impl BufRead, mut out: impl Write) -> TestCounts {
    let mut tally = TestCounts::default();
    for line in stream.lines().map_while(Result::ok) {
        // Whoever reads may be gone; the tests go on.
        let _ = writeln!(out, "{line}");
        if line.contains("SKIPPED ") {
            tally.skipped += 1;
        }
        if let Some(counts) = line.strip_prefix("test result: ") {
            let count = |what| {
                counts.split([';', '.']).find_map(|part| part.trim().strip_suffix(what)?.trim().parse().ok())
            };
            tally.passed += count(" passed").unwrap_or(0u64);
            tally.failed += count(" failed").unwrap_or(0u64);
        }
    }
    tally
}

#[cfg(test)]
mod tests {
    #[test]
    fn results_and_skips_are_counted() {
        let text = "running 2 tests\nSKIPPED a: no KVM\ntest a ... ok\n\
                    test result: FAILED. 12 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let tally = super::tally(text.as_bytes(), std::io::sink());
        assert_eq!((tally.passed, tally.failed, tally.skipped), (12, 3, 1));
    }
}
