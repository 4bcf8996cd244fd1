//! What `busy` and `outrun` have in common: a guest that writes, and the shaped ports that it moves over.

use clap::Args;
use memlane_lab::{HostId, Lab, LabOptions, Rate, Size};
use serde_json::{Value, json};

use crate::memlane::{Guest, Writes};

/// A guest that writes, and its ports.
#[derive(Args, Debug, Clone)]
pub struct Writer {
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
    /// Hosts with these ports.
    pub fn lab(&self) -> LabOptions {
        let (ports, port_rate) = (usize::from(self.ports), Some(self.port_rate));
        LabOptions { ports, port_rate, ..LabOptions::default() }
    }

    /// The same on the hosts of `lab`, which have as many ports as they have.
    pub fn on(&self, lab: &Lab) -> Self {
        // No more than `--ports` and `--addresses` can name.
        let ports = u8::try_from(lab.host(HostId::A).ports().len()).unwrap_or(u8::MAX);
        Self { ports, ..self.clone() }
    }

    /// The guest on the hosts of `lab`; a virtual machine where there is KVM.
    pub fn guest(&self, lab: &Lab, writes: Writes) -> Guest {
        Guest { writes, working_set: Some(self.working_set()), ..Guest::idle(self.ram, lab.has_kvm()) }
    }

    /// Memory that it writes.
    pub fn working_set(&self) -> Size {
        self.working_set.unwrap_or_else(|| self.ram.part(4))
    }

    /// The first line of a report; `how` it writes.
    pub fn headline(&self, how: &str) -> String {
        let Self { ram, ports, port_rate, .. } = self;
        let working_set = self.working_set();
        format!("a guest of {ram} writes {working_set} of it {how}, over {ports} port(s) of {port_rate}")
    }

    /// What was set, and this `more`.
    pub fn settings<const N: usize>(&self, more: [(&str, Value); N]) -> Value {
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
