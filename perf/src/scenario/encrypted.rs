//! `encrypted`: what encryption costs, of an idle guest of incompressible memory, and of one that waits for its pages.
//!
//! Everything is measured between daemons that encrypt and between daemons that do not. The baselines are
//!
//! - **raw**: bare sockets with as many connections as Memlane had lanes, which encrypt nothing;
//! - **cipher**: one core that seals and opens records with the cipher of the lanes, in its cache;
//! - **qemu**: stock QEMU's own migration with TLS, over 4 multifd channels.
//!
//! The *limit* is what raw sockets and the cipher allow together on cores that both ends share: the time that raw
//! sockets take for a byte, and the time to seal and to open it, divided by the number of cores that work on it.

use anyhow::{Context, Result};
use clap::Args;
use memlane_lab::{HostId, LabOptions, Requirement, Rig, Size};
use serde_json::{Value, json};

use super::{Bench, CaseResult, Scenario};
use crate::baseline::cipher;
use crate::baseline::memory::{MemoryState, SharedMemory};
use crate::baseline::qemu::QemuMethod;
use crate::baseline::qemu::firmware::Firmware;
use crate::baseline::raw;
use crate::memlane::{BenchGuest, WriteLoad};
use crate::report::{Case, CaseRuns, Contender, NamedFigures, ScenarioReport};

const RATE: &str = "gbit_per_second";
const ROUND_ONE: &str = "round_one_gbit_per_second";
const CPU: &str = "cpu_seconds_per_gb";
const P50: &str = "fault_p50_us";
const DOWNTIME: &str = "downtime_ms";
const STOCK: QemuMethod = QemuMethod::MultifdTls(4);

/// The options of the scenario.
#[derive(Args, Debug, Clone)]
pub struct EncryptedScenario {
    /// Memory of the guests
    #[arg(long, default_value = "2GiB")]
    pub ram: Size,
    /// Ports between the two hosts; Memlane has lanes on each, and QEMU all its connections on the first
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub ports: u8,
    /// Leave QEMU's own migration out
    #[arg(long)]
    pub without_qemu: bool,
}

#[derive(Clone, Copy)]
enum EncryptedCase {
    /// An idle guest moves, and whether it is encrypted.
    Idle(bool),
    /// A guest that writes all the time moves by post-copy, and whether it is encrypted.
    Postcopy(bool),
    Raw,
    Cipher,
    Qemu,
}

impl Scenario for EncryptedScenario {
    const NAME: &'static str = "encrypted";

    fn needs(&self) -> &'static [Requirement] {
        if self.without_qemu { Requirement::LAB } else { Requirement::LAB_WITH_QEMU }
    }

    fn measure(&self, bench: &Bench) -> Result<ScenarioReport> {
        let lab = || LabOptions { ports: usize::from(self.ports), ..LabOptions::default() };
        let (mut plain, mut encrypted) = (bench.rig(lab())?, bench.encrypted_rig(lab())?);
        let bytes = self.ram.bytes().try_into()?;
        let contents = SharedMemory::with_pattern(bytes)?;
        let firmware = (!self.without_qemu).then(|| Firmware::new(plain.lab(), bytes)).transpose()?;
        let (idle, writer) = (self.idle(&plain), self.writer(&plain));
        let mut lanes = usize::from(self.ports);

        let mut cases = cases();
        cases.retain(|(_, what)| !self.without_qemu || !matches!(what, EncryptedCase::Qemu));
        let runs = bench.interleave(Self::NAME, &cases, |what| {
            let figures = match *what {
                EncryptedCase::Idle(encrypt) => {
                    let rig = if encrypt { &mut encrypted } else { &mut plain };
                    let moved = idle.migrate(rig, &[], |_, _| {})?.arrived()?;
                    lanes = lanes.max(moved.lanes());
                    return moved.measured();
                }
                EncryptedCase::Postcopy(encrypt) => {
                    let rig = if encrypt { &mut encrypted } else { &mut plain };
                    let order = ["--postcopy", "now", "--downtime-limit", "5s"];
                    let moved = writer.migrate(rig, &order, |_, _| {})?.arrived()?;
                    let p50 = moved.migration["postcopy"][P50].as_f64();
                    let figures = NamedFigures::from([(P50, p50.context("the guest waited for no page")?)]);
                    return Ok(moved.with_figures(figures));
                }
                EncryptedCase::Raw => {
                    let each = lanes.div_ceil(usize::from(self.ports));
                    let took = raw::transfer(plain.lab(), &contents, each, MemoryState::Prepared)?;
                    took.figures(contents.len())
                }
                EncryptedCase::Cipher => cipher::measure(bytes)?,
                EncryptedCase::Qemu => {
                    let firmware = firmware.as_ref().context("there is no guest in QEMU")?;
                    firmware.migrate(plain.lab(), STOCK, MemoryState::Prepared)?.figures(self.ram.bytes())
                }
            };
            Ok(CaseResult { figures, detail: Value::Null, ..CaseResult::default() })
        })?;
        self.report(runs)
    }
}

fn ours(encrypt: bool) -> Case {
    Contender::Memlane.case(if encrypt { "encrypted" } else { "plain" })
}

fn postcopy(encrypt: bool) -> Case {
    Contender::Memlane.case(if encrypt { "postcopy encrypted" } else { "postcopy plain" })
}

fn raw_sockets() -> Case {
    Contender::Raw.case("")
}

fn one_core() -> Case {
    Contender::Cipher.case("AES-128-GCM")
}

fn stock() -> Case {
    Contender::Qemu.case(STOCK.to_string())
}

/// Returns all cases. Measurements that take a third of a second come three times, with others in between, because a
/// shared machine is sometimes slower for about as long.
fn cases() -> Vec<(Case, EncryptedCase)> {
    let short = || {
        [
            (ours(true), EncryptedCase::Idle(true)),
            (raw_sockets(), EncryptedCase::Raw),
            (ours(false), EncryptedCase::Idle(false)),
            (one_core(), EncryptedCase::Cipher),
        ]
    };
    let mut cases = Vec::from(short());
    cases.extend([true, false].map(|encrypt| (postcopy(encrypt), EncryptedCase::Postcopy(encrypt))));
    cases.extend(short());
    cases.push((stock(), EncryptedCase::Qemu));
    cases.extend(short());
    cases
}

impl EncryptedScenario {
    fn idle(&self, rig: &Rig) -> BenchGuest {
        BenchGuest { prepared: true, ..BenchGuest::idle(self.ram, rig.lab().host(HostId::A).has_kvm()) }
    }

    fn writer(&self, rig: &Rig) -> BenchGuest {
        BenchGuest {
            writes: WriteLoad::FlatOut,
            working_set: Some(self.ram.part(2)),
            ..BenchGuest::idle(self.ram, rig.lab().host(HostId::A).has_kvm())
        }
    }

    fn report(&self, runs: CaseRuns) -> Result<ScenarioReport> {
        let (encrypted, plain) = (ours(true), ours(false));
        let (postcopy, postcopy_plain, stock) = (postcopy(true), postcopy(false), stock());
        let cores = std::thread::available_parallelism()?.get().min(2 * usize::from(self.ports));
        let [raw, seal, open] = [
            runs.medians(&raw_sockets(), RATE)?,
            runs.medians(&one_core(), "seal_gbit_per_second")?,
            runs.medians(&one_core(), "open_gbit_per_second")?,
        ];
        let limit = |repetition: &u32| {
            let cipher = 1.0 / seal[repetition] + 1.0 / open[repetition];
            1.0 / (1.0 / raw[repetition] + cipher / cores as f64)
        };
        let rates = runs.medians(&encrypted, ROUND_ONE)?;
        let of_limit = rates.iter().map(|(repetition, rate)| rate / limit(repetition)).collect();
        let limits: Vec<f64> = rates.keys().map(limit).collect();
        let over = |above, below, figure| runs.quotients((above, figure), (below, figure));
        let downtimes = runs.medians(&plain, DOWNTIME)?;
        let more = runs.medians(&encrypted, DOWNTIME)?;
        let more = more.iter().map(|(repetition, time)| time - downtimes[repetition]).collect();
        let mut ratios = vec![
            (
                "vs_limit",
                of_limit,
                "round one, of what raw sockets and the cipher allow together on these cores".to_owned(),
            ),
            ("limit_gbit_per_second", limits, "that limit".to_owned()),
            (
                "vs_plain",
                over(&encrypted, &plain, ROUND_ONE)?,
                "round one, of the same without encryption".into(),
            ),
            ("cpu_vs_plain", over(&encrypted, &plain, CPU)?, "processor time for a GB, of the same".into()),
            ("downtime_more_ms", more, "pause of an idle guest, beyond that without encryption".into()),
            (
                "postcopy_p50_vs_plain",
                over(&postcopy, &postcopy_plain, P50)?,
                "what half of the waits for a page did not exceed, over the same without encryption".into(),
            ),
        ];
        if runs.cases().iter().any(|case| case.by == Contender::Qemu) {
            let meaning = format!("the whole move, times as fast as {stock}, over the first port");
            ratios.push(("vs_qemu_tls", over(&encrypted, &stock, RATE)?, meaning));
        }
        let headline = format!(
            "guests of {}, incompressible, over {} port(s), with TLS and without",
            self.ram, self.ports
        );
        let settings = json!({ "ram_bytes": self.ram.bytes(), "ports": self.ports, "cores": cores });
        let mut report = ScenarioReport::new(Self::NAME, headline, &settings, runs)?;
        for (name, values, meaning) in ratios {
            report.ratio(name, values, meaning);
        }
        report.columns = vec![RATE, ROUND_ONE, "total_seconds", DOWNTIME, CPU, P50];
        Ok(report)
    }
}
