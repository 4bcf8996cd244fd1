//! The two hosts and what joins them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::cable::{Cable, Loss};
use crate::child::kill_all_naming;
use crate::cleanup::Registration;
use crate::host::{HostId, LabHost, LabPort};
use crate::hosts::RemoteHosts;
use crate::lan::Lan;
use crate::namespace::{self, MEMORY, Namespace};
use crate::network::{self, Bridge};
use crate::programs::Programs;
use crate::rate::Rate;
use crate::requirements::{Requirement, why_not};
use crate::tun::Tun;

/// The largest number of ports that a lab may have.
pub const MAX_PORTS: usize = 64;

/// The longest path of a lab's directory, in bytes. Unix socket paths end at 107 bytes; the rest is for the names of
/// sockets in a host's directory.
const MAX_DIRECTORY_BYTES: usize = 64;

const CONTROL_INTERFACE: &str = "ctl0";

/// The parts that a [`Lab`] is made of.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// The number of ports of each host, 0 to [`MAX_PORTS`]. Port *i* of one host is joined to port *i* of the other.
    pub ports: usize,
    /// The rate of a port in each direction; unlimited if `None`. The control link is never limited in rate.
    pub port_rate: Option<Rate>,
    /// The time that a packet takes through a port, one way; no longer than the machine takes if `None`. A round trip
    /// takes twice as long.
    pub port_delay: Option<Duration>,
    /// The time that a packet takes through the control link, one way; no longer than the machine takes if `None`.
    pub control_delay: Option<Duration>,
    /// The packet loss of the ports; they lose nothing if `None`.
    pub port_loss: Option<Loss>,
    /// The MTU of all links, in bytes.
    pub mtu: u32,
    /// Whether each host has a bridge with an observer port, as a host has for its guests.
    pub bridge: bool,
    /// Whether a switch joins the hosts' bridges, with a client on it: see [`Lan`]. If so, the hosts have bridges too.
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

/// Two hosts joined by a control link and by ports. Dropping the lab removes all of it and ends the programs that run
/// in it.
#[derive(Debug)]
pub struct Lab {
    hosts: [LabHost; 2],
    mtu: u32,
    lan: Option<Lan>,
    /// The cables of the ports, if they have a delay or a loss. Their interfaces go when the hosts have let go of them too.
    cables: Vec<Cable>,
    _control_cable: Option<Cable>,
    // After `hosts`: fields are dropped in order, and a host's open namespace should not outlive its name by long.
    _cleanup: Registration,
}

impl Lab {
    /// Makes the hosts and brings all links up. It also removes what labs of dead processes left behind.
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
        // Guests' QEMUs are of other users: they may pass, and not look around.
        set_mode(&directory, 0o711)?;
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
        Ok(Self { hosts, mtu: options.mtu, lan, cables, _control_cable: control, _cleanup: cleanup })
    }

    /// Reaches hosts that exist already, and copies `programs` there. These hosts have only their ports, whose rates
    /// are not limited.
    ///
    /// # Errors
    ///
    /// If one cannot be reached, lacks an address, or has no room.
    pub fn over_ssh(hosts: &RemoteHosts, programs: &Programs) -> Result<Self> {
        namespace::sweep();
        let directory = directory(&unique_id())?;
        let cleanup = Registration::new({
            let directory = directory.clone();
            move || drop(std::fs::remove_dir_all(&directory))
        });
        let (hosts, mtu) = hosts.reach(programs, &directory)?;
        Ok(Self { hosts, mtu, lan: None, cables: Vec::new(), _control_cable: None, _cleanup: cleanup })
    }

    /// Returns whether the hosts are reached over ssh.
    pub fn is_remote(&self) -> bool {
        self.hosts[0].is_remote()
    }

    /// Returns whether both hosts have a usable /dev/kvm.
    pub fn has_kvm(&self) -> bool {
        self.hosts.iter().all(LabHost::has_kvm)
    }

    /// Returns the MTU of the ports, in bytes: the least, if they differ.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// Returns one of the hosts.
    pub fn host(&self, id: HostId) -> &LabHost {
        &self.hosts[id as usize]
    }

    /// Returns both hosts, A first.
    pub fn hosts(&self) -> &[LabHost; 2] {
        &self.hosts
    }

    /// Returns the guests' network.
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

    /// Makes packets through port `index` take `delay`, one way, and lose a share of them, from 0 to 1.
    ///
    /// # Errors
    ///
    /// If the lab was made without a delay and a loss of its ports, which may be 0: the kernel's own links have neither.
    pub fn set_port_quality(&self, index: usize, delay: Duration, loss: f64) -> Result<()> {
        let cable = self.cables.get(index).context("this port's link can neither delay nor lose packets")?;
        cable.set_quality(delay, loss)
    }

    /// Makes port `index` silently drop everything in both directions, or carry it again. Neither host notices: links
    /// stay up, and sent data seems to have been sent. The port's rate must not be changed while it is silent.
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

    /// Makes the control link silently drop everything in both directions, or carry it again, as
    /// [`silence_port`](Self::silence_port) does for a port.
    ///
    /// # Errors
    ///
    /// If `tc` refuses.
    pub fn silence_control(&self, silent: bool) -> Result<()> {
        self.hosts.iter().try_for_each(|host| host.silence(CONTROL_INTERFACE, silent))
    }
}

/// Returns a name like `memlane-PID-N`: [`namespace::sweep`] reads the owner from it.
pub(crate) fn unique_id() -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("memlane-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Makes the directory of a lab. Its name contains the process that owns it.
pub(crate) fn directory(id: &str) -> Result<PathBuf> {
    let directory = tempfile::Builder::new().prefix(&format!("{id}-")).tempdir();
    Ok(directory.context("creating the directory of a lab")?.keep())
}

/// Lays a cable that this process carries, for what the kernel's own links cannot do.
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
) -> Result<LabHost> {
    namespace.run_in(network::disable_ipv6)?.context("turning IPv6 off in a namespace")?;

    let mut links = vec![(CONTROL_INTERFACE, id.address(0))];
    let mut host_ports = Vec::with_capacity(ports.len());
    for (interface, link) in ports.iter().zip(1..) {
        links.push((interface, id.address(link)));
        host_ports.push(LabPort { interface: interface.clone(), address: id.address(link) });
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
    // As daemons want it.
    set_mode(&memory, 0o700)?;
    let name = format!("host-{}", id.letter());
    let host =
        LabHost::new(name, namespace, id.address(0), (host_ports, far_ends), bridge, [directory, memory]);
    let open = host.open_directory();
    std::fs::create_dir_all(&open).with_context(|| format!("creating {}", open.display()))?;
    // Not sticky: the QEMU that a guest moves to takes over the paths of the one before, which is another user's.
    set_mode(&open, 0o777)?;
    if options.port_rate.is_some() {
        for index in 0..ports.len() {
            host.set_port_rate(index, options.port_rate)?;
        }
    }
    Ok(host)
}

fn set_mode(directory: &Path, mode: u32) -> Result<()> {
    std::fs::set_permissions(directory, std::os::unix::fs::PermissionsExt::from_mode(mode))
        .with_context(|| format!("setting who may use {}", directory.display()))
}

fn remove(names: &[String], directory: &Path, memory: &Path) {
    for name in names {
        namespace::remove(name);
    }
    kill_all_naming(memory);
    for directory in [directory, memory] {
        // Best effort: this also runs where a directory was never made, and the next sweep tries again.
        let _ = std::fs::remove_dir_all(directory);
    }
}
