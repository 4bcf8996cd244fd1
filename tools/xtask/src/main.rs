//! The project's own commands: `cargo xtask demo`, `bench`, `package`, `torture`, `soak`, `simulate`, `fuzz` and `test`.

#![forbid(unsafe_code)]

mod apt;
mod bench;
mod cargo;
mod common;
mod demo;
#[cfg(test)]
mod documents;
mod fuzz;
mod package;
mod simulate;
mod soak;
mod test;
mod torture;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The project's own commands.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct XtaskArguments {
    #[command(subcommand)]
    command: XtaskCommand,
}

#[derive(Subcommand)]
enum XtaskCommand {
    /// Move a running guest between two hosts, and prove that nothing was lost
    ///
    /// Builds the programs, makes two hosts out of network namespaces with a daemon in each,
    /// starts a guest that writes its memory all the time, and moves it. Needs root.
    Demo(demo::DemoOptions),
    /// Measure Memlane and what it is held against, in all scenarios or in one
    ///
    /// Builds memlane-perf and runs it with these arguments: cargo xtask bench SCENARIO [--json] ...; see cargo xtask
    /// bench -- --help. Needs root.
    Bench(bench::BenchOptions),
    /// Kill daemons and VMMs at random moments of migrations, and prove that each guest still has one owner
    ///
    /// Builds the programs, makes hosts out of network namespaces, and moves small guests between them, one a round. In
    /// each round one or two of the daemons and VMMs are killed, or stand still for a while, in the middle of it.
    /// When everything is up again, the VMMs themselves are asked where the guest runs and whether its memory is what it
    /// must be. Needs root.
    Torture(torture::TortureOptions),
    /// Move a small fleet of guests to and fro for a long time while things go wrong, and prove that nothing is lost
    ///
    /// Builds the programs, makes two hosts out of network namespaces, and starts guests that live through the whole run: of
    /// memlane-vmm, and a Linux in QEMU. They are moved again and again, each time as another order wants it, while daemons
    /// are killed and restarted, networks fail, and operators change their minds. After each move the guests are asked
    /// whether they are whole, and the daemons whether they agree. Needs root.
    Soak(soak::SoakOptions),
    /// Feed decoders with bytes that are made up as they go, guided by the code that these reach
    ///
    /// Runs the targets in fuzz/ with cargo-fuzz and libFuzzer, on the stable toolchain. What reaches new code is kept in
    /// target/fuzz/found, beside the corpora in fuzz/corpus that cargo xtask test replays.
    Fuzz(fuzz::FuzzOptions),
    /// Make a Debian package of everything that a host needs
    ///
    /// Builds the programs, strips them, and packs them with units, man pages, completions, dashboards and alert rules
    /// into target/package (with --debug, target/package/debug); the debug symbols are a package of their own. Needs root where debhelper and lintian are not
    /// installed yet.
    Package(package::PackageOptions),
    /// Run whole migrations in virtual time, with everything that can go wrong, and prove that no guest is doubled or lost
    ///
    /// Each seed is a run with hosts, a network, VMMs and a guest of its own, all of them simulated; the decisions are
    /// those of the daemon. A seed that fails is printed with the command that shows it again. Needs no root.
    Simulate(simulate::SimulateOptions),
    /// Bring what the tests need, check everything, run all tests, and say what was skipped
    ///
    /// As root this installs packages, and unpacks QEMU in each version that is tested and a kernel into cargo's target
    /// directory. Where that fails, nothing is tested.
    Test(test::TestOptions),
}

fn main() -> ExitCode {
    let done = match XtaskArguments::parse().command {
        XtaskCommand::Demo(options) => demo::run(&options),
        XtaskCommand::Bench(options) => bench::run(&options),
        XtaskCommand::Torture(options) => torture::run(&options),
        XtaskCommand::Soak(options) => soak::run(&options),
        XtaskCommand::Fuzz(options) => fuzz::run(&options),
        XtaskCommand::Package(options) => package::run(&options),
        XtaskCommand::Simulate(options) => simulate::run(&options),
        XtaskCommand::Test(options) => test::run(&options),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cargo xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
