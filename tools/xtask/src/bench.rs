//! `cargo xtask bench`: measures Memlane and its baselines.

use std::ffi::OsString;

use anyhow::{Context, Result};
use clap::Args;

use crate::cargo;

/// The options of `cargo xtask bench`.
#[derive(Args, Clone, Debug)]
pub(crate) struct BenchOptions {
    /// Arguments for memlane-perf [default: all]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "SCENARIO")]
    arguments: Vec<OsString>,
}

/// Runs memlane-perf; returns true if it succeeded.
pub(crate) fn run(options: &BenchOptions) -> Result<bool> {
    let mut command = cargo::command();
    command.args(["run", "--quiet", "--release", "--locked", "--package", "memlane-perf", "--"]);
    command.args(options.arguments());
    Ok(command.status().context("running cargo for memlane-perf")?.success())
}

impl BenchOptions {
    /// Returns the arguments with the scenario in front. If there is none, all scenarios are measured.
    fn arguments(&self) -> Vec<OsString> {
        let all = self.arguments.first().is_none_or(|first| first.to_string_lossy().starts_with("--"));
        let help = self.arguments.iter().any(|argument| argument == "--help");
        let all = (all && !help).then(|| "all".into());
        all.into_iter().chain(self.arguments.iter().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct BenchLine {
        #[command(flatten)]
        options: BenchOptions,
    }

    #[test]
    fn a_scenario_may_be_left_out() {
        let arguments = |line: &str| {
            let bench = BenchLine::parse_from(["bench"].into_iter().chain(line.split_whitespace()));
            bench.options.arguments().join(" ".as_ref()).into_string().expect("UTF-8")
        };
        assert_eq!(arguments(""), "all");
        assert_eq!(arguments("--json --repetitions 1"), "all --json --repetitions 1");
        assert_eq!(arguments("shaped --json --ram 64MiB"), "shaped --json --ram 64MiB");
        assert_eq!(arguments("-- --help"), "--help");
    }
}
