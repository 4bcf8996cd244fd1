//! `cargo xtask demo`: a guest moves between two hosts while it writes.

mod converge;
mod format;
mod linked;
mod linux;
mod report;

use std::ffi::OsString;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use memlane_lab::{
    HostId, LabOptions, Programs, Rate, Requirement, Rig, RigOptions, Size, cleanup_on_signal, qemu, why_not,
};
use serde_json::Value;

use linux::Choice;

/// How long the guest runs before it is moved, so that it moves in full swing.
const WARM_UP: Duration = Duration::from_secs(1);
/// How long it runs on at its destination before its memory is compared with the model.
const RUN_ON: Duration = Duration::from_secs(1);
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
    ram: Size,
    /// Virtual CPUs of the guest
    #[arg(long, default_value_t = 1)]
    vcpus: u16,
    /// Virtual CPUs that the guest has moreover, which only read and compute; not for qemu [default: 1 with
    /// --converge, else 0]
    #[arg(long, value_name = "NUMBER")]
    readers: Option<u16>,
    /// Pages that the guest writes a second; 0 for an idle guest [default: 10000; 2000 for qemu]
    #[arg(long, value_name = "PAGES_PER_S")]
    dirty_rate: Option<u64>,
    /// The guest writes as fast as it can
    #[arg(long, conflicts_with = "dirty_rate")]
    flat_out: bool,
    /// Memory that the guest writes [default: a quarter of it]
    #[arg(long)]
    working_set: Option<Size>,
    /// How written pages are found [default: ring where stun may come, so that it costs readers little, else log;
    /// pagemap for a process and QEMU]
    #[arg(long, value_enum)]
    tracker: Option<Tracker>,
    /// When the guest's memory is sent: before the guest, partly after it, or all after it
    #[arg(long, value_enum, default_value = "precopy")]
    mode: Mode,
    /// What to do about a guest that writes faster than the ports carry [default: what memlanectl does]
    #[arg(long, value_enum, value_name = "HOW")]
    converge: Option<Converge>,
    /// How much of its writing stun may keep the guest from [default: what memlanectl allows]
    #[arg(long, value_name = "PERCENT")]
    max_stun: Option<u8>,
    /// Longest pause that the guest may see
    #[arg(long, default_value = "300ms")]
    downtime_limit: String,
    /// A small virtual machine, threads of a process where there is no KVM, or Linux under a stock
    /// QEMU, with a client that talks to it through a switch
    #[arg(long, value_enum, default_value = "kvm")]
    guest: Guest,
    /// The QEMU of a QEMU guest: the number of one that the tests use (7.2, 10.0), which is unpacked first where it is
    /// not there yet, or the path of any other [default: 10.0]
    #[arg(long, value_name = "VERSION|PATH")]
    qemu: Option<OsString>,
    /// What executes the instructions of a QEMU guest
    #[arg(long, value_enum, default_value = "auto")]
    accelerator: Choice,
    /// What the guest's memory is made of: memfd, huge (2 MiB pages), or a path [default: memfd]
    #[arg(long)]
    backing: Option<String>,
    /// Put half of the memory above a hole in the guest's address space
    #[arg(long)]
    gap: bool,
    /// Take the guest's memory from the system before it starts, at both ends: the move is faster then
    #[arg(long)]
    prepared: bool,
    /// Move there and back so many times [default: there, once; 1 for qemu]
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Tracker {
    Log,
    Ring,
    Pagemap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// The guest runs there when all its memory is there
    Precopy,
    /// It runs there after one round, and fetches what it has written meanwhile
    Hybrid,
    /// It runs there at once, and fetches all its memory
    Postcopy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Converge {
    /// Slow its writes
    Stun,
    /// Let it run there, and fetch the rest
    Postcopy,
    /// The first, within bounds, and then the second
    Auto,
    /// Give up; it runs on here
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Guest {
    Kvm,
    Process,
    Qemu,
}

/// Runs the demo; true if all went well.
pub fn run(options: &Options) -> Result<bool> {
    let qemu = options.guest == Guest::Qemu;
    if let Some(which) = &options.qemu {
        // SAFETY: this program has one thread.
        unsafe { std::env::set_var(qemu::VARIABLE, which) };
    }
    if qemu && why_not(&[Requirement::Root]).is_none() {
        qemu::obtain()?;
    }
    let more = match options.guest {
        Guest::Kvm => &[Requirement::Kvm][..],
        Guest::Process => &[],
        Guest::Qemu => &[Requirement::Qemu],
    };
    if let Some(missing) = why_not(&[Requirement::LAB, more].concat()) {
        let remedy = if missing.contains("/dev/kvm") { "; without KVM, try --guest process" } else { "" };
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
        switch: qemu,
        ..LabOptions::default()
    };
    let tables = format!("[limits]\nmin_bandwidth = \"{MIN_BANDWIDTH}\"\n");
    let mut rig =
        Rig::new(&programs, RigOptions { lab, tables, may_start_guests: qemu, ..RigOptions::default() })?;
    options.say(&format!("two hosts, {} each; starting the guest", count(options.ports, "port")));
    let demo = if qemu { options.move_linux_guest(&mut rig) } else { options.move_linked_guest(&mut rig) }?;
    if options.json {
        println!("{}", demo.json());
    } else {
        println!("{}", demo.text());
    }
    Ok(demo.is_good())
}

impl Options {
    /// Number of moves; `default` if none was ordered.
    fn moves(&self, default: u32) -> u32 {
        self.round_trips.map_or(default, |round_trips| 2 * round_trips.max(1))
    }

    /// The order to move the guest.
    fn migrate(&self, destination: &str) -> Vec<String> {
        let mut arguments = vec!["migrate", GUEST, destination, "--downtime-limit", &self.downtime_limit];
        match self.mode {
            Mode::Precopy => {}
            Mode::Hybrid => arguments.extend(["--postcopy", "hybrid"]),
            Mode::Postcopy => arguments.extend(["--postcopy", "now"]),
        }
        if self.verify {
            arguments.push("--verify");
        }
        let mut arguments: Vec<String> = arguments.into_iter().map(str::to_owned).collect();
        if let Some(converge) = self.converge {
            arguments.extend(["--converge".into(), format!("{converge:?}").to_lowercase()]);
        }
        if let Some(percent) = self.max_stun {
            arguments.extend(["--max-stun".into(), percent.to_string()]);
        }
        arguments
    }

    /// Gives an order and shows how it goes; returns how the migration ended. `look` sees each of its states.
    fn order(&self, rig: &Rig, at: HostId, arguments: &[String], look: impl FnMut(&Value)) -> Result<Value> {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(["--detach"]).collect();
        let answer = rig.ctl(at, &arguments)?;
        let begun = answer.last()?;
        let refused = begun["error"]["message"].as_str();
        ensure!(refused.is_none(), "the order was refused: {}", refused.unwrap_or_default());
        let id = begun["id"].as_str().with_context(|| format!("no migration in {}", answer.text.trim()))?;
        let shown = match self.json {
            true => None,
            false => Some(rig.ctl_command(at, &["watch", id]).spawn().context("running memlanectl")?),
        };
        let ended = rig.watch(at, id, look)?;
        if let Some(mut shown) = shown {
            shown.wait().context("waiting for memlanectl")?;
        }
        Ok(ended)
    }

    /// How written pages are found, where the VMM's own default will not do.
    fn tracker(&self) -> Option<Tracker> {
        let stun = matches!(self.converge, Some(Converge::Stun | Converge::Auto));
        self.tracker.or((stun && self.guest == Guest::Kvm).then_some(Tracker::Ring))
    }

    /// Number of the guest's vCPUs that only read.
    fn readers(&self) -> u16 {
        let qemu = self.guest == Guest::Qemu;
        self.readers.unwrap_or(u16::from(self.converge.is_some() && !qemu))
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Demo {
        #[command(flatten)]
        options: Options,
    }

    fn options(line: &str) -> Options {
        Demo::parse_from(["demo"].into_iter().chain(line.split_whitespace())).options
    }

    #[test]
    fn the_order_says_when_memory_is_sent_and_what_is_done_if_it_does_not_converge() {
        let order = |line: &str| options(line).migrate("host-b").join(" ");
        assert_eq!(order(""), "migrate web1 host-b --downtime-limit 300ms");
        assert!(order("--mode hybrid").ends_with("300ms --postcopy hybrid"));
        assert!(order("--mode postcopy --verify").ends_with("300ms --postcopy now --verify"));
        assert!(order("--converge auto --max-stun 40").ends_with("300ms --converge auto --max-stun 40"));
    }

    #[test]
    fn a_guest_that_may_be_stunned_has_a_reader_unless_it_is_told_otherwise() {
        let readers = |line: &str| options(line).readers();
        assert_eq!(["", "--converge stun", "--converge none --guest process"].map(readers), [0, 1, 1]);
        assert_eq!(["--converge stun --guest qemu", "--converge stun --readers 0"].map(readers), [0, 0]);
        assert_eq!(readers("--readers 3"), 3);
    }

    #[test]
    fn a_guest_that_may_be_stunned_has_dirty_rings_unless_it_is_told_otherwise() {
        let tracker = |line: &str| options(line).tracker();
        assert_eq!(["--converge stun", "--converge auto"].map(tracker), [Some(Tracker::Ring); 2]);
        assert_eq!(["", "--converge none", "--converge stun --guest process"].map(tracker), [None; 3]);
        assert_eq!(tracker("--converge stun --tracker log"), Some(Tracker::Log));
    }
}
