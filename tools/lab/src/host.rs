//! One host of a lab.

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::agent::write;
use crate::namespace::Namespace;
use crate::network::{self, Bridge};
use crate::process::LabProcess;
use crate::programs::Programs;
use crate::qemu;
use crate::qmp::Monitor;
use crate::rate::Rate;
use crate::remote::Remote;
use crate::requirements::{Requirement, why_not};
use crate::tun::Tun;
use crate::wait::wait_for;

/// The longest wait for a QEMU to start: it may take all RAM from the host first.
const START: Duration = Duration::from_secs(60);

/// One of the two hosts of a [`Lab`](crate::Lab).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostId {
    /// The host with the address 10.77.*n*.1 on every link; the source, by custom.
    A,
    /// The host with the address 10.77.*n*.2 on every link.
    B,
}

impl HostId {
    /// Returns the other one of the two hosts.
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    pub(crate) fn letter(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    /// Returns the address on link `link`, which is 0 for control and 1 + the port's index for a port.
    pub(crate) fn address(self, link: u8) -> Ipv4Addr {
        match self {
            Self::A => Ipv4Addr::new(10, 77, link, 1),
            Self::B => Ipv4Addr::new(10, 77, link, 2),
        }
    }
}

/// A network namespace that stands for a host, or a host that is reached over ssh, with a directory of its own.
#[derive(Debug)]
pub struct LabHost {
    name: String,
    place: HostPlace,
    control_address: Ipv4Addr,
    ports: Vec<LabPort>,
    /// The interfaces at the other ends of the ports' cables, if these cables are carried by this process.
    far_ends: Vec<Arc<Tun>>,
    bridge: Option<Bridge>,
    directory: PathBuf,
    memory_directory: PathBuf,
}

#[derive(Debug)]
enum HostPlace {
    Namespace(Namespace),
    Remote(Arc<Remote>),
}

/// An interface that is lent to migration traffic.
#[derive(Debug, Clone)]
pub struct LabPort {
    /// The interface's name. On a host that the lab made it is `port0` and so on, which is also what daemons call the
    /// port.
    pub interface: String,
    /// The interface's address, in a /24 shared with the same port of the other host.
    pub address: Ipv4Addr,
}

impl LabHost {
    pub(crate) fn new(
        name: String,
        namespace: Namespace,
        control_address: Ipv4Addr,
        (ports, far_ends): (Vec<LabPort>, Vec<Arc<Tun>>),
        bridge: Option<Bridge>,
        [directory, memory_directory]: [PathBuf; 2],
    ) -> Self {
        let place = HostPlace::Namespace(namespace);
        Self { name, place, control_address, ports, far_ends, bridge, directory, memory_directory }
    }

    /// Makes a host that is reached over ssh.
    pub(crate) fn over_ssh(
        name: String,
        remote: Arc<Remote>,
        control: Ipv4Addr,
        ports: Vec<LabPort>,
    ) -> Self {
        let [directory, memory_directory] =
            [remote.directory(), remote.memory_directory()].map(Path::to_owned);
        Self {
            name,
            place: HostPlace::Remote(remote),
            control_address: control,
            ports,
            far_ends: Vec::new(),
            bridge: None,
            directory,
            memory_directory,
        }
    }

    pub(crate) fn made_here(&self) -> Result<&Namespace> {
        match &self.place {
            HostPlace::Namespace(namespace) => Ok(namespace),
            HostPlace::Remote(remote) => {
                bail!("this needs hosts that the harness makes, but {} is reached over ssh", remote.target())
            }
        }
    }

    /// Returns the connection to the host, if it is reached over ssh.
    pub fn remote(&self) -> Option<&Arc<Remote>> {
        match &self.place {
            HostPlace::Namespace(_) => None,
            HostPlace::Remote(remote) => Some(remote),
        }
    }

    /// Returns whether the host is reached over ssh. Only its programs, files and sockets can be used then.
    pub fn is_remote(&self) -> bool {
        self.remote().is_some()
    }

    /// Returns the path of one of Memlane's programs on this host.
    pub fn program(&self, programs: &Programs, name: &str) -> PathBuf {
        self.remote().map_or_else(|| programs.path(name), |remote| remote.directory().join(name))
    }

    /// Returns the path of the QEMU of this host.
    pub fn qemu(&self) -> PathBuf {
        if self.is_remote() { qemu::program_elsewhere() } else { qemu::program() }
    }

    /// Writes a file on this host.
    ///
    /// # Errors
    ///
    /// If that fails.
    pub fn write(&self, path: &Path, text: &str) -> Result<()> {
        self.write_as(path, text, false)
    }

    /// Writes a file on this host that its owner alone can read.
    ///
    /// # Errors
    ///
    /// If that fails.
    pub fn write_secret(&self, path: &Path, text: &str) -> Result<()> {
        self.write_as(path, text, true)
    }

    fn write_as(&self, path: &Path, text: &str, secret: bool) -> Result<()> {
        match self.remote() {
            None => write(path, text, secret).with_context(|| format!("writing {}", path.display())),
            Some(remote) => {
                remote.ask("write", json!({ "path": path, "text": text, "secret": secret })).map(drop)
            }
        }
    }

    /// Reads a file on this host.
    ///
    /// # Errors
    ///
    /// If they cannot be read.
    pub fn read(&self, path: &str) -> Result<String> {
        match self.remote() {
            None => std::fs::read_to_string(path).with_context(|| format!("reading {path}")),
            Some(remote) => remote.read(path),
        }
    }

    /// Returns whether /dev/kvm can be used on this host.
    pub fn has_kvm(&self) -> bool {
        match self.remote() {
            None => why_not(&[Requirement::Kvm]).is_none(),
            Some(remote) => {
                remote.ask("opens", json!({ "path": "/dev/kvm" })).is_ok_and(|opens| opens == true)
            }
        }
    }

    /// Returns whether this host has a file.
    pub fn has(&self, path: &Path) -> bool {
        match self.remote() {
            None => path.exists(),
            Some(remote) => remote.ask("exists", json!({ "path": path })).is_ok_and(|exists| exists == true),
        }
    }

    /// Removes a file of this host, if it is there.
    pub fn remove(&self, path: &Path) {
        match self.remote() {
            None => drop(std::fs::remove_file(path)),
            Some(remote) => drop(remote.ask("remove", json!({ "path": path }))),
        }
    }

    /// Connects with the monitor of a QEMU whose socket of this name is in the host's directory, as
    /// [`Monitor::connect_while`] does.
    ///
    /// # Errors
    ///
    /// As [`Monitor::connect_while`].
    pub fn monitor(&self, socket: &str, mut runs: impl FnMut() -> bool) -> Result<Monitor> {
        let path = self.reach(socket)?;
        let Some(remote) = self.remote() else { return Monitor::connect_while(&path, runs) };
        // This end of the way there listens in any case.
        wait_for("QEMU's monitor", START, || (self.listens(socket) || !runs()).then_some(()))?;
        let ahead = remote.clock_ahead()?;
        Ok(Monitor::connect_while(&path, runs)?.with_clock_ahead(ahead))
    }

    /// Returns a Unix socket that leads to the socket of this name in the host's directory, even before a program
    /// listens there.
    ///
    /// # Errors
    ///
    /// If ssh refuses.
    pub fn reach(&self, socket: &str) -> Result<PathBuf> {
        self.remote().map_or_else(|| Ok(self.directory.join(socket)), |remote| remote.forward(socket))
    }

    /// Returns whether a program listens at the socket of this name in the host's directory.
    pub fn listens(&self, socket: &str) -> bool {
        let path = self.directory.join(socket);
        match self.remote() {
            None => UnixStream::connect(path).is_ok(),
            Some(remote) => {
                remote.ask("listens", json!({ "path": path })).is_ok_and(|listens| listens == true)
            }
        }
    }

    /// Returns the host's name, `host-a` or `host-b`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the name of the network namespace, for `ip -netns NAME`.
    ///
    /// # Panics
    ///
    /// If the host is none.
    pub fn namespace(&self) -> &str {
        self.made_here().expect("only a host that the lab made has a namespace").name()
    }

    /// Returns the path of the network namespace, for setns(2).
    ///
    /// # Panics
    ///
    /// If the host is none.
    pub fn namespace_path(&self) -> PathBuf {
        self.made_here().expect("only a host that the lab made has a namespace").path()
    }

    /// Returns the address on the control link, which is never limited in rate.
    pub fn control_address(&self) -> Ipv4Addr {
        self.control_address
    }

    /// Returns the ports, in the same order on both hosts.
    pub fn ports(&self) -> &[LabPort] {
        &self.ports
    }

    /// Returns the bridge, if the lab was asked for one.
    pub fn bridge(&self) -> Option<&Bridge> {
        self.bridge.as_ref()
    }

    /// Returns a directory of this host for sockets, journals and logs; its path is short enough for Unix sockets. It
    /// is removed with the lab.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns a directory in [`LabHost::directory`] in which everyone may make files and sockets: guests' QEMUs are of users
    /// of their own. Only a host that the lab made has one.
    pub fn open_directory(&self) -> PathBuf {
        self.directory.join("open")
    }

    /// Returns a directory on tmpfs for guests' memory. It is removed with the lab.
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
        network::add_tap(self.made_here()?.name(), name)?;
        network::enslave(self.made_here()?.name(), name, &bridge.interface)
    }

    /// Returns a command that runs `program` inside this host.
    ///
    /// The program gets SIGKILL when the *thread* that starts it ends (`PR_SET_PDEATHSIG`), so that nothing survives
    /// a crash. [`LabHost::spawn`] starts it from a thread that lives as long as this process.
    ///
    /// The program sees this host's interfaces in /sys/class/net, and no cgroups in /sys/fs/cgroup.
    ///
    /// On a host that is reached over ssh only [`LabHost::spawn`] runs it, with its arguments and no environment of its own.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        if let HostPlace::Namespace(namespace) = &self.place {
            namespace.confine(&mut command);
        }
        command
    }

    /// Starts a command made by [`LabHost::command`], with its output appended to `NAME.log` in this host's directory.
    /// It is killed when the returned guard is dropped.
    ///
    /// # Errors
    ///
    /// If the log cannot be opened or the program cannot be started.
    pub fn spawn(&self, name: &str, command: Command) -> Result<LabProcess> {
        let log = self.directory.join(format!("{name}.log"));
        let process = match &self.place {
            HostPlace::Namespace(_) => LabProcess::spawn(name, command, log),
            HostPlace::Remote(remote) => LabProcess::spawn_there(name, &command, remote),
        };
        process.with_context(|| format!("starting {name} on {}", self.name))
    }

    /// Runs `work` on a thread of its own inside this host. Sockets that it opens stay in this host wherever they
    /// are used afterwards. A panic of `work` goes on in the caller.
    ///
    /// # Errors
    ///
    /// If the thread cannot enter the namespace, or the host is none.
    pub fn run_in<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.made_here()?.run_in(work)
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
        network::set_link(self.made_here()?.name(), interface, up)?;
        match self.far_ends.get(index) {
            Some(far) => far.set_carrier(up).with_context(|| format!("setting the carrier of {interface}")),
            None => Ok(()),
        }
    }

    /// Makes everything that this host sends through port `index` disappear, or lets it pass again. Both ends of the
    /// port stay up.
    pub(crate) fn silence_port(&self, index: usize, silent: bool) -> Result<()> {
        self.silence(&self.ports[index].interface, silent)
    }

    /// Does the same for any interface of this host.
    pub(crate) fn silence(&self, interface: &str, silent: bool) -> Result<()> {
        network::silence(self.made_here()?.name(), interface, silent)
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
        network::shape(self.made_here()?.name(), &self.ports[index].interface, rate)
    }
}
