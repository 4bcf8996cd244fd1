//! Dashboards and alerts are of metrics that there are, Grafana and Prometheus understand them, and when guests have moved
//! every panel has something to show.

mod alerts;
mod dashboards;
mod grafana;
mod metrics;
mod moves;
mod prometheus;

use std::io::{self, Write as _};
use std::process::{Command, Output, Stdio};

/// Runs a program to its end with this as its input.
fn fed(command: &mut Command, input: &str) -> io::Result<Output> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    // Whoever ends before it has read everything says why.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    child.wait_with_output()
}
