//! The targets of the figures.

use Target::{AtLeast, AtMost};

use super::ratios::{Aim, Target};
use crate::report::ScenarioReport;

/// The targets, by scenario and by the name of the figure.
const TARGETS: &[(&str, &str, Target)] = &[
    ("bulk", "vs_raw", AtLeast(0.9)),
    ("bulk", "vs_qemu", AtLeast(1.15)),
    ("bulk", "cpu_vs_raw", AtMost(1.25)),
    ("bulk", "cpu_vs_qemu", AtMost(0.8)),
    ("bulk", "fresh_vs_qemu", AtLeast(1.5)),
    ("shaped", "of_line", AtLeast(0.97)),
    ("lostport", "vs_ideal", AtMost(1.1)),
    ("busy", "prediction_error_p90_ms", AtMost(20.0)),
    ("busy", "bytes_vs_ideal", AtMost(1.15)),
    ("outrun", "reader_slowdown_percent", AtMost(5.0)),
    ("postcopy", "p50_vs_rpc", AtMost(2.0)),
    ("postcopy", "p99_over_rpc_us", AtMost(1000.0)),
    ("postcopy", "p50_vs_qemu", AtMost(1.0)),
    ("postcopy", "p99_vs_qemu", AtMost(1.0)),
    ("compressible", "compressible_speedup", AtLeast(2.0)),
    ("compressible", "incompressible_vs_off", AtLeast(0.98)),
    ("zero", "zero_scan_gbytes_per_s", AtLeast(8.0)),
    ("zero", "vs_read", AtLeast(0.8)),
    ("sparse", "vs_dense", AtMost(1.5)),
    ("sparse", "empty_round_ms", AtMost(50.0)),
    ("sparse", "daemon_memory_gib", AtMost(2.0)),
    ("many", "slowest_vs_mean", AtLeast(0.8)),
    ("many", "total_vs_one", AtLeast(0.9)),
    ("wan", "of_line", AtLeast(0.85)),
];

/// Returns the target of a figure, if it has one.
pub(super) fn find(scenario: &str, name: &str) -> Option<Target> {
    TARGETS.iter().find(|(of, known, _)| *of == scenario && *known == name).map(|(.., target)| *target)
}

/// Returns the figures of a report that have targets.
pub(super) fn of(report: &ScenarioReport) -> Vec<Aim<'_>> {
    let aims = report.ratios.iter().filter_map(|ratio| {
        let target = find(report.scenario, &ratio.name)?;
        Some(Aim { scenario: report.scenario, name: &ratio.name, spread: ratio.spread, target })
    });
    aims.collect()
}
