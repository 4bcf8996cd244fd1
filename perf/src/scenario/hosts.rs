//! The options for hosts that exist already.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use memlane_lab::RemoteHosts;

/// Hosts that are there already, and how they are reached.
#[derive(Args, Debug, Clone, Default)]
pub struct OverSsh {
    /// Measure between two hosts that are reached over ssh, as root, such as root@a,root@b, and not between two that the
    /// harness makes; what is copied there goes again. Ports carry what they carry, and --port-rate only says how much
    /// that is
    #[arg(long, value_name = "SOURCE,DESTINATION")]
    pub hosts: Option<String>,
    /// Ports that join these hosts: their addresses on either [default: those that ssh reaches]
    #[arg(long, value_name = "ADDRESS/ADDRESS,...", requires = "hosts")]
    pub addresses: Option<String>,
    /// The ssh command, with options between spaces; it must not ask for a password
    #[arg(long, value_name = "COMMAND", default_value = "ssh", requires = "hosts")]
    pub ssh: String,
}

impl OverSsh {
    /// Returns the hosts, if any are named. This program serves as the agent there.
    ///
    /// # Errors
    ///
    /// If something is not written as it has to be.
    pub fn hosts(&self) -> Result<Option<RemoteHosts>> {
        let Some(hosts) = &self.hosts else { return Ok(None) };
        let Some((source, destination)) = hosts.split_once(',').filter(|(_, rest)| !rest.contains(','))
        else {
            bail!("--hosts {hosts}: name two hosts, such as root@a,root@b");
        };
        let ports = self.addresses.iter().flat_map(|ports| ports.split(',')).map(pair);
        let ssh: Vec<_> = self.ssh.split_whitespace().map(Into::into).collect();
        ensure!(!ssh.is_empty(), "--ssh names no program");
        Ok(Some(RemoteHosts {
            targets: [source, destination].map(str::to_owned),
            ports: ports.collect::<Result<_>>()?,
            ssh,
            agent: std::env::current_exe().context("looking for this program")?,
        }))
    }
}

fn pair(port: &str) -> Result<[Ipv4Addr; 2]> {
    let wrong = || format!("--addresses: {port:?} is no port; write its two addresses as 10.0.0.1/10.0.0.2");
    let (here, there) = port.split_once('/').with_context(wrong)?;
    Ok([here.parse().with_context(wrong)?, there.parse().with_context(wrong)?])
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct HostsLine {
        #[command(flatten)]
        hosts: OverSsh,
    }

    fn hosts(line: &str) -> Result<Option<RemoteHosts>> {
        HostsLine::try_parse_from(
            ["bench"].into_iter().chain(line.split(' ').filter(|word| !word.is_empty())),
        )?
        .hosts
        .hosts()
    }

    #[test]
    fn hosts_and_ports_are_pairs() {
        assert!(hosts("").expect("nothing").is_none());
        let some = hosts("--hosts root@a,b --addresses 10.0.0.1/10.0.0.2,10.0.1.1/10.0.1.2");
        let some = some.expect("hosts").expect("some");
        assert_eq!((some.targets, some.ports.len()), (["root@a".to_owned(), "b".to_owned()], 2));
        assert_eq!(some.ports[1], [Ipv4Addr::new(10, 0, 1, 1), Ipv4Addr::new(10, 0, 1, 2)]);
        assert_eq!(some.ssh, ["ssh"]);
        for wrong in
            ["--hosts a", "--hosts a,b,c", "--hosts a,b --addresses 10.0.0.1", "--hosts a,b --addresses x/y"]
        {
            assert!(hosts(wrong).is_err(), "{wrong}");
        }
        assert!(hosts("--addresses 10.0.0.1/10.0.0.2").is_err(), "of which hosts?");
    }
}
