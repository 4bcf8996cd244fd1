//! How long the guest waited, as text and as JSON.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::PostcopyOptions;
use crate::baseline::report::RpcFigures;
use crate::report::Spread;

/// When the guest goes ahead of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// At once.
    Now,
    /// After one round of pre-copy.
    Hybrid,
}

/// What [`measure`](super::measure) found.
#[derive(Debug, Clone, Serialize)]
pub struct PostcopyReport {
    /// Always `postcopy`.
    pub scenario: &'static str,
    /// What was moved, and over what.
    pub settings: Settings,
    /// Half of the pages that were asked for over an idle connection came within so many microseconds.
    pub rpc_p50_us: Spread,
    /// 99 of 100 of them did.
    pub rpc_p99_us: Spread,
    /// The same of half of them, if both ends shared a processor.
    pub rpc_one_cpu_p50_us: Spread,
    /// And of 99 of 100.
    pub rpc_one_cpu_p99_us: Spread,
    /// What was found in each mode, by its name.
    pub modes: BTreeMap<&'static str, ModeFigures>,
}

/// What was moved, and over what.
#[derive(Debug, Clone, Serialize)]
pub struct Settings {
    /// `kvm` or `process`.
    pub guest: &'static str,
    /// The guest's RAM, all of it random.
    pub ram_bytes: u64,
    /// What the guest wrote of it.
    pub working_set_bytes: u64,
    /// Pages that it wrote a second; as many as it could if there is no number.
    pub dirty_rate: Option<u64>,
    /// Its virtual CPUs that wrote.
    pub vcpus: u16,
    /// Those that only read.
    pub readers: u16,
    /// Ports between the hosts.
    pub ports: u8,
    /// What each carried at most.
    pub port_bits_per_second: Option<u64>,
    /// Moves in each mode.
    pub repetitions: u32,
}

/// What was found in one mode.
#[derive(Debug, Clone, Serialize)]
pub struct ModeFigures {
    /// Times that the guest waited for a page.
    pub faults: Spread,
    /// Half of these took so many microseconds or less, from when the fault was seen until the page was placed.
    pub fault_p50_us: Spread,
    /// 99 of 100 did.
    pub fault_p99_us: Spread,
    /// All did.
    pub fault_max_us: Spread,
    /// `fault_p50_us` over `rpc_p50_us` of the same run.
    pub fault_p50_ratio: Spread,
    /// `fault_p99_us` less `rpc_p99_us` of the same run.
    pub fault_p99_minus_rpc_p99_us: Spread,
    /// What the stream carried beside the faults: contents of pages, in units of 10^9.
    pub stream_gbit_per_second: Spread,
    /// From the guest's first instruction there until its last page was there.
    pub postcopy_seconds: Spread,
    /// From its last instruction here to its first there.
    pub downtime_seconds: Spread,
    /// The single moves.
    pub runs: Vec<Run>,
}

/// One move.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// What pages took over an idle connection, just before.
    #[serde(flatten)]
    pub rpc: RpcFigures,
    /// What the guest's faults took.
    #[serde(flatten)]
    pub faults: Faults,
    /// As in [`ModeFigures`].
    pub downtime_seconds: f64,
    /// From the order to the last page.
    pub total_seconds: f64,
}

/// What a daemon tells of post-copy.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Faults {
    /// Times that the guest waited for a page.
    pub faults: u64,
    /// The median wait.
    pub fault_p50_us: f64,
    /// What 99 of 100 waits did not exceed.
    pub fault_p99_us: f64,
    /// The longest wait.
    pub fault_max_us: f64,
    /// Pages that came because the guest waited for them.
    pub pages_fetched: u64,
    /// Pages that came before anybody had asked for them.
    pub pages_streamed: u64,
    /// How long pages were missing.
    pub seconds: f64,
}

impl Mode {
    /// Both.
    pub(super) const ALL: [Self; 2] = [Self::Now, Self::Hybrid];

    /// As `memlanectl migrate --postcopy` knows it.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Now => "now",
            Self::Hybrid => "hybrid",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Settings {
    pub(super) fn new(options: &PostcopyOptions, kvm: bool) -> Self {
        Self {
            guest: if kvm { "kvm" } else { "process" },
            ram_bytes: options.ram.bytes(),
            working_set_bytes: options.working_set().bytes(),
            dirty_rate: options.dirty_rate,
            vcpus: options.vcpus,
            readers: options.readers,
            ports: options.ports,
            port_bits_per_second: options.port_rate.map(|rate| rate.bits_per_second()),
            repetitions: options.repetitions,
        }
    }
}

impl Run {
    /// A move that ended as `migration`, in which the guest waited for pages.
    pub(super) fn new(rpc: RpcFigures, migration: &Value) -> Result<Self> {
        let of = &migration["postcopy"];
        ensure!(of.is_object(), "there was no post-copy in {migration}");
        ensure!(
            of["faults"] != 0,
            "the guest waited for no page: let it write more of its memory, or make the ports slower"
        );
        let faults = Faults::deserialize(of).with_context(|| format!("no figures of post-copy in {of}"))?;
        let seconds = |key: &str| {
            migration[key].as_f64().with_context(|| format!("no {key} of the migration in {migration}"))
        };
        let (downtime_seconds, total_seconds) = (seconds("downtime_seconds")?, seconds("total_seconds")?);
        Ok(Self { rpc, faults, downtime_seconds, total_seconds })
    }

    fn stream_gbit_per_second(&self) -> f64 {
        let bits = self.faults.pages_streamed as f64 * 4096.0 * 8.0;
        bits / 1e9 / self.faults.seconds.max(1e-9)
    }
}

impl PostcopyReport {
    /// Puts together what was found in all modes; there is at least one run in each.
    pub(super) fn new(settings: Settings, runs: [Vec<Run>; Mode::ALL.len()]) -> Self {
        let rpc =
            |of: fn(&RpcFigures) -> f64| Spread::of(runs.iter().flatten().map(|run| of(&run.rpc)).collect());
        Self {
            scenario: "postcopy",
            settings,
            rpc_p50_us: rpc(|rpc| rpc.rpc_p50_us),
            rpc_p99_us: rpc(|rpc| rpc.rpc_p99_us),
            rpc_one_cpu_p50_us: rpc(|rpc| rpc.rpc_one_cpu_p50_us),
            rpc_one_cpu_p99_us: rpc(|rpc| rpc.rpc_one_cpu_p99_us),
            modes: (Mode::ALL.into_iter().zip(runs))
                .map(|(mode, runs)| (mode.as_str(), ModeFigures::new(runs)))
                .collect(),
        }
    }
}

impl ModeFigures {
    fn new(runs: Vec<Run>) -> Self {
        let spread = |of: fn(&Run) -> f64| Spread::of(runs.iter().map(of).collect());
        Self {
            faults: spread(|run| run.faults.faults as f64),
            fault_p50_us: spread(|run| run.faults.fault_p50_us),
            fault_p99_us: spread(|run| run.faults.fault_p99_us),
            fault_max_us: spread(|run| run.faults.fault_max_us),
            fault_p50_ratio: spread(|run| run.faults.fault_p50_us / run.rpc.rpc_p50_us),
            fault_p99_minus_rpc_p99_us: spread(|run| run.faults.fault_p99_us - run.rpc.rpc_p99_us),
            stream_gbit_per_second: spread(Run::stream_gbit_per_second),
            postcopy_seconds: spread(|run| run.faults.seconds),
            downtime_seconds: spread(|run| run.downtime_seconds),
            runs,
        }
    }
}

impl fmt::Display for PostcopyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Settings { guest, ram_bytes, working_set_bytes, vcpus, readers, ports, .. } = &self.settings;
        let rate = match self.settings.dirty_rate {
            None => "as fast as it can".to_owned(),
            Some(rate) => format!("at {rate} pages a second"),
        };
        let carries = match self.settings.port_bits_per_second {
            None => "unlimited".to_owned(),
            Some(rate) => format!("{:.2} Gbit/s each", rate as f64 / 1e9),
        };
        writeln!(
            f,
            "a {guest} guest of {} MiB writes {} MiB {rate}, {vcpus} vCPU(s) and {readers} that only read; {ports} \
             port(s), {carries}; {} move(s) each: median (least–most)",
            ram_bytes >> 20,
            working_set_bytes >> 20,
            self.settings.repetitions,
        )?;
        writeln!(f)?;
        let names = ["faults", "p50 µs", "p99 µs", "max µs", "stream Gbit/s", "seconds", "downtime ms"];
        row(f, "", names.map(str::to_owned))?;
        for (mode, figures) in &self.modes {
            let columns = [
                figures.faults.text(1.0, 0),
                figures.fault_p50_us.text(1.0, 0),
                figures.fault_p99_us.text(1.0, 0),
                figures.fault_max_us.text(1.0, 0),
                figures.stream_gbit_per_second.text(1.0, 2),
                figures.postcopy_seconds.text(1.0, 2),
                figures.downtime_seconds.text(1e3, 1),
            ];
            row(f, mode, columns)?;
        }
        let raw = [
            ("raw page", self.rpc_p50_us, self.rpc_p99_us),
            ("on 1 cpu", self.rpc_one_cpu_p50_us, self.rpc_one_cpu_p99_us),
        ];
        for (name, p50, p99) in raw {
            let none = String::new;
            row(f, name, [none(), p50.text(1.0, 0), p99.text(1.0, 0), none(), none(), none(), none()])?;
        }
        for (mode, figures) in &self.modes {
            write!(
                f,
                "\n  {mode}: half of the faults took at most {} times what half of the raw pages took, 99 of 100 at \
                 most {} µs more",
                figures.fault_p50_ratio.text(1.0, 2),
                figures.fault_p99_minus_rpc_p99_us.text(1.0, 0),
            )?;
        }
        Ok(())
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, columns: [String; 7]) -> fmt::Result {
    let mut line = format!("  {name:<9}");
    for column in columns {
        line += &format!(" {column:>20}");
    }
    writeln!(f, "{}", line.trim_end())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn migration(p50: f64) -> Value {
        json!({
            "downtime_seconds": 0.012,
            "total_seconds": 2.5,
            "postcopy": {
                "faults": 1000,
                "fault_p50_us": p50,
                "fault_p99_us": 900.0,
                "fault_max_us": 5000,
                "pages_fetched": 990,
                "pages_streamed": 250_000,
                "seconds": 2.0,
                "remaining_pages": 0,
            },
        })
    }

    fn probe() -> RpcFigures {
        RpcFigures::new(vec![Duration::from_micros(100); 10], vec![Duration::from_micros(30)])
    }

    fn run(p50: f64) -> Run {
        let rpc = probe();
        Run::new(rpc, &migration(p50)).expect("figures")
    }

    #[test]
    fn faults_are_held_against_the_probe_of_their_run() {
        let settings = Settings {
            guest: "kvm",
            ram_bytes: 1 << 30,
            working_set_bytes: 1 << 29,
            dirty_rate: None,
            vcpus: 1,
            readers: 0,
            ports: 2,
            port_bits_per_second: Some(1_000_000_000),
            repetitions: 2,
        };
        let report = PostcopyReport::new(settings, [vec![run(150.0), run(250.0)], vec![run(120.0)]]);
        let json = serde_json::to_value(&report).expect("JSON");
        let now = &json["modes"]["now"];
        assert_eq!(now["fault_p50_ratio"]["median"], 2.0);
        assert_eq!(now["fault_p99_minus_rpc_p99_us"]["max"], 800.0);
        assert_eq!(now["stream_gbit_per_second"]["min"], 4.096);
        let single = &json["modes"]["hybrid"]["runs"][0];
        assert_eq!((&single["fault_p50_us"], &single["rpc_p50_us"]), (&json!(120.0), &json!(100.0)));
        let text = report.to_string();
        for part in [
            "as fast as it can",
            "1.00 Gbit/s each",
            "now: half",
            "2.00 (1.50–2.50) times",
            "800 (800–800) µs",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_move_without_faults_tells_nothing() {
        let mut none = migration(1.0);
        none["postcopy"]["faults"] = json!(0);
        for (migration, words) in [
            (none, "waited for no page"),
            (json!({ "postcopy": null }), "no post-copy"),
            (json!({}), "no post-copy"),
        ] {
            let error = Run::new(probe(), &migration).expect_err("no figures");
            assert!(error.to_string().contains(words), "{error}");
        }
        let mut broken = migration(1.0);
        broken["postcopy"]["fault_p99_us"] = Value::Null;
        assert!(Run::new(probe(), &broken).is_err());
    }
}
