//! `cargo xtask bench`: what Memlane reaches, beside what it is held against.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;

/// What to measure.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Arguments for memlane-perf [default: all]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "SCENARIO")]
    arguments: Vec<OsString>,
}

/// Runs memlane-perf; true if it ended well.
pub fn run(options: &Options) -> Result<bool> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["run", "--quiet", "--release", "--locked", "--package", "memlane-perf", "--"]);
    command.args(options.arguments());
    Ok(command.status().context("running cargo for memlane-perf")?.success())
}

impl Options {
    /// With the scenario in front, which is all of them if there is none.
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
    struct Bench {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn a_scenario_may_be_left_out() {
        let arguments = |line: &str| {
            let bench = Bench::parse_from(["bench"].into_iter().chain(line.split_whitespace()));
            bench.options.arguments().join(" ".as_ref()).into_string().expect("UTF-8")
        };
        assert_eq!(arguments(""), "all");
        assert_eq!(arguments("--json --repetitions 1"), "all --json --repetitions 1");
        assert_eq!(arguments("shaped --json --ram 64MiB"), "shaped --json --ram 64MiB");
        assert_eq!(arguments("-- --help"), "--help");
    }
}
