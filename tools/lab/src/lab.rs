//! The two hosts and what joins them.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::cable::{Cable, Loss};
use crate::cleanup::Registration;
use crate::host::{Bridge, Host, Port};
use crate::hosts::Hosts;
use crate::lan::Lan;
use crate::namespace::{self, MEMORY, Namespace};
use crate::network;
use crate::process;
use crate::programs::Programs;
use crate::rate::Rate;
use crate::requirements::{Requirement, why_not};
use crate::tun::Tun;

/// The largest number of ports that a lab may have.
pub const MAX_PORTS: usize = 64;

/// Unix socket paths end at 107 bytes; what is left of it is for the names of sockets in a host's directory.
const MAX_DIRECTORY_BYTES: usize = 64;

const CONTROL_INTERFACE: &str = "ctl0";

/// What a [`Lab`] is made of.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// Ports of each host, 0 to [`MAX_PORTS`]. Port *i* of one host is joined to port *i* of the other.
    pub ports: usize,
    /// What a port carries in each direction; unlimited if `None`. The control link is never limited in rate.
    pub port_rate: Option<Rate>,
    /// How long a packet takes through a port, one way; no longer than the machine takes if `None`. A round trip takes
    /// twice as long.
    pub port_delay: Option<Duration>,
    /// The same of the control link.
    pub control_delay: Option<Duration>,
    /// What the ports lose of all packets; nothing if `None`.
    pub port_loss: Option<Loss>,
    /// The MTU of all links, in bytes.
    pub mtu: u32,
    /// Whether each host has a bridge with an observer port, as a host has for its guests.
    pub bridge: bool,
    /// Whether a switch joins the hosts' bridges, with a client on it: see [`Lan`]. Brings the bridges along.
    pub switch: bool,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            ports: 1,
            port_rate: None,
            port_delay: None,
            control_delay: None,
            port_loss: None,
            mtu: 9000,
            bridge: false,
            switch: false,
        }
    }
}

/// One of the two hosts of a [`Lab`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostId {
    /// The host with the address 10.77.*n*.1 on every link; the source, by custom.
    A,
    /// The host with the address 10.77.*n*.2 on every link.
    B,
}

impl HostId {
    fn letter(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    /// The address on link `link`, which is 0 for control and 1 + the port's index for a port.
    fn address(self, link: u8) -> Ipv4Addr {
        match self {
            Self::A => Ipv4Addr::new(10, 77, link, 1),
            Self::B => Ipv4Addr::new(10, 77, link, 2),
        }
    }
}

/// Two hosts joined by a control link and by ports. All of it goes when the lab is dropped, programs included.
#[derive(Debug)]
pub struct Lab {
    hosts: [Host; 2],
    mtu: u32,
    lan: Option<Lan>,
    // Their interfaces go when the hosts have let go of them too.
    _cables: Vec<Cable>,
    // After `hosts`: fields are dropped in order, and a host's open namespace should not outlive its name by long.
    _cleanup: Registration,
}

impl Lab {
    /// Makes the hosts and brings all links up. Also removes what labs of dead processes left behind.
    ///
    /// # Errors
    ///
    /// If something that a lab needs is missing (see [`Requirement::LAB`]), or `ip` or `tc` refuses a setting.
    pub fn new(options: LabOptions) -> Result<Self> {
        if let Some(reason) = why_not(Requirement::LAB) {
            bail!("cannot make a lab: {reason}");
        }
        ensure!(options.ports <= MAX_PORTS, "a lab has at most {MAX_PORTS} ports, not {}", options.ports);
        namespace::sweep();

        let id = unique_id();
        let directory = directory(&id)?;
        let memory = Path::new(MEMORY).join(format!("{id}-memory"));
        let names = [HostId::A, HostId::B].map(|host| format!("{id}-{}", host.letter()));
        let lan_names = ["switch", "client"].map(|name| format!("{id}-{name}"));
        // Registered before anything is made, so that an error or a signal half way leaves nothing.
        let cleanup = Registration::new({
            let names: Vec<String> = names.iter().chain(&lan_names).cloned().collect();
            let (directory, memory) = (directory.clone(), memory.clone());
            move || remove(&names, &directory, &memory)
        });
        ensure!(
            directory.as_os_str().len() <= MAX_DIRECTORY_BYTES,
            "{} is too long a path for Unix sockets: set TMPDIR to a shorter one",
            directory.display()
        );

        let [a, b] = [Namespace::create(&names[0])?, Namespace::create(&names[1])?];
        let ports: Vec<String> = (0..options.ports).map(|index| format!("port{index}")).collect();
        let join = |interface: &str, delay: Option<Duration>, loss: Option<Loss>| {
            if delay.is_none() && loss.is_none() {
                network::join(&names, interface, options.mtu)?;
                return Ok(None);
            }
            cable(interface, [&a, &b], options.mtu, delay.unwrap_or_default(), loss).map(Some)
        };
        let mut cables = Vec::new();
        for (port, index) in ports.iter().zip(0..) {
            // No two ports lose the same packets.
            let loss = options.port_loss.map(|loss| Loss { seed: loss.seed.wrapping_add(index), ..loss });
            cables.extend(join(port, options.port_delay, loss)?);
        }
        let control = join(CONTROL_INTERFACE, options.control_delay, None)?;
        let namespaces = [a.clone(), b.clone()];
        let places = [directory.as_path(), &memory];
        let far_ends = |end: usize| cables.iter().map(|cable| cable.ends()[end].clone()).collect();
        let hosts = [
            make_host(HostId::A, a, (&ports, far_ends(1)), places, &options)?,
            make_host(HostId::B, b, (&ports, far_ends(0)), places, &options)?,
        ];
        let lan = match options.switch {
            true => Some(Lan::create(
                lan_names.each_ref().map(String::as_str),
                namespaces.each_ref(),
                &Bridge::default().interface,
            )?),
            false => None,
        };
        cables.extend(control);
        Ok(Self { hosts, mtu: options.mtu, lan, _cables: cables, _cleanup: cleanup })
    }

    /// Reaches hosts that are there already, and copies `programs` there. They have no more than their ports, which
    /// nobody shapes.
    ///
    /// # Errors
    ///
    /// If one cannot be reached, lacks an address, or has no room.
    pub fn over_ssh(hosts: &Hosts, programs: &Programs) -> Result<Self> {
        namespace::sweep();
        let directory = directory(&unique_id())?;
        let cleanup = Registration::new({
            let directory = directory.clone();
            move || drop(std::fs::remove_dir_all(&directory))
        });
        let (hosts, mtu) = hosts.reach(programs, &directory)?;
        Ok(Self { hosts, mtu, lan: None, _cables: Vec::new(), _cleanup: cleanup })
    }

    /// Whether the hosts are reached over ssh.
    pub fn is_remote(&self) -> bool {
        self.hosts[0].is_remote()
    }

    /// Whether both hosts have a usable /dev/kvm.
    pub fn has_kvm(&self) -> bool {
        self.hosts.iter().all(Host::has_kvm)
    }

    /// The MTU of the ports, in bytes: the least, if they differ.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// One of the hosts.
    pub fn host(&self, id: HostId) -> &Host {
        &self.hosts[id as usize]
    }

    /// Both hosts, A first.
    pub fn hosts(&self) -> &[Host; 2] {
        &self.hosts
    }

    /// The guests' network.
    ///
    /// # Panics
    ///
    /// If the lab was made without a switch.
    pub fn lan(&self) -> &Lan {
        self.lan.as_ref().expect("the lab was asked for a switch")
    }

    /// Sets what port `index` carries in both directions; `None` lifts the limit.
    ///
    /// # Errors
    ///
    /// If `tc` refuses.
    ///
    /// # Panics
    ///
    /// If there is no such port.
    pub fn set_port_rate(&self, index: usize, rate: Option<Rate>) -> Result<()> {
        self.hosts.iter().try_for_each(|host| host.set_port_rate(index, rate))
    }

    /// Has port `index` silently drop everything in both directions, or carry it again. Neither host is told: links
    /// stay up, and what is sent seems to have been sent. Its rate is not to be changed meanwhile.
    ///
    /// # Errors
    ///
    /// If `tc` refuses.
    ///
    /// # Panics
    ///
    /// If there is no such port.
    pub fn silence_port(&self, index: usize, silent: bool) -> Result<()> {
        self.hosts.iter().try_for_each(|host| host.silence_port(index, silent))
    }
}

/// `memlane-PID-N`: [`namespace::sweep`] reads the owner out of it.
fn unique_id() -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("memlane-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A directory of a lab, whose name says whose it is.
fn directory(id: &str) -> Result<PathBuf> {
    let directory = tempfile::Builder::new().prefix(&format!("{id}-")).tempdir();
    Ok(directory.context("creating the directory of a lab")?.keep())
}

/// A cable of our own, where the kernel's would not do.
fn cable(
    interface: &str,
    namespaces: [&Namespace; 2],
    mtu: u32,
    delay: Duration,
    loss: Option<Loss>,
) -> Result<Cable> {
    let cable = Cable::lay(namespaces, interface, delay, loss)?;
    namespaces
        .into_iter()
        .try_for_each(|namespace| network::prepare_tun(namespace.name(), interface, mtu))?;
    Ok(cable)
}

fn make_host(
    id: HostId,
    namespace: Namespace,
    (ports, far_ends): (&[String], Vec<Arc<Tun>>),
    places: [&Path; 2],
    options: &LabOptions,
) -> Result<Host> {
    namespace.run_in(network::disable_ipv6)?.context("turning IPv6 off in a namespace")?;

    let mut links = vec![(CONTROL_INTERFACE, id.address(0))];
    let mut host_ports = Vec::with_capacity(ports.len());
    for (interface, link) in ports.iter().zip(1..) {
        links.push((interface, id.address(link)));
        host_ports.push(Port { interface: interface.clone(), address: id.address(link) });
    }
    network::bring_up(namespace.name(), &links)?;

    let bridge = (options.bridge || options.switch).then(Bridge::default);
    if let Some(bridge) = &bridge {
        network::add_bridge(namespace.name(), bridge)?;
    }

    let [directory, memory] = places.map(|place| place.join(id.letter()));
    for directory in [&directory, &memory] {
        std::fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    }
    let name = format!("host-{}", id.letter());
    let host = Host::new(name, namespace, id.address(0), (host_ports, far_ends), bridge, [directory, memory]);
    if options.port_rate.is_some() {
        for index in 0..ports.len() {
            host.set_port_rate(index, options.port_rate)?;
        }
    }
    Ok(host)
}

fn remove(names: &[String], directory: &Path, memory: &Path) {
    for name in names {
        namespace::remove(name);
    }
    process::kill_all_naming(memory);
    for directory in [directory, memory] {
        // Best effort: this also runs where a directory was never made, and the next sweep tries again.
        let _ = std::fs::remove_dir_all(directory);
    }
}
