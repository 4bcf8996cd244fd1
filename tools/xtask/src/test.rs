//! `cargo xtask test`: everything that must hold before a change lands.

use std::io::{BufRead, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use memlane_lab::linux::Kernel;
use memlane_lab::{Requirement, missing};
use serde_json::Value;

/// Debian's packages of what tests need.
const PACKAGES: &[(Requirement, &str)] = &[
    (Requirement::Ip, "iproute2"),
    (Requirement::Tc, "iproute2"),
    (Requirement::Qemu, "qemu-system-x86"),
    (Requirement::Sshd, SSHD),
];
const SSHD: &str = "openssh-server";

/// Programs of tests that run at once: each waits for timeouts and for other processes most of the time.
const AT_ONCE: usize = 2;
/// Those that take longest, the longest first: one of them begun last would be waited for alone.
const LONGEST: &[&str] =
    &["qemu_crashes", "matrix", "postcopy", "crashes", "qemu_refusals", "qemu_moves", "stun", "hostile_peer"];

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
    // It would be started, now and whenever the machine is, and nobody asked for that.
    if Path::new("/run/systemd/system").exists() {
        packages.retain(|package| *package != SSHD);
    }
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

/// Runs all tests, and counts them from what they print.
fn tests() -> Result<(Tally, bool)> {
    let programs = Mutex::new(programs()?.into_iter());
    let tally = Mutex::new((Tally::default(), true));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(program) = next(&programs) {
                    let (counted, ok) = program.run();
                    let mut tally = lock(&tally);
                    tally.0.add(&counted);
                    tally.1 &= ok;
                }
            });
        }
    });
    let documented = Program::documentation().run();
    let (mut tally, ok) = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    tally.add(&documented.0);
    // A test that skips itself ends well, and is counted as passed by its runner.
    tally.passed = tally.passed.saturating_sub(tally.skipped);
    Ok((tally, ok && documented.1))
}

/// A program of tests.
struct Program {
    name: String,
    command: Command,
}

/// Builds all programs of tests. Those that may take longest come first.
fn programs() -> Result<Vec<Program>> {
    let output = cargo()
        .args(["test", "--workspace", "--locked", "--no-run", "--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("building the tests")?;
    if !output.status.success() {
        bail!("the tests cannot be built");
    }
    let mut programs: Vec<Program> =
        String::from_utf8_lossy(&output.stdout).lines().filter_map(Program::of_message).collect();
    programs.sort_by_key(|program| {
        LONGEST.iter().position(|name| *name == program.name).unwrap_or(LONGEST.len())
    });
    Ok(programs)
}

impl Program {
    /// The program that a message of cargo's tells of, if it does.
    fn of_message(line: &str) -> Option<Self> {
        let message: Value = serde_json::from_str(line).ok()?;
        if message["profile"]["test"] != true {
            return None;
        }
        let mut command = Command::new(message["executable"].as_str()?);
        // Where cargo runs them too.
        command.current_dir(Path::new(message["manifest_path"].as_str()?).parent()?);
        Some(Self { name: message["target"]["name"].as_str()?.to_owned(), command })
    }

    /// What is run of the documentation.
    fn documentation() -> Self {
        let mut command = cargo();
        command.args(["test", "--workspace", "--locked", "--doc"]);
        Self { name: "documentation".to_owned(), command }
    }

    /// Runs it, and prints what it says in one piece.
    fn run(mut self) -> (Tally, bool) {
        let started = Instant::now();
        let (ok, text) = match self.command.stdin(Stdio::null()).output() {
            Ok(output) => {
                let text = [output.stdout, output.stderr].concat();
                (output.status.success(), String::from_utf8_lossy(&text).into_owned())
            }
            Err(error) => (false, format!("cannot run it: {error}\n")),
        };
        let mut out = std::io::stdout().lock();
        // Whoever reads may be gone; the tests go on.
        let _ = writeln!(out, "\n-- {}, {:.0} s", self.name, started.elapsed().as_secs_f64());
        (tally(text.as_bytes(), out), ok)
    }
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

fn next(programs: &Mutex<std::vec::IntoIter<Program>>) -> Option<Program> {
    lock(programs).next()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
