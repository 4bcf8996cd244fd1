//! What the moves took, as text and as JSON.

use std::collections::BTreeMap;
use std::fmt;

use memlane_lab::linux::LinuxGuest;
use serde::Serialize;

use super::way::Way;
use super::{DOWNTIME_LIMIT, QemuOptions};
use crate::cpu::Used;
use crate::report::Spread;

/// What [`measure`](super::measure) found. GB are powers of ten.
#[derive(Debug, Clone, Serialize)]
pub struct QemuReport {
    /// Always `qemu`.
    pub scenario: &'static str,
    /// What was moved, and over what.
    pub settings: Settings,
    /// Memlane's medians held against those of QEMU: plain, multifd, and as `qemu` the faster one of these.
    ///
    /// `vs_*` is how many times faster Memlane was from the order to the guest's running there; `downtime_vs_*`,
    /// `bytes_vs_*` and `cpu_vs_*` (CPU seconds of the whole move) are Memlane's part of what QEMU took.
    pub ratios: BTreeMap<String, f64>,
    /// What Memlane took.
    pub memlane: Figures,
    /// What QEMU's own migration took, by its kind: `plain`, `multifd4`.
    pub baselines: BTreeMap<String, Figures>,
}

/// What was moved, and over what.
#[derive(Debug, Clone, Serialize)]
pub struct Settings {
    /// The guest's RAM.
    pub ram_bytes: u64,
    /// What the guest filled of it.
    pub touched_bytes: u64,
    /// Pages that it wrote a second.
    pub dirty_rate: u64,
    /// Its virtual CPUs.
    pub vcpus: u16,
    /// What executed its instructions.
    pub accelerator: &'static str,
    /// The Linux that it ran.
    pub kernel: String,
    /// Ports between the hosts.
    pub ports: u8,
    /// What each carried at most.
    pub port_bits_per_second: Option<u64>,
    /// Whether all RAM was taken from the system beforehand.
    pub prealloc: bool,
    /// What the guest's RAM was made of when QEMU moved it by itself: `tmpfs`, as for Memlane, or `anonymous`.
    pub baseline_memory: &'static str,
    /// Longest pause that was allowed.
    pub downtime_limit_seconds: f64,
    /// Moves in each way.
    pub repetitions: u32,
}

/// What one way of moving took.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// From the order until the guest ran at the destination, whose QEMU had been started beforehand.
    pub total_seconds: Spread,
    /// From the guest's standing still at the source until it ran at the destination, by QEMU's own events.
    pub downtime_seconds: Spread,
    /// Bytes sent for RAM, headers included.
    pub ram_bytes: Spread,
    /// CPU time of both ends, without what they used anyway.
    pub cpu_seconds: Spread,
    /// The same for each GB of `ram_bytes`.
    pub cpu_seconds_per_gb: Spread,
    /// The single moves.
    pub runs: Vec<Run>,
    /// How it was seen that a guest did not arrive whole, for each such move. They count for nothing else.
    pub broken: Vec<String>,
}

/// One move.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Run {
    /// As in [`Figures`].
    pub total_seconds: f64,
    /// As in [`Figures`].
    pub downtime_seconds: f64,
    /// As in [`Figures`].
    pub ram_bytes: u64,
    /// As in [`Figures`].
    pub cpu_seconds: f64,
    /// What was subtracted: CPU time of the same processes in as much time just before the order.
    pub idle_cpu_seconds: f64,
    /// As in [`Figures`].
    pub cpu_seconds_per_gb: f64,
}

/// What has come of moves in one way.
#[derive(Default)]
pub(super) struct Results {
    /// The good ones.
    pub(super) runs: Vec<Run>,
    /// What was wrong with each of the others.
    pub(super) broken: Vec<String>,
}

/// What was measured of one move; times in seconds.
pub(super) struct Parts {
    pub(super) total: f64,
    pub(super) downtime: f64,
    pub(super) ram_bytes: u64,
    pub(super) used: Used,
    /// What was used while nothing moved.
    pub(super) idle: Used,
}

impl Run {
    pub(super) fn new(parts: Parts) -> Self {
        let cpu_seconds = parts.used.beyond(&parts.idle);
        Self {
            total_seconds: parts.total,
            downtime_seconds: parts.downtime,
            ram_bytes: parts.ram_bytes,
            cpu_seconds,
            idle_cpu_seconds: parts.used.processes + parts.used.kernel - cpu_seconds,
            cpu_seconds_per_gb: cpu_seconds / (parts.ram_bytes as f64 / 1e9),
        }
    }
}

impl Settings {
    pub(super) fn new(options: &QemuOptions, guest: &LinuxGuest) -> Self {
        Self {
            ram_bytes: guest.ram.bytes(),
            touched_bytes: guest.working_set.bytes(),
            dirty_rate: guest.rate,
            vcpus: guest.vcpus,
            accelerator: guest.accelerator.as_str(),
            kernel: guest.kernel.release().to_owned(),
            ports: options.ports,
            port_bits_per_second: options.port_rate.map(|rate| rate.bits_per_second()),
            prealloc: guest.prealloc,
            baseline_memory: if options.anonymous { "anonymous" } else { "tmpfs" },
            downtime_limit_seconds: DOWNTIME_LIMIT.as_secs_f64(),
            repetitions: options.repetitions,
        }
    }
}

impl QemuReport {
    /// Puts together what was measured of each way; there is at least one run of each.
    pub(super) fn new(settings: Settings, memlane: Results, baselines: Vec<(Way, Results)>) -> Self {
        let memlane = Figures::new(memlane);
        let baselines: BTreeMap<String, Figures> =
            baselines.into_iter().map(|(way, results)| (way.to_string(), Figures::new(results))).collect();
        let fastest =
            baselines.values().min_by(|a, b| a.total_seconds.median.total_cmp(&b.total_seconds.median));
        let named = baselines.iter().map(|(name, figures)| (name.as_str(), figures));
        let mut ratios = BTreeMap::new();
        for (name, figures) in named.chain(fastest.map(|figures| ("qemu", figures))) {
            let part = |of: fn(&Figures) -> Spread| of(&memlane).median / of(figures).median;
            ratios.insert(format!("vs_{name}"), 1.0 / part(|figures| figures.total_seconds));
            ratios.insert(format!("downtime_vs_{name}"), part(|figures| figures.downtime_seconds));
            ratios.insert(format!("bytes_vs_{name}"), part(|figures| figures.ram_bytes));
            ratios.insert(format!("cpu_vs_{name}"), part(|figures| figures.cpu_seconds));
        }
        Self { scenario: "qemu", settings, ratios, memlane, baselines }
    }
}

impl Figures {
    fn new(Results { runs, broken }: Results) -> Self {
        let spread = |of: fn(&Run) -> f64| Spread::of(runs.iter().map(of).collect());
        Self {
            total_seconds: spread(|run| run.total_seconds),
            downtime_seconds: spread(|run| run.downtime_seconds),
            ram_bytes: spread(|run| run.ram_bytes as f64),
            cpu_seconds: spread(|run| run.cpu_seconds),
            cpu_seconds_per_gb: spread(|run| run.cpu_seconds_per_gb),
            runs,
            broken,
        }
    }
}

impl fmt::Display for QemuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Settings { vcpus, accelerator, ports, baseline_memory, repetitions, .. } = &self.settings;
        let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
        let (ram, touched) = (mib(self.settings.ram_bytes), mib(self.settings.touched_bytes));
        let writes = match self.settings.dirty_rate {
            0 => "idle".to_owned(),
            rate => format!("writing {rate} pages a second"),
        };
        let memory = if self.settings.prealloc { "preallocated" } else { "fresh" };
        writeln!(
            f,
            "Linux under QEMU ({accelerator}), {ram} with {touched} filled, {vcpus} vCPU(s), {writes}; {ports} \
             port(s), {memory} memory ({baseline_memory} for QEMU's own migration), {repetitions} move(s) each: median \
             (least–most)"
        )?;
        writeln!(f)?;
        row(f, "", ["total s", "downtime ms", "RAM sent GB", "CPU s", "CPU s per GB"].map(str::to_owned))?;
        let all = std::iter::once(("memlane", &self.memlane));
        for (name, figures) in
            all.chain(self.baselines.iter().map(|(name, figures)| (name.as_str(), figures)))
        {
            let columns = [
                figures.total_seconds.text(1.0, 2),
                figures.downtime_seconds.text(1e3, 1),
                figures.ram_bytes.text(1e-9, 3),
                figures.cpu_seconds.text(1.0, 2),
                figures.cpu_seconds_per_gb.text(1.0, 2),
            ];
            row(f, name, columns)?;
        }
        writeln!(f)?;
        for name in self.baselines.keys() {
            let ratio = |kind: &str| self.ratios[&format!("{kind}vs_{name}")];
            writeln!(
                f,
                "  against {name}: {:.2} times as fast, with {:.2} of the downtime, {:.2} of the bytes and {:.2} of \
                 the CPU time",
                ratio(""),
                ratio("downtime_"),
                ratio("bytes_"),
                ratio("cpu_")
            )?;
        }
        for (name, figures) in &self.baselines {
            if let [first, ..] = &figures.broken[..] {
                let number = figures.broken.len();
                writeln!(
                    f,
                    "  {number} more move(s) by {name} broke the guest and count for nothing: {first}"
                )?;
            }
        }
        write!(
            f,
            "  from the order to the guest's running there; the destination's QEMU was started beforehand, in all"
        )
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, columns: [String; 5]) -> fmt::Result {
    write!(f, "  {name:<9}")?;
    for column in columns {
        write!(f, " {column:>21}")?;
    }
    writeln!(f)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(runs: Vec<Run>) -> Results {
        Results { runs, broken: Vec::new() }
    }

    fn run(total: f64, cpu: f64) -> Run {
        let idle = Used { elapsed: total, processes: 0.5, kernel: 0.0 };
        let used = Used { elapsed: total, processes: cpu, kernel: 0.0 };
        Run::new(Parts { total, downtime: total / 10.0, ram_bytes: 2_000_000_000, used, idle })
    }

    #[test]
    fn memlane_is_held_against_each_and_the_fastest() {
        let settings = Settings {
            ram_bytes: 1 << 30,
            touched_bytes: 1 << 29,
            dirty_rate: 0,
            vcpus: 1,
            accelerator: "tcg",
            kernel: "6.1".into(),
            ports: 2,
            port_bits_per_second: None,
            prealloc: false,
            baseline_memory: "tmpfs",
            downtime_limit_seconds: 0.3,
            repetitions: 1,
        };
        let broken = Results { runs: vec![run(3.0, 4.5)], broken: vec!["it is silent".into()] };
        let baselines = vec![(Way::Plain, results(vec![run(4.0, 2.5)])), (Way::Multifd(4), broken)];
        let memlane = results(vec![run(1.0, 1.5), run(2.0, 1.5), run(9.0, 1.5)]);
        let report = QemuReport::new(settings, memlane, baselines);
        let ratio = |name: &str| report.ratios[name];
        assert_eq!((ratio("vs_plain"), ratio("vs_multifd4"), ratio("vs_qemu")), (2.0, 1.5, 1.5));
        assert_eq!((ratio("cpu_vs_plain"), ratio("cpu_vs_qemu")), (0.5, 0.25));
        assert_eq!(report.memlane.cpu_seconds_per_gb.median, 0.5);
        let text = report.to_string();
        for part in ["against multifd4: 1.50 times as fast", "idle", "1 more move(s) by multifd4", "silent"] {
            assert!(text.contains(part), "{text}");
        }
        let json = serde_json::to_value(&report).expect("JSON");
        assert_eq!(json["baselines"]["plain"]["total_seconds"]["median"], 4.0);
    }
}
