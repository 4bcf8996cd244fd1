//! `cargo xtask test`: everything that must hold before a change lands.

mod dependencies;
mod program;
mod setup;

use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use clap::Args;
use memlane_lab::vm::Image;
use memlane_lab::{Requirement, why_not};

use crate::{cargo, package};
use program::{TestCounts, TestProgram};

/// The number of test programs that run at once: each waits for timeouts and for other processes most of the time.
const AT_ONCE: usize = 2;
/// The arguments by which cargo builds all tests.
const ALL: &[&str] = &["--workspace"];
/// The arguments by which cargo builds the tests of large guests.
const LARGE: &[&str] = &["--package", "memlaned", "--test", "large"];
/// The arguments by which cargo builds the tests of hosts that are VMs.
const VMS: &[&str] = &["--package", "memlane-lab", "--test", "vm"];
/// The arguments by which a test program runs the tests that are left out otherwise, one at a time.
const ALONE: &[&str] = &["--ignored", "--test-threads=1"];

/// The options of `cargo xtask test`.
#[derive(Args, Clone, Debug)]
pub(crate) struct TestOptions {
    /// Run nothing but the tests that are left out otherwise, one after the other: guests of 8 GiB, whose memory is
    /// taken from the system at both ends, so that 20 GiB have to be free
    #[arg(long)]
    large: bool,
    /// Run nothing but the tests of hosts that are virtual machines, whose image and snapshot are made first where they are
    /// not there yet
    #[arg(long, conflicts_with = "large")]
    vm: bool,
}

/// Runs the checks and the tests; returns true if all is well.
pub(crate) fn run(options: &TestOptions) -> Result<bool> {
    setup::bring().context("installing what tests need (nothing was tested)")?;
    let mut tally = TestCounts::default();
    let all = !options.large && !options.vm;
    if options.vm {
        Image::obtain().context("making the image of VMs (nothing was tested)")?;
    }
    if all {
        tally.add(&dependencies::check()?);
        step("formatting", &["fmt", "--all", "--check"])?;
        step("lints", &["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"])?;
        step("documentation", &["doc", "--workspace", "--no-deps", "--locked"])?;
    }
    if all && why_not(&[Requirement::Root]).is_none() {
        println!("\n== package");
        package::make_and_check()?;
        tally.passed += 1;
    }
    println!("\n== tests");
    let (tested, mut ok) = match (options.large, options.vm) {
        (true, _) => tests(LARGE, 1, ALONE),
        (_, true) => tests(VMS, 1, &[]),
        _ => tests(ALL, AT_ONCE, &[]),
    }?;
    tally.add(&tested);
    if all {
        let (documented, well) = program::run_documentation();
        tally.add(&documented);
        ok &= well;
    }
    // A test that skips itself ends well, and is counted as passed by its runner.
    tally.passed = tally.passed.saturating_sub(tally.skipped);
    println!();
    if tally.skipped > 0 {
        println!("Skipped tests are named above, each with what is missing on this machine.");
    }
    println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped);
    Ok(ok && tally.failed == 0)
}

fn step(what: &str, arguments: &[&str]) -> Result<()> {
    println!("\n== {what}");
    let status =
        cargo::strict().args(arguments).status().with_context(|| format!("running cargo for {what}"))?;
    if !status.success() {
        bail!("{what}: cargo {} failed; its output above says why", arguments.join(" "));
    }
    Ok(())
}

/// Builds the tests that `chosen` names, runs `at_once` programs at a time, and counts the results from their output.
fn tests(chosen: &[&str], at_once: usize, arguments: &[&str]) -> Result<(TestCounts, bool)> {
    let programs = Mutex::new(program::build(chosen)?.into_iter());
    let tally = Mutex::new((TestCounts::default(), true));
    let work = || -> Result<()> {
        while let Some(program) = next(&programs) {
            let (counted, ok) = program.run(arguments)?;
            let mut tally = lock(&tally);
            tally.0.add(&counted);
            tally.1 &= ok;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
    })?;
    Ok(tally.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn next(programs: &Mutex<std::vec::IntoIter<TestProgram>>) -> Option<TestProgram> {
    lock(programs).next()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
