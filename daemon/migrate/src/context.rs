//! The context of migrations is this host, as far as it concerns them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use memlane_guest::config::NetworkConfig;
use memlane_guest::{Guests, qemu};
use memlane_lane::postcopy::FaultObserver;
use memlane_net::channel::Protection;
use memlane_net::config::{PeerConfig, PortConfig};
use memlane_net::journal::Journal;
use memlane_net::link::{Link, LinkError};
use memlane_net::port::{Caller, Rendezvous, Traffic, holds};
use memlane_net::task;
use memlane_protocol::convergence::Predictor;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::MigrationId;
use memlane_protocol::wire::control::{Control, MAX_PORTS, Port};
use memlane_protocol::wire::machine::Nic;
use tracing::warn;

use crate::config::Limits;
use crate::observer::Observer;
use crate::registry::{Migrations, Offered};

/// These settings are what the configuration says that concerns migrations.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This is the name of this host, as its peers know it.
    pub host: Label,
    /// These network ports are lent to migrations.
    pub ports: Vec<PortConfig>,
    /// Lanes connect to this TCP port, on each migration port's address.
    pub lane_port: u16,
    /// Guests may move to these hosts and come from them.
    pub peers: Vec<PeerConfig>,
    /// Guests are plugged into these networks.
    pub networks: Vec<NetworkConfig>,
    /// These limits bound migrations.
    pub limits: Limits,
    /// Connections to other hosts are protected like this.
    pub protection: Protection,
}

/// Every migration of this host works with this context.
pub struct Context {
    /// This is what the configuration says.
    pub settings: Settings,
    /// The journal remembers what must survive a crash.
    pub journal: Journal,
    /// These are the guests that are here.
    pub guests: Rc<Guests>,
    /// This supervisor starts QEMUs for guests that are offered.
    pub qemu: Rc<qemu::Supervisor>,
    /// These are the migrations of this host.
    pub migrations: Rc<Migrations>,
    /// Lanes meet their migrations here.
    pub rendezvous: Rc<Rendezvous>,
    /// This counts what the ports have carried.
    pub traffic: Rc<Traffic>,
    /// The observer hears of everything that is measured.
    pub observer: Rc<dyn Observer>,
    /// This observer hears how long accesses to missing pages waited.
    pub faults: Arc<dyn FaultObserver>,
    /// The forecasts are kept by the kind of VMM.
    predictors: RefCell<HashMap<Label, Rc<RefCell<Predictor>>>>,
}

impl Context {
    /// Makes a context in which no migration is under way.
    pub fn new(
        settings: Settings,
        journal: Journal,
        guests: Rc<Guests>,
        qemu: Rc<qemu::Supervisor>,
        (observer, faults): (Rc<dyn Observer>, Arc<dyn FaultObserver>),
    ) -> Rc<Self> {
        let rendezvous = Rc::new(Rendezvous::with(&settings.peers, settings.protection.clone()));
        let (migrations, traffic, predictors) = Default::default();
        Rc::new(Self {
            settings,
            journal,
            guests,
            qemu,
            migrations,
            rendezvous,
            traffic,
            observer,
            faults,
            predictors,
        })
    }

    /// Returns the name of this host.
    pub fn name(&self) -> &Label {
        &self.settings.host
    }

    /// Returns the limits on migrations.
    pub fn limits(&self) -> &Limits {
        &self.settings.limits
    }

    /// Returns the peer of this name.
    pub fn peer(&self, name: &Label) -> Option<&PeerConfig> {
        self.settings.peers.iter().find(|peer| peer.name == *name)
    }

    /// Connects to a peer, and tells it which addresses the lanes of this host come from. Returns `None` if there is no
    /// such peer.
    ///
    /// # Errors
    ///
    /// Fails if the peer cannot be reached, or refuses the connection.
    pub async fn connect(&self, peer: &Label) -> Result<Option<Link>, LinkError> {
        let Some(peer) = self.peer(peer) else { return Ok(None) };
        let credentials = self.settings.protection.credentials();
        let silence = self.limits().silence;
        let link = Link::connect(peer, self.name(), credentials.as_deref(), silence).await?;
        let addresses = self.settings.ports.iter().map(|port| port.address).take(MAX_PORTS).collect();
        link.send(&Control::LanesFrom(addresses)).await?;
        Ok(Some(link))
    }

    /// Returns who this host is, for connections to the ports of a peer.
    pub(crate) fn caller(&self, peer: &Label) -> Caller {
        let (host, credentials) = (self.name().clone(), self.settings.protection.credentials());
        Caller { host, peer: peer.clone(), credentials }
    }

    /// Takes note of an offer, until the returned value is dropped. Returns `None` if a migration of this identity with
    /// any peer is under way here, or was lately.
    pub(crate) fn take_offer(&self, id: MigrationId) -> Option<Offered> {
        if self.journal.knows(&id) { None } else { self.migrations.take_offer(id) }
    }

    /// Returns what is known about pauses of this kind of VMM.
    pub fn predictor(&self, vmm: &Label) -> Rc<RefCell<Predictor>> {
        self.predictors.borrow_mut().entry(vmm.clone()).or_default().clone()
    }

    /// Returns the ports on which lanes may connect to this host, which are those whose addresses it has.
    pub fn offered_ports(&self) -> Vec<Port> {
        let up = self.settings.ports.iter().filter(|port| holds(port.address).unwrap_or(false));
        up.map(|port| Port {
            name: port.name.clone(),
            address: SocketAddr::new(port.address, self.settings.lane_port),
            lanes: port.lanes,
        })
        .collect()
    }

    /// Returns the address of a port as text, or an empty text if there is no such port.
    pub fn port_address(&self, name: &Label) -> String {
        let port = self.settings.ports.iter().find(|port| port.name == *name);
        port.map(|port| port.address.to_string()).unwrap_or_default()
    }

    /// Returns the bridges of the configured networks that are there.
    pub async fn bridges_there(&self) -> BTreeSet<String> {
        let bridges: Vec<_> = self.settings.networks.iter().map(|network| network.bridge.clone()).collect();
        let is_there = |bridge: &String| std::path::Path::new("/sys/class/net").join(bridge).exists();
        task::aside(move || bridges.into_iter().filter(is_there).collect()).await
    }

    /// Returns why guests on this network cannot run here, if they cannot. `bridges` are those that are there.
    pub fn network_missing(&self, network: &Label, bridges: &BTreeSet<String>) -> Option<String> {
        let Some(found) = self.settings.networks.iter().find(|found| found.name == *network) else {
            return Some(format!(
                "network {network} is not configured here; add it as [[network]] with its bridge"
            ));
        };
        let missing = || format!("bridge {} of network {network} is not there; bring it up", found.bridge);
        (!bridges.contains(&found.bridge)).then(missing)
    }

    /// Returns the Ethernet addresses to announce, by the bridge of their network.
    pub fn bridges_of(&self, nics: &[Nic]) -> BTreeMap<String, Vec<[u8; 6]>> {
        let mut bridges: BTreeMap<String, Vec<[u8; 6]>> = BTreeMap::new();
        for nic in nics {
            match self.settings.networks.iter().find(|network| network.name == nic.network) {
                Some(network) => bridges.entry(network.bridge.clone()).or_default().push(nic.mac),
                None => {
                    warn!(network = %nic.network, "cannot announce a guest on a network that is not configured")
                }
            }
        }
        bridges
    }
}
