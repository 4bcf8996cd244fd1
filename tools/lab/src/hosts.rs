//! Hosts that exist already and are reached over ssh.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::host::{LabHost, LabPort};
use crate::programs::Programs;
use crate::remote::Remote;

/// The programs that a daemon and a VMM need.
const PROGRAMS: [&str; 4] = ["memlaned", "memlane-vmm", "libmemlane_shim.so", "memlane-starter"];

/// Two hosts that exist already.
#[derive(Debug, Clone)]
pub struct RemoteHosts {
    /// The names of the source and of the destination, as ssh knows them.
    pub targets: [String; 2],
    /// The addresses of the ports that join the hosts, on either host. If there are none, the addresses by which ssh
    /// reaches the hosts are used.
    pub ports: Vec<[Ipv4Addr; 2]>,
    /// The command for `ssh`, with options if there are any.
    pub ssh: Vec<OsString>,
    /// The program that has the agent (see [`agent::serve`](crate::agent::serve)) as its subcommand `agent DIRECTORY`.
    pub agent: PathBuf,
}

impl RemoteHosts {
    /// Reaches both hosts and copies `programs` there. Files on this machine that belong to the connections are kept in
    /// `local`. Returns the hosts, and the MTU of their ports in bytes.
    pub(crate) fn reach(&self, programs: &Programs, local: &Path) -> Result<([LabHost; 2], u32)> {
        let [a, b] = [("a", 0), ("b", 1)].map(|(letter, end)| self.reach_one(programs, local, letter, end));
        let ((a, mtu), (b, other)) = (a?, b?);
        let (here, there) = (a.control_address(), b.control_address());
        ensure!(
            here != there,
            "{} and {} both have the address {here}: name two different hosts",
            self.targets[0],
            self.targets[1]
        );
        Ok(([a, b], mtu.min(other)))
    }

    fn reach_one(
        &self,
        programs: &Programs,
        local: &Path,
        letter: &str,
        end: usize,
    ) -> Result<(LabHost, u32)> {
        let target = &self.targets[end];
        let local = local.join(letter);
        std::fs::create_dir(&local).with_context(|| format!("creating {}", local.display()))?;
        let remote = Remote::connect(&self.ssh, target, &self.agent, &local)?;
        for program in PROGRAMS {
            remote.copy(&programs.path(program))?;
        }
        let reached = remote.address().and_then(|address| address.parse::<Ipv4Addr>().ok());
        let control = reached.or(self.ports.first().map(|port| port[end])).with_context(|| {
            format!("{target} was not reached by an IPv4 address; say which it has with --addresses")
        })?;
        let addresses = match &self.ports[..] {
            [] => vec![control],
            ports => ports.iter().map(|port| port[end]).collect(),
        };
        let (mut ports, mut mtu) = (Vec::new(), u32::MAX);
        for address in addresses {
            let interface = remote.ask("interface", json!({ "address": address }))?;
            let name = interface["name"].as_str().context("an interface without a name")?;
            mtu = interface["mtu"]
                .as_u64()
                .and_then(|bytes| u32::try_from(bytes).ok())
                .map_or(mtu, |of| mtu.min(of));
            ports.push(LabPort { interface: name.to_owned(), address });
        }
        Ok((LabHost::over_ssh(format!("host-{letter}"), Arc::new(remote), control, ports), mtu))
    }
}
