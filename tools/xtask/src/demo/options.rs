//! The options of the demo, and the orders that follow from them.

use std::ffi::OsString;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use memlane_lab::{HostId, Rate, Rig, Size};
use serde_json::Value;

/// The time that the guest runs before it is moved, so that it moves at its full speed.
pub(crate) const WARM_UP: Duration = Duration::from_secs(1);
/// The time that the guest runs at its destination before its memory is compared with the model.
pub(crate) const RUN_ON: Duration = Duration::from_secs(1);
/// Name of the guest.
pub(crate) const GUEST: &str = "web1";
/// The downtime limit of the move that proves the memory equal. It compares all memory while the guest is paused, and
/// that pause is not measured.
pub(crate) const PROOF_LIMIT: &str = "60s";

/// The options of `cargo xtask demo`.
#[derive(Args, Clone, Debug)]
pub(crate) struct DemoOptions {
    /// What the two hosts are made of
    #[arg(long, value_enum, default_value = "namespaces")]
    pub hosts: HostsChoice,
    /// Ports of each host
    #[arg(long, default_value_t = 2)]
    pub ports: usize,
    /// What each port carries, such as 1gbit [default: as much as the machine can]
    #[arg(long)]
    pub port_rate: Option<Rate>,
    /// Memory of the guest [default: 1GiB; 256MiB on hosts that are VMs]
    #[arg(long)]
    pub ram: Option<Size>,
    /// Virtual CPUs of the guest
    #[arg(long, default_value_t = 1)]
    pub vcpus: u16,
    /// Further virtual CPUs of the guest, which only read and compute; not for qemu [default: 1 with
    /// --converge, else 0]
    #[arg(long, value_name = "NUMBER")]
    pub readers: Option<u16>,
    /// Pages that the guest writes a second; 0 for an idle guest [default: 10000; 2000 for qemu]
    #[arg(long, value_name = "PAGES_PER_S")]
    pub dirty_rate: Option<u64>,
    /// The guest writes as fast as it can
    #[arg(long, conflicts_with = "dirty_rate")]
    pub flat_out: bool,
    /// Memory that the guest writes [default: a quarter of it]
    #[arg(long)]
    pub working_set: Option<Size>,
    /// How written pages are found [default: ring where stun may come, so that it costs readers little, else log;
    /// pagemap for a process and QEMU]
    #[arg(long, value_enum)]
    pub tracker: Option<TrackerChoice>,
    /// When the guest's memory is sent: before the guest, partly after it, or all after it
    #[arg(long, value_enum, default_value = "precopy")]
    pub mode: SendMode,
    /// What to do about a guest that writes faster than the ports carry [default: what memlanectl does]
    #[arg(long, value_enum, value_name = "HOW")]
    pub converge: Option<ConvergeChoice>,
    /// Largest part of its writing that stun may take from the guest, in percent [default: what memlanectl allows]
    #[arg(long, value_name = "PERCENT")]
    pub max_stun: Option<u8>,
    /// Longest pause that the guest may see [default: 300ms; 10s on hosts that are VMs, whose processors are emulated]
    #[arg(long)]
    pub downtime_limit: Option<String>,
    /// A small virtual machine, threads of a process where there is no KVM, or Linux under a stock
    /// QEMU, with a client that talks to it through a switch
    #[arg(long, value_enum, default_value = "kvm")]
    pub guest: GuestChoice,
    /// The QEMU of a QEMU guest: the number of one that the tests use (7.2, 10.0, 11), which is unpacked first where it is
    /// not there yet, or the path of any other [default: 11]
    #[arg(long, value_name = "VERSION|PATH")]
    pub qemu: Option<OsString>,
    /// What executes the instructions of a QEMU guest
    #[arg(long, value_enum, default_value = "auto")]
    pub accelerator: AcceleratorChoice,
    /// What the guest's memory is made of: memfd, huge (2 MiB pages), or a path [default: memfd]
    #[arg(long)]
    pub backing: Option<String>,
    /// Put half of the memory above a hole in the guest's address space
    #[arg(long)]
    pub gap: bool,
    /// Take the guest's memory from the system before it starts, at both ends: the move is faster then
    #[arg(long)]
    pub prepared: bool,
    /// Move there and back so many times [default: there, once; 1 for qemu]
    #[arg(long, value_name = "N")]
    pub round_trips: Option<u32>,
    /// Leave the traffic between the hosts unencrypted, for comparison
    #[arg(long)]
    pub insecure: bool,
    /// Compare digests of all memory in every move's pause, and not only in one more move at
    /// the end
    #[arg(long)]
    pub verify: bool,
    /// Print one JSON object at the end, as the last line
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum HostsChoice {
    /// Network namespaces, with a daemon in each
    Namespaces,
    /// Systems of Debian in namespaces, which systemd has started and on which the package is installed; for qemu
    Systemd,
    /// Virtual machines with a kernel, systemd, KVM and disks of their own, on which the package is installed; for qemu
    Vm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TrackerChoice {
    Log,
    Ring,
    Pagemap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SendMode {
    /// The guest runs there when all its memory is there
    Precopy,
    /// The guest runs there after one round, and fetches what it has written meanwhile
    Hybrid,
    /// The guest runs there at once, and fetches all its memory
    Postcopy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConvergeChoice {
    /// Slow its writes
    Stun,
    /// Let it run there, and fetch the rest
    Postcopy,
    /// Slow its writes within bounds, and then let it run there and fetch the rest
    Auto,
    /// Give up; it runs on here
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum GuestChoice {
    Kvm,
    Process,
    Qemu,
}

/// The executor of the guest's instructions.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum AcceleratorChoice {
    /// KVM where a stock Linux boots under it, else TCG
    Auto,
    /// The processor
    Kvm,
    /// QEMU
    Tcg,
}

impl DemoOptions {
    /// Returns the number of moves; `default` if none was ordered.
    pub(crate) fn moves(&self, default: u32) -> u32 {
        self.round_trips.map_or(default, |round_trips| 2 * round_trips.max(1))
    }

    /// Returns the longest pause that the guest may see.
    pub(crate) fn limit(&self) -> &str {
        let usual = if self.hosts == HostsChoice::Vm { "10s" } else { "300ms" };
        self.downtime_limit.as_deref().unwrap_or(usual)
    }

    /// Returns the size of the guest's memory.
    pub(crate) fn ram(&self) -> Size {
        self.ram.unwrap_or(Size::from_mib(if self.hosts == HostsChoice::Vm { 256 } else { 1024 }))
    }

    /// Returns the order to move the guest.
    pub(crate) fn migrate(&self, destination: &str) -> Vec<String> {
        let mut arguments = vec!["migrate", GUEST, destination, "--downtime-limit", self.limit()];
        match self.mode {
            SendMode::Precopy => {}
            SendMode::Hybrid => arguments.extend(["--postcopy", "hybrid"]),
            SendMode::Postcopy => arguments.extend(["--postcopy", "now"]),
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
    pub(crate) fn order(
        &self,
        rig: &Rig,
        at: HostId,
        arguments: &[String],
        look: impl FnMut(&Value),
    ) -> Result<Value> {
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

    /// Returns how written pages are found; `None` if the VMM's own default will do.
    pub(crate) fn tracker(&self) -> Option<TrackerChoice> {
        let stun = matches!(self.converge, Some(ConvergeChoice::Stun | ConvergeChoice::Auto));
        self.tracker.or((stun && self.guest == GuestChoice::Kvm).then_some(TrackerChoice::Ring))
    }

    /// Returns the number of the guest's vCPUs that only read.
    pub(crate) fn readers(&self) -> u16 {
        let qemu = self.guest == GuestChoice::Qemu;
        self.readers.unwrap_or(u16::from(self.converge.is_some() && !qemu))
    }

    /// Says on stderr what is going on, where it does not disturb the JSON.
    pub(crate) fn say(&self, text: &str) {
        eprintln!("demo: {text}");
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct DemoLine {
        #[command(flatten)]
        options: DemoOptions,
    }

    fn options(line: &str) -> DemoOptions {
        DemoLine::parse_from(["demo"].into_iter().chain(line.split_whitespace())).options
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
        assert_eq!(["--converge stun", "--converge auto"].map(tracker), [Some(TrackerChoice::Ring); 2]);
        assert_eq!(["", "--converge none", "--converge stun --guest process"].map(tracker), [None; 3]);
        assert_eq!(tracker("--converge stun --tracker log"), Some(TrackerChoice::Log));
    }
}
