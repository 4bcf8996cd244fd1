//! The common part of `busy` and `outrun`: a guest that writes, and the shaped ports that it moves over.

use clap::Args;
use memlane_lab::{HostId, Lab, LabOptions, Rate, Size};
use serde_json::{Value, json};

use crate::memlane::{BenchGuest, WriteLoad};

/// A guest that writes, and its ports.
#[derive(Args, Debug, Clone)]
pub(crate) struct Writer {
    /// Memory of the guest
    #[arg(long, default_value = "1GiB")]
    ram: Size,
    /// Memory that it writes [default: a quarter of it]
    #[arg(long)]
    working_set: Option<Size>,
    /// Ports between the two hosts
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub ports: u8,
    /// What each port carries
    #[arg(long, default_value = "1gbit")]
    pub port_rate: Rate,
}

impl Writer {
    /// Returns the options of hosts with these ports.
    pub(crate) fn lab(&self) -> LabOptions {
        let (ports, port_rate) = (usize::from(self.ports), Some(self.port_rate));
        LabOptions { ports, port_rate, ..LabOptions::default() }
    }

    /// Returns these options for the hosts of `lab`, with the number of ports that they have.
    pub(crate) fn on(&self, lab: &Lab) -> Self {
        // No more than `--ports` and `--addresses` can name.
        let ports = u8::try_from(lab.host(HostId::A).ports().len()).unwrap_or(u8::MAX);
        Self { ports, ..self.clone() }
    }

    /// Returns the guest on the hosts of `lab`. It is a virtual machine if there is KVM.
    pub(crate) fn guest(&self, lab: &Lab, writes: WriteLoad) -> BenchGuest {
        BenchGuest {
            writes,
            working_set: Some(self.working_set()),
            ..BenchGuest::idle(self.ram, lab.has_kvm())
        }
    }

    /// Returns the size of the memory that the guest writes.
    pub(crate) fn working_set(&self) -> Size {
        self.working_set.unwrap_or_else(|| self.ram.part(4))
    }

    /// Returns the first line of a report; `how` describes its writes.
    pub(crate) fn headline(&self, how: &str) -> String {
        let Self { ram, ports, port_rate, .. } = self;
        let working_set = self.working_set();
        format!("a guest of {ram} writes {working_set} of it {how}, over {ports} port(s) of {port_rate}")
    }

    /// Returns the settings of the scenario, and `more` of them.
    pub(crate) fn settings<const N: usize>(&self, more: [(&str, Value); N]) -> Value {
        let mut settings = json!({
            "ram_bytes": self.ram.bytes(),
            "working_set_bytes": self.working_set().bytes(),
            "ports": self.ports,
            "port_bits_per_second": self.port_rate.bits_per_second(),
        });
        for (name, value) in more {
            settings[name] = value;
        }
        settings
    }
}
