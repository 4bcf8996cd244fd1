//! `cargo xtask demo`: a guest moves between two hosts while it writes.

mod report;

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use memlane_lab::{
    HostId, LabOptions, Programs, Rate, Requirement, Rig, RigOptions, Vmm, cleanup_on_signal, why_not,
};
use serde_json::{Value, json};

use report::{Demo, Leg};

/// How long the guest runs before it is moved, so that it moves in full swing.
const WARM_UP: Duration = Duration::from_secs(1);
/// How long it runs on at its destination before its memory is compared with the model.
const RUN_ON: Duration = Duration::from_secs(1);
/// The guest's network interface, which is announced after each move.
const NIC: &str = "52:54:00:4d:4c:01@lan";
/// Name of the guest.
const GUEST: &str = "web1";
/// Least bandwidth of an order: the demo may be told to use slow ports.
const MIN_BANDWIDTH: &str = "1mbit";
/// The proof compares all memory while the guest stands still; nobody measures that pause.
const PROOF_LIMIT: &str = "60s";

/// What to show.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Ports of each host
    #[arg(long, default_value_t = 2)]
    ports: usize,
    /// What each port carries, such as 1gbit [default: as much as the machine can]
    #[arg(long)]
    port_rate: Option<Rate>,
    /// Memory of the guest
    #[arg(long, default_value = "1GiB")]
    ram: String,
    /// Virtual CPUs of the guest
    #[arg(long, default_value_t = 1)]
    vcpus: u16,
    /// Pages that the guest writes a second; 0 for an idle guest
    #[arg(long, value_name = "PAGES_PER_S", default_value_t = 10_000)]
    dirty_rate: u64,
    /// The guest writes as fast as it can
    #[arg(long, conflicts_with = "dirty_rate")]
    flat_out: bool,
    /// Memory that the guest writes [default: a quarter of it]
    #[arg(long)]
    working_set: Option<String>,
    /// How written pages are found [default: log; pagemap for a process]
    #[arg(long, value_enum)]
    tracker: Option<Tracker>,
    /// Longest pause that the guest may see
    #[arg(long, default_value = "300ms")]
    downtime_limit: String,
    /// A virtual machine, or threads of a process where there is no KVM
    #[arg(long, value_enum, default_value = "kvm")]
    guest: Guest,
    /// What the guest's memory is made of: memfd, huge (2 MiB pages), or a path
    #[arg(long, default_value = "memfd")]
    backing: String,
    /// Put half of the memory above a hole in the guest's address space
    #[arg(long)]
    gap: bool,
    /// Take the destination's memory from the system before the move, which is faster then
    #[arg(long)]
    prepared: bool,
    /// Move there and back so many times [default: there, once]
    #[arg(long, value_name = "N")]
    round_trips: Option<u32>,
    /// Compare digests of all memory in every move's pause, and not only in one more move at
    /// the end
    #[arg(long)]
    verify: bool,
    /// Print one JSON object at the end, as the last line
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Tracker {
    Log,
    Ring,
    Pagemap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Guest {
    Kvm,
    Process,
}

/// Runs the demo; true if all went well.
pub fn run(options: &Options) -> Result<bool> {
    let needs = if options.guest == Guest::Kvm { Requirement::LAB_WITH_KVM } else { Requirement::LAB };
    if let Some(missing) = why_not(needs) {
        let remedy = if missing.contains("kvm") { "; without KVM, try --guest process" } else { "" };
        bail!(
            "the demo makes network namespaces and needs root: sudo env PATH=\"$PATH\" cargo xtask demo ({missing}){remedy}"
        );
    }
    cleanup_on_signal().context("preparing to clean up")?;
    options.say("building the programs");
    let programs = Programs::build(true)?;
    let lab = LabOptions {
        ports: options.ports,
        port_rate: options.port_rate,
        bridge: true,
        ..LabOptions::default()
    };
    let tables = format!("[limits]\nmin_bandwidth = \"{MIN_BANDWIDTH}\"\n");
    let mut rig = Rig::new(&programs, RigOptions { lab, tables, ..RigOptions::default() })?;
    let demo = options.perform(&mut rig)?;
    if options.json {
        println!("{}", demo.json());
    } else {
        println!("{}", demo.text());
    }
    Ok(demo.is_good())
}

impl Options {
    fn perform(&self, rig: &mut Rig) -> Result<Demo> {
        let mut at = HostId::A;
        self.say(&format!("two hosts, {} each; starting the guest", count(self.ports, "port")));
        let mut vmm = rig.start_vmm(at, GUEST, &self.vmm_arguments(false))?;
        std::thread::sleep(WARM_UP);
        let count = self.round_trips.map_or(1, |round_trips| 2 * round_trips.max(1));
        let mut legs = Vec::new();
        for number in 1..=count {
            let leg;
            (leg, vmm) = self.leg(rig, at, vmm, (number, count))?;
            let good = leg.is_good();
            legs.push(leg);
            if !good {
                break;
            }
            at = other(at);
        }
        let mut proof = None;
        let moved = legs.last().is_some_and(Leg::is_good);
        if moved && !self.verify {
            self.say("once more, comparing digests of all memory in the pause");
            proof = Some(self.prove(rig, at)?);
        }
        drop(vmm);
        Ok(Demo { guest: self.guest_shape(), legs, proof, limit: self.downtime_limit.clone() })
    }

    /// Moves the guest from `at` to the other host; returns what was seen, and the VMM in which
    /// the guest is now.
    fn leg(&self, rig: &mut Rig, at: HostId, mut vmm: Vmm, (number, of): (u32, u32)) -> Result<(Leg, Vmm)> {
        let to = other(at);
        let mut next = rig.start_vmm(to, GUEST, &self.vmm_arguments(true))?;
        vmm.reset_stalls()?;
        let destination = rig.lab().host(to).name().to_owned();
        let mut arguments = vec!["migrate", GUEST, &destination, "--downtime-limit", &self.downtime_limit];
        if self.verify {
            arguments.push("--verify");
        }
        if of > 1 {
            self.say(&format!("move {number} of {of}, to {destination}"));
        }
        let migration = self.order(rig, at, &arguments)?;
        if migration["outcome"] != "completed" {
            return Ok((Leg { number, migration, stats: Value::Null, oracle: Value::Null }, vmm));
        }
        let stats = next.stats()?;
        std::thread::sleep(if number == of { RUN_ON } else { RUN_ON / 5 });
        let oracle = next.verify()?;
        Ok((Leg { number, migration, stats, oracle }, next))
    }

    /// One more move, with `--verify`.
    fn prove(&self, rig: &mut Rig, at: HostId) -> Result<Value> {
        let to = other(at);
        let _next = rig.start_vmm(to, GUEST, &self.vmm_arguments(true))?;
        let destination = rig.lab().host(to).name().to_owned();
        let arguments = ["migrate", GUEST, &destination, "--downtime-limit", PROOF_LIMIT, "--verify"];
        rig.ctl(at, &arguments)?.last().cloned()
    }

    /// Gives an order, and returns how the migration ended.
    fn order(&self, rig: &mut Rig, at: HostId, arguments: &[&str]) -> Result<Value> {
        if self.json {
            let answer = rig.ctl(at, arguments)?;
            let last = answer.last()?.clone();
            ensure!(last.get("error").is_none(), "{}", last["error"]["message"].as_str().unwrap_or_default());
            return Ok(last);
        }
        let status = rig.ctl_command(at, arguments).status().context("running memlanectl")?;
        ensure!(status.code() != Some(3), "the order was refused");
        rig.ctl(at, &["watch", GUEST])?.last().cloned()
    }

    fn vmm_arguments(&self, incoming: bool) -> Vec<String> {
        let mut arguments: Vec<String> = ["--ram", &self.ram, "--nic", NIC].map(str::to_owned).into();
        arguments.extend([
            "--vcpus".into(),
            self.vcpus.to_string(),
            "--backing".into(),
            self.backing.clone(),
        ]);
        if self.flat_out {
            arguments.push("--flat-out".into());
        } else {
            arguments.extend(["--rate".into(), self.dirty_rate.to_string()]);
        }
        if let Some(working_set) = &self.working_set {
            arguments.extend(["--working-set".into(), working_set.clone()]);
        }
        if let Some(tracker) = self.tracker {
            let name = format!("{tracker:?}").to_lowercase();
            arguments.extend(["--tracker".into(), name]);
        }
        if self.guest == Guest::Process {
            arguments.extend(["--guest".into(), "process".into()]);
        }
        if self.gap {
            arguments.push("--gap".into());
        }
        if incoming {
            arguments.push("--incoming".into());
            if self.prepared {
                arguments.push("--prepare".into());
            }
        }
        arguments
    }

    fn guest_shape(&self) -> Value {
        let kvm = self.guest == Guest::Kvm;
        let tracker = match self.tracker {
            Some(tracker) => format!("{tracker:?}").to_lowercase(),
            None if kvm => "log".to_owned(),
            None => "pagemap".to_owned(),
        };
        json!({
            "name": GUEST,
            "vmm": "memlane-vmm",
            "kind": if kvm { "kvm" } else { "process" },
            "vcpus": self.vcpus,
            "tracker": tracker,
            "dirty_rate": if self.flat_out { Value::from("flat out") } else { Value::from(self.dirty_rate) },
        })
    }

    /// Tells what is going on, where that does not get into the way of JSON.
    fn say(&self, text: &str) {
        eprintln!("demo: {text}");
    }
}

fn other(host: HostId) -> HostId {
    if host == HostId::A { HostId::B } else { HostId::A }
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}
