//! The command line of `memlane-vmm`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::bail;
use clap::{Parser, ValueEnum};
use memlane_api::units::{BadUnit, Size};
use memlane_kvm::compat::Feature;
use memlane_kvm::ram::Backing;
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::machine::{MAX_NICS, Nic, TrackerKind};

use crate::vmm::VmmConfig;
use crate::workload::{Fill, Pattern, TICK, Workload, WriteRate};

/// Runs a guest that writes its memory and can prove it whole, for tests and demonstrations of
/// live migration.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Flags {
    /// Name of the guest
    #[arg(long, default_value = "guest")]
    name: Label,
    /// Memory of the guest, a multiple of 2MiB
    #[arg(long, default_value = "1GiB", value_parser = bytes)]
    ram: u64,
    /// Put half of the memory above a hole in the guest's address space
    #[arg(long)]
    gap: bool,
    /// Memory that the guest may touch, in 64 pieces from the beginning to the end of it all; only of a process
    /// [default: all]
    #[arg(long, value_parser = bytes)]
    resident: Option<u64>,
    /// What the memory is made of: memfd, huge (2 MiB pages), or a path on tmpfs or hugetlbfs
    #[arg(long, default_value = "memfd", value_parser = backing)]
    backing: Backing,
    /// Take all memory from the system before the guest starts
    #[arg(long)]
    prepare: bool,
    /// Number of virtual CPUs, 1 to 8
    #[arg(long, default_value_t = 1)]
    vcpus: u16,
    /// How many of the virtual CPUs only read and compute, as fast as they can, all over the working set; at least one
    /// must write
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    readers: u16,
    /// A virtual machine, or threads of this process
    #[arg(long, value_enum, default_value = "kvm")]
    guest: GuestKind,
    /// How written pages are found [default: log for kvm, pagemap for process]
    #[arg(long, value_enum)]
    tracker: Option<TrackerFlag>,
    /// Memory that the guest writes [default: a quarter of what it may touch]
    #[arg(long, value_parser = bytes)]
    working_set: Option<u64>,
    /// Pages written a second by all virtual CPUs together; 0 for an idle guest
    #[arg(long, default_value_t = 1000, conflicts_with = "flat_out")]
    rate: u64,
    /// Milliseconds from one wake-up of a virtual CPU to the next, unless it is flat out; up to so much of a pause is not
    /// seen by the guest's own clock
    #[arg(long, value_name = "MS", default_value_t = TICK.as_millis() as u64, value_parser = clap::value_parser!(u64).range(1..=1000))]
    tick_ms: u64,
    /// Write as fast as possible
    #[arg(long)]
    flat_out: bool,
    /// Order in which pages are written: uniform, sequential or hot-cold
    #[arg(long, default_value = "uniform")]
    pattern: Pattern,
    /// Number that makes one run like another
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What the memory holds at the start, in percent of its pages
    #[arg(long, default_value = "zero=50,random=30,compressible=20")]
    fill: Fill,
    /// Network interface of the guest, as MAC@NETWORK; may be repeated
    #[arg(long, value_parser = nic)]
    nic: Vec<Nic>,
    /// Processor feature that the guest is not given, such as avx2; may be repeated
    #[arg(long, value_name = "FEATURE")]
    without_cpuid: Vec<Feature>,
    /// Attach socket of the Memlane daemon
    #[arg(long, value_name = "SOCKET")]
    attach: Option<PathBuf>,
    /// Wait for a guest from another host instead of starting one
    #[arg(long, requires = "attach")]
    incoming: bool,
    /// Socket to ask the guest's statistics from; must not exist
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
    /// File to which each change of the guest's standing is appended, with its time
    #[arg(long, value_name = "FILE")]
    pub history: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum GuestKind {
    Kvm,
    Process,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TrackerFlag {
    Log,
    Ring,
    Pagemap,
}

impl Flags {
    /// Returns the configuration of the VMM that these flags ask for.
    ///
    /// # Errors
    ///
    /// If flags contradict each other.
    pub fn config(self) -> anyhow::Result<VmmConfig> {
        let kvm = self.guest == GuestKind::Kvm;
        let tracker = match self.tracker {
            Some(TrackerFlag::Log) => TrackerKind::Log,
            Some(TrackerFlag::Ring) => TrackerKind::Ring,
            Some(TrackerFlag::Pagemap) => TrackerKind::Pagemap,
            None if kvm => TrackerKind::Log,
            None => TrackerKind::Pagemap,
        };
        if self.nic.len() > MAX_NICS {
            bail!("a guest can have {MAX_NICS} network interfaces, not {}", self.nic.len());
        }
        let working_set =
            self.working_set.unwrap_or(self.resident.unwrap_or(self.ram) / 4 / PAGE_SIZE * PAGE_SIZE);
        if !working_set.is_multiple_of(PAGE_SIZE)
            || self.resident.is_some_and(|resident| !resident.is_multiple_of(PAGE_SIZE))
        {
            bail!("what is resident, and the working set, must be whole pages of 4KiB");
        }
        let workload = Workload {
            seed: self.seed,
            pattern: self.pattern,
            rate: if self.flat_out { WriteRate::FlatOut } else { WriteRate::PagesPerSecond(self.rate) },
            tick: Duration::from_millis(self.tick_ms),
            working_set_pages: working_set / PAGE_SIZE,
            readers: self.readers,
            fill: self.fill,
        };
        Ok(VmmConfig {
            name: self.name,
            ram_bytes: self.ram,
            gap: self.gap,
            resident: self.resident,
            backing: self.backing,
            prepare: self.prepare,
            vcpus: self.vcpus,
            kvm,
            tracker,
            workload,
            nics: self.nic,
            without: self.without_cpuid,
            incoming: self.incoming,
            attach: self.attach,
        })
    }
}

/// Parses a number of bytes, such as `256MiB`. Memlane's units may also be cut short, to `256M`, or left out.
fn bytes(text: &str) -> Result<u64, String> {
    let rest_of_unit = match text.chars().last() {
        Some('0'..='9') => "B",
        Some('K' | 'M' | 'G' | 'T') => "iB",
        _ => "",
    };
    let Size(bytes) = format!("{text}{rest_of_unit}").parse().map_err(|error: BadUnit| error.to_string())?;
    Ok(bytes)
}

fn backing(text: &str) -> Result<Backing, String> {
    match text {
        "memfd" => Ok(Backing::Memfd),
        "huge" => Ok(Backing::HugeMemfd),
        path if path.contains('/') => Ok(Backing::File(path.into())),
        _ => Err("use memfd, huge, or a path with a slash in it".into()),
    }
}

/// Parses an interface, such as `52:54:00:12:34:56@br0`.
fn nic(text: &str) -> Result<Nic, String> {
    let (address, network) =
        text.split_once('@').ok_or("write MAC@NETWORK, such as 52:54:00:12:34:56@br0")?;
    let mut mac = [0; 6];
    let mut parts = address.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2 && !part.starts_with('+'));
        *byte = part
            .and_then(|part| u8::from_str_radix(part, 16).ok())
            .ok_or_else(|| format!("{address:?} is no MAC address"))?;
    }
    if parts.next().is_some() {
        return Err(format!("{address:?} is no MAC address"));
    }
    Ok(Nic { mac, network: Label::from_str(network).map_err(|error| error.to_string())? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_may_lack_a_unit_or_a_part_of_it() {
        for (text, expected) in [
            ("4096", 4096),
            ("0", 0),
            ("1B", 1),
            ("4K", 4 << 10),
            ("4KiB", 4 << 10),
            ("256M", 256 << 20),
            ("256MiB", 256 << 20),
            ("2G", 2 << 30),
            ("24TiB", 24 << 40),
            ("1T", 1 << 40),
            ("1.5GiB", 3 << 29),
            ("1 gib", 1 << 30),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for wrong in ["", "MiB", "M", "-1", "1GB", "0x10", "99999999999999TiB"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
