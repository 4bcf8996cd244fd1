//! Memlane on two hosts as its package installs it, set up by the first steps of the manual.

use std::fmt::Debug;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::Result;

use crate::systemd::SystemdHost;
use crate::vm::Machine;

/// Where the package lies on a host.
pub const PACKAGE: &str = "/root/memlane.deb";
/// The ports that the daemons are lent.
const PORTS: &str = "--port a=port0 --port b=port1";
/// What the first configuration does not have: each host starts the QEMUs of guests that arrive, and no way is too slow.
const MORE: &str = r#"sed -i 's/^control = .*/&\nmay_start_guests = true/' /etc/memlane/memlaned.toml &&
    printf '[limits]\nmin_bandwidth = "0bit"\n' >> /etc/memlane/memlaned.toml"#;
/// Does on a host without udev what the package's rule would do.
const DEVICE: &str =
    "test -e /run/udev/control || { chgrp memlane /dev/userfaultfd && chmod 0660 /dev/userfaultfd; }";

/// A host with a system of its own, on which lines of shell code are run as root.
pub trait OwnSystem: Debug {
    /// Returns the name of the host.
    fn name(&self) -> &str;

    /// Returns the address of the host on the control link.
    fn control_address(&self) -> Ipv4Addr;

    /// Runs a line of shell code, and returns what it prints.
    ///
    /// # Errors
    ///
    /// If it fails; what it prints is in the error.
    fn run(&self, line: &str) -> Result<String>;

    /// Copies a file to the host.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or not be written there.
    fn copy(&self, file: &Path, to: &str) -> Result<()>;

    /// Writes a file on the host, for all to read.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    fn write(&self, path: &str, contents: &str) -> Result<()>;
}

/// Installs a package on two hosts, makes their configurations and their keys, and starts their daemons.
///
/// # Errors
///
/// If a command fails on a host; what it printed is in the error.
pub fn install(hosts: [&dyn OwnSystem; 2], package: &Path) -> Result<()> {
    let [a, b] = hosts;
    for (host, peer) in [(a, b), (b, a)] {
        host.copy(package, PACKAGE)?;
        host.run(&format!("DEBIAN_FRONTEND=noninteractive apt-get install -qy {PACKAGE}"))?;
        host.run(DEVICE)?;
        let (name, address) = (peer.name(), peer.control_address());
        host.run(&format!("memlanectl setup --write --peer {name}={address} {PORTS}"))?;
        host.run(MORE)?;
    }
    a.run("memlanectl keys init --dir /root/ca")?;
    issue_keys(hosts)?;
    for host in hosts {
        host.run("systemctl start memlane-guest.socket memlaned")?;
    }
    Ok(())
}

/// Issues keys for two hosts, by the authority that the first one has, and puts them in their places.
///
/// # Errors
///
/// If a command fails on a host; what it printed is in the error.
pub fn issue_keys(hosts: [&dyn OwnSystem; 2]) -> Result<()> {
    let authority = hosts[0];
    for host in hosts {
        let name = host.name();
        authority.run(&format!("rm -rf /root/ca/{name} && memlanectl keys issue {name} --dir /root/ca"))?;
        for file in ["host.pem", "host.key", "ca.pem"] {
            let text = authority.run(&format!("cat /root/ca/{name}/{file}"))?;
            host.write(&format!("/root/{file}"), &text)?;
        }
        host.run("install -d -o memlane -g memlane -m 700 /etc/memlane/keys")?;
        let install = "install -o memlane -g memlane -m 600 -t /etc/memlane/keys";
        host.run(&format!("cd /root && {install} host.pem host.key ca.pem && rm host.pem host.key ca.pem"))?;
    }
    Ok(())
}

impl OwnSystem for SystemdHost {
    fn name(&self) -> &str {
        self.name()
    }

    fn control_address(&self) -> Ipv4Addr {
        self.control_address()
    }

    fn run(&self, line: &str) -> Result<String> {
        self.run(line)
    }

    fn copy(&self, file: &Path, to: &str) -> Result<()> {
        self.copy(file, to)
    }

    fn write(&self, path: &str, contents: &str) -> Result<()> {
        self.write(path, contents)
    }
}

impl OwnSystem for Machine {
    fn name(&self) -> &str {
        self.name()
    }

    fn control_address(&self) -> Ipv4Addr {
        self.control_address()
    }

    fn run(&self, line: &str) -> Result<String> {
        self.run(line)
    }

    fn copy(&self, file: &Path, to: &str) -> Result<()> {
        self.copy_to(file, to)
    }

    fn write(&self, path: &str, contents: &str) -> Result<()> {
        self.write(path, contents)
    }
}
