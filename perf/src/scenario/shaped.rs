//! `shaped`: an idle guest of incompressible memory, over ports that carry less than the machine could.
//!
//! - **of_line**: contents of memory in round one, over what the ports can carry of them as payload of TCP at most. A
//!   port is shaped by HTB, which counts frames with their Ethernet headers (14 bytes; no preamble, no checksum, no gap,
//!   which a veth pair does not have either). Of each frame of MTU + 14 bytes, MTU - 52 are payload: 20 bytes are the
//!   header of IPv4, 20 that of TCP, and 12 its timestamps. With an MTU of 9000 that is 99.27 % of the rate.
//! - **vs_raw**: the same over what raw sockets carried over the same ports in the same repetition.

use anyhow::Result;
use clap::Args;
use memlane_lab::{LabOptions, Rate, Requirement, Rig, RigOptions, Size, why_not};
use serde_json::json;

use super::{Bench, Measured, Scenario};
use crate::baseline::memory::{MemoryState, SharedMemory};
use crate::baseline::raw;
use crate::memlane::Guest;
use crate::report::{By, Report};

/// Bytes of a frame that HTB counts beyond the MTU.
const ETHERNET: u32 = 14;
/// Bytes of a packet that are headers of IPv4 and TCP, with timestamps.
const HEADERS: u32 = 20 + 20 + 12;

/// What to measure.
#[derive(Args, Debug, Clone)]
pub struct Shaped {
    /// Memory of the guest
    #[arg(long, default_value = "1GiB")]
    pub ram: Size,
    /// Ports between the two hosts
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub ports: u8,
    /// What each port carries
    #[arg(long, default_value = "1gbit")]
    pub port_rate: Rate,
}

#[derive(Clone, Copy)]
enum Way {
    Memlane,
    Raw,
}

impl Scenario for Shaped {
    const NAME: &'static str = "shaped";

    fn measure(&self, bench: &Bench) -> Result<Report> {
        let lab = LabOptions {
            ports: usize::from(self.ports),
            port_rate: Some(self.port_rate),
            ..LabOptions::default()
        };
        let line = payload_gbit_per_second(self.port_rate, lab.mtu) * f64::from(self.ports);
        let mut rig = Rig::new(&bench.programs, RigOptions { lab, ..RigOptions::default() })?;
        let guest = Guest::idle(self.ram, why_not(&[Requirement::Kvm]).is_none());
        let memory = SharedMemory::with_pattern(self.ram.bytes().try_into()?)?;

        let cases = [(By::Memlane.case("fresh"), Way::Memlane), (By::Raw.case("fresh"), Way::Raw)];
        let runs = bench.interleave(Self::NAME, &cases, |way| match way {
            Way::Memlane => {
                let moved = guest.migrate(&mut rig, &[], |_| {})?.arrived()?;
                Ok(Measured { figures: moved.figures()?, detail: moved.migration })
            }
            Way::Raw => {
                let figures = raw::transfer(rig.lab(), &memory, 1, MemoryState::Fresh)?.figures(memory.len());
                Ok(Measured { figures, detail: json!(null) })
            }
        })?;

        let [(memlane, _), (raw, _)] = &cases;
        let rate = "round_one_gbit_per_second";
        let of_line = runs.values(memlane, rate)?.iter().map(|rate| rate / line).collect();
        let vs_raw = runs.quotients((memlane, rate), (raw, "gbit_per_second"))?;
        let headline =
            format!("an idle guest of {} over {} port(s) of {}", self.ram, self.ports, self.port_rate);
        let settings = json!({
            "ram_bytes": self.ram.bytes(),
            "ports": self.ports,
            "port_bits_per_second": self.port_rate.bits_per_second(),
            "payload_gbit_per_second": line,
        });
        let mut report = Report::new(Self::NAME, headline, &settings, runs)?;
        report.ratio("of_line", of_line, format!("round one, of the {line:.3} Gbit/s of payload that fit"));
        report.ratio("vs_raw", vs_raw, "round one, of what raw sockets carried");
        Ok(report)
    }
}

/// What a port shaped to `rate` can carry as payload of TCP.
fn payload_gbit_per_second(rate: Rate, mtu: u32) -> f64 {
    let share = f64::from(mtu - HEADERS) / f64::from(mtu + ETHERNET);
    rate.bits_per_second() as f64 / 1e9 * share
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_take_their_part_of_a_port() {
        let rate = "1gbit".parse().expect("a rate");
        assert!((payload_gbit_per_second(rate, 9000) - 0.992_678).abs() < 1e-6);
        assert!((payload_gbit_per_second(rate, 1500) - 0.956_407).abs() < 1e-6);
    }
}
