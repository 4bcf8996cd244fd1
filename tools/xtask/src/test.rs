//! `cargo xtask test`: everything that must hold before a change lands.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use memlane_lab::linux::Kernel;
use memlane_lab::{Requirement, missing};

/// Debian's packages of what tests need.
const PACKAGES: &[(Requirement, &str)] =
    &[(Requirement::Ip, "iproute2"), (Requirement::Tc, "iproute2"), (Requirement::Qemu, "qemu-system-x86")];

#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
}

pub fn run() -> Result<bool> {
    install();
    step("formatting", &["fmt", "--all", "--check"])?;
    step("lints", &["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"])?;
    // SAFETY: this program has one thread.
    unsafe { std::env::set_var("RUSTDOCFLAGS", "-D warnings") };
    step("documentation", &["doc", "--workspace", "--no-deps", "--locked"])?;
    println!("\n== tests");
    let (tally, ok) = tests()?;
    println!();
    if tally.skipped > 0 {
        println!("Skipped tests are named above, each with what it lacks here.");
    }
    println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped);
    Ok(ok && tally.failed == 0)
}

/// Installs what is missing, where that can be done; tests that still lack something say so.
fn install() {
    let lacking = |requirement| !missing(&[requirement]).is_empty();
    if lacking(Requirement::Root) {
        return;
    }
    let mut packages: Vec<&str> =
        PACKAGES.iter().filter(|(need, _)| lacking(*need)).map(|(_, package)| *package).collect();
    packages.dedup();
    if !packages.is_empty() {
        println!("== installing {}", packages.join(" "));
        apt_get(&["update", "-q"]);
        apt_get(&[&["install", "-qy", "--no-install-recommends"], &packages[..]].concat());
    }
    if lacking(Requirement::Kernel) {
        println!("== fetching a kernel for Linux guests");
        match Kernel::obtain() {
            Ok(kernel) => println!("Linux {}", kernel.release()),
            Err(error) => println!("{error:#}; going on without"),
        }
    }
}

fn apt_get(arguments: &[&str]) {
    match Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive").status() {
        Ok(status) if status.success() => {}
        Ok(status) => println!("apt-get ended with {status}; going on without"),
        Err(error) => println!("cannot run apt-get ({error}); do it by hand; going on without"),
    }
}

fn step(what: &str, arguments: &[&str]) -> Result<()> {
    println!("\n== {what}");
    let status = cargo().args(arguments).status().with_context(|| format!("running cargo for {what}"))?;
    if !status.success() {
        bail!("{what}: cargo {} found something", arguments.join(" "));
    }
    Ok(())
}

/// Runs all tests and counts them from what they print.
fn tests() -> Result<(Tally, bool)> {
    let mut run = cargo()
        .args(["test", "--workspace", "--locked", "--no-fail-fast"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("running cargo test")?;
    let (stdout, stderr) = (run.stdout.take(), run.stderr.take());
    let follow = |stream: Option<Box<dyn std::io::Read + Send>>| {
        std::thread::spawn(move || {
            stream.map(|stream| tally(BufReader::new(stream), std::io::stdout())).unwrap_or_default()
        })
    };
    let out = follow(stdout.map(|stream| Box::new(stream) as _));
    let err = follow(stderr.map(|stream| Box::new(stream) as _));
    let status = run.wait().context("waiting for cargo test")?;
    let (out, err) =
        (out.join().expect("counting does not panic"), err.join().expect("counting does not panic"));
    let tally = Tally {
        passed: out.passed + err.passed,
        failed: out.failed + err.failed,
        skipped: out.skipped + err.skipped,
    };
    // A test that skips itself ends well, and is counted as passed by its runner.
    let passed = tally.passed.saturating_sub(tally.skipped);
    Ok((Tally { passed, ..tally }, status.success()))
}

/// Passes lines on to `out`, and counts results and skips.
fn tally(stream: impl BufRead, mut out: impl Write) -> Tally {
    let mut tally = Tally::default();
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

fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
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
