//! One host of a lab.

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::namespace::Namespace;
use crate::network;
use crate::process::Process;
use crate::rate::Rate;
use crate::tun::Tun;

/// A network namespace that stands for a host, with a directory of its own.
#[derive(Debug)]
pub struct Host {
    name: String,
    namespace: Namespace,
    control_address: Ipv4Addr,
    ports: Vec<Port>,
    /// What is at the other ends of the ports' cables, where these are cables of our own.
    far_ends: Vec<Arc<Tun>>,
    bridge: Option<Bridge>,
    directory: PathBuf,
    memory_directory: PathBuf,
}

/// An interface that is lent to migration traffic.
#[derive(Debug, Clone)]
pub struct Port {
    /// The interface's name, `port0` and so on, the same on both hosts.
    pub interface: String,
    /// Its address, in a /24 shared with the same port of the other host.
    pub address: Ipv4Addr,
}

/// The bridge that guests' interfaces would be joined to.
#[derive(Debug, Clone)]
pub struct Bridge {
    /// The bridge's own interface, `br0`.
    pub interface: String,
    /// An interface outside the bridge at the other end of one of its ports: capture here what leaves the bridge.
    pub observer: String,
}

impl Default for Bridge {
    fn default() -> Self {
        Self { interface: "br0".into(), observer: "observer0".into() }
    }
}

impl Host {
    pub(crate) fn new(
        name: String,
        namespace: Namespace,
        control_address: Ipv4Addr,
        (ports, far_ends): (Vec<Port>, Vec<Arc<Tun>>),
        bridge: Option<Bridge>,
        [directory, memory_directory]: [PathBuf; 2],
    ) -> Self {
        Self { name, namespace, control_address, ports, far_ends, bridge, directory, memory_directory }
    }

    /// `host-a` or `host-b`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of the network namespace, for `ip -netns NAME`.
    pub fn namespace(&self) -> &str {
        self.namespace.name()
    }

    /// The path of the network namespace, for setns(2).
    pub fn namespace_path(&self) -> PathBuf {
        self.namespace.path()
    }

    /// The address on the control link, which is never limited in rate.
    pub fn control_address(&self) -> Ipv4Addr {
        self.control_address
    }

    /// The ports, in the same order on both hosts.
    pub fn ports(&self) -> &[Port] {
        &self.ports
    }

    /// The bridge, if the lab was asked for one.
    pub fn bridge(&self) -> Option<&Bridge> {
        self.bridge.as_ref()
    }

    /// A directory of this host for sockets, journals and logs; its path is short enough for Unix sockets. It goes
    /// with the lab.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A directory on tmpfs for guests' memory. It goes with the lab.
    pub fn memory_directory(&self) -> &Path {
        &self.memory_directory
    }

    /// Makes a tap for a guest, joined to the bridge. It stays when the guest's VMM has ended, as an operator's would.
    ///
    /// # Errors
    ///
    /// If `ip` refuses, or the lab was made without bridges.
    pub fn add_tap(&self, name: &str) -> Result<()> {
        let bridge = self.bridge().context("a tap needs a lab with bridges")?;
        network::add_tap(self.namespace(), name)?;
        network::enslave(self.namespace(), name, &bridge.interface)
    }

    /// A command that runs `program` inside this host.
    ///
    /// The program gets SIGKILL when the *thread* that starts it ends (`PR_SET_PDEATHSIG`), so that nothing survives
    /// a crash. [`Host::spawn`] starts it from a thread that lives as long as this process.
    ///
    /// The program sees this host's interfaces in /sys/class/net, and no cgroups in /sys/fs/cgroup.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        self.namespace.confine(&mut command);
        command
    }

    /// Starts a command made by [`Host::command`], with its output appended to `NAME.log` in this host's directory.
    /// It is killed when the returned guard is dropped.
    ///
    /// # Errors
    ///
    /// If the log cannot be opened or the program cannot be started.
    pub fn spawn(&self, name: &str, command: Command) -> Result<Process> {
        let log = self.directory.join(format!("{name}.log"));
        Process::spawn(name, command, log).with_context(|| format!("starting {name} on {}", self.name))
    }

    /// Runs `work` on a thread of its own inside this host. Sockets that it opens stay in this host wherever they
    /// are used afterwards. A panic of `work` goes on in the caller.
    ///
    /// # Errors
    ///
    /// If the thread cannot enter the namespace.
    pub fn run_in<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.namespace.run_in(work)
    }

    /// Takes port `index` down, as a pulled cable would: the other end loses its carrier.
    ///
    /// # Errors
    ///
    /// If `ip` refuses.
    ///
    /// # Panics
    ///
    /// If there is no such port.
    pub fn port_down(&self, index: usize) -> Result<()> {
        self.set_port(index, false)
    }

    /// Brings port `index` up again.
    ///
    /// # Errors
    ///
    /// If `ip` refuses.
    ///
    /// # Panics
    ///
    /// If there is no such port.
    pub fn port_up(&self, index: usize) -> Result<()> {
        self.set_port(index, true)
    }

    fn set_port(&self, index: usize, up: bool) -> Result<()> {
        let interface = &self.ports[index].interface;
        network::set_link(self.namespace(), interface, up)?;
        match self.far_ends.get(index) {
            Some(far) => far.set_carrier(up).with_context(|| format!("setting the carrier of {interface}")),
            None => Ok(()),
        }
    }

    /// Has everything that this host sends through port `index` vanish, or no more: both ends of the port stay up.
    pub(crate) fn silence_port(&self, index: usize, silent: bool) -> Result<()> {
        network::silence(self.namespace(), &self.ports[index].interface, silent)
    }

    /// Sets what this host may send through port `index`; `None` lifts the limit. What it receives is up to the
    /// other host: see [`Lab::set_port_rate`](crate::Lab::set_port_rate) for both.
    ///
    /// # Errors
    ///
    /// If `tc` refuses.
    ///
    /// # Panics
    ///
    /// If there is no such port.
    pub fn set_port_rate(&self, index: usize, rate: Option<Rate>) -> Result<()> {
        network::shape(self.namespace(), &self.ports[index].interface, rate)
    }
}
