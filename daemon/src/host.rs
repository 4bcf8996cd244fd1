//! This host: its guests, ports, peers and migrations.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::rc::Rc;
use std::time::Instant;

use memlane_protocol::convergence::Predictor;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::{MigrationId, Standing};
use memlane_protocol::wire::control::{Control, MAX_PORTS, Port};
use memlane_protocol::wire::machine::Nic;
use tracing::{info, warn};

use crate::api::types::Role;
use crate::config::{Config, PeerConfig};
use crate::guest::qemu::{Keepers, Register};
use crate::guest::shim::Shims;
use crate::guest::{Guest, Process};
use crate::journal::{Journal, VmmIdentity};
use crate::link::{Link, LinkError};
use crate::metrics;
use crate::migrate::{Ticket, preflight, recover};
use crate::port::{Rendezvous, Traffic};
use crate::seldom::Seldom;
use crate::task;

/// Migrations that are remembered after their end.
const REMEMBERED: usize = 100;

/// Everything the daemon knows.
pub struct Host {
    /// What it was told.
    pub config: Config,
    /// What it must remember.
    pub journal: Journal,
    /// Where lanes meet their migrations.
    pub rendezvous: Rc<Rendezvous>,
    /// What its ports have carried.
    pub traffic: Rc<Traffic>,
    /// Shims in VMMs that know nothing of Memlane.
    pub shims: Rc<Shims>,
    /// QEMUs that are kept to.
    pub keepers: Keepers,
    /// What is remembered of them.
    pub register: Rc<Register>,
    /// When it started.
    pub started: Instant,
    guests: RefCell<BTreeMap<Label, Rc<Guest>>>,
    /// Guests that can never be whole, and whose VMMs could not be ended.
    lost: RefCell<HashSet<(Label, VmmIdentity)>>,
    migrations: RefCell<Vec<Rc<Ticket>>>,
    /// Migrations that are being offered to this host.
    offered: RefCell<HashSet<MigrationId>>,
    /// What was said of VMMs that were sent away.
    strangers: RefCell<Seldom<(Label, u32)>>,
    /// Forecasts, by the kind of VMM.
    predictors: RefCell<HashMap<Label, Rc<RefCell<Predictor>>>>,
}

impl Host {
    /// A host without guests.
    pub fn new(config: Config, journal: Journal) -> Rc<Self> {
        let register = Rc::new(Register::beside(&config.journal));
        let rendezvous = Rc::new(Rendezvous::with(&config.peers));
        Rc::new(Self {
            config,
            journal,
            rendezvous,
            traffic: Rc::default(),
            shims: Rc::default(),
            keepers: Keepers::default(),
            register,
            started: Instant::now(),
            guests: RefCell::default(),
            lost: RefCell::default(),
            migrations: RefCell::default(),
            offered: RefCell::default(),
            strangers: RefCell::default(),
            predictors: RefCell::default(),
        })
    }

    /// A guest by its name.
    pub fn guest(&self, name: &Label) -> Option<Rc<Guest>> {
        self.guests.borrow().get(name).cloned()
    }

    /// All guests, by name.
    pub fn guests(&self) -> Vec<Rc<Guest>> {
        self.guests.borrow().values().cloned().collect()
    }

    /// A VMM has attached; it stays until its connection ends.
    ///
    /// # Errors
    ///
    /// Why it was sent away instead.
    pub fn guest_attached(self: &Rc<Self>, guest: Rc<Guest>) -> Result<(), &'static str> {
        let name = guest.shape.name.clone();
        if self.guest(&name).is_some() {
            warn!(guest = %name, "two VMMs came with one name; the second is sent away");
            guest.driver.hang_up();
            return Err("a guest of this name is here already");
        }
        let ticket = match self.recognise(&guest) {
            Ok(ticket) => ticket,
            Err(why) => {
                let pid = guest.process.identity().pid;
                if let Some(left_out) = self.strangers.borrow_mut().say((name.clone(), pid)) {
                    let what = "a VMM is not the one that a migration waits for; it is sent away";
                    warn!(guest = %name, pid, why, left_out, "{what}");
                }
                guest.driver.hang_up();
                return Err(why);
            }
        };
        let key = (name.clone(), guest.process.identity());
        if guest.standing.get() == Standing::Incoming {
            // The process waits for another guest of this name.
            self.lost.borrow_mut().remove(&key);
        }
        guest.lost.set(self.lost.borrow().contains(&key));
        self.guests.borrow_mut().insert(name.clone(), guest.clone());
        metrics::guests(self.guests.borrow().len());
        guest.map_ahead();
        let host = self.clone();
        let attached = guest.clone();
        task::spawn("watch of a VMM", async move {
            attached.driver.gone().await;
            info!(guest = %name, pid = attached.process.identity().pid, "a VMM is gone");
            let mut guests = host.guests.borrow_mut();
            if guests.get(&name).is_some_and(|other| Rc::ptr_eq(other, &attached)) {
                guests.remove(&name);
            }
            metrics::guests(guests.len());
        });
        if let Some(ticket) = ticket {
            // A migration that works on it already, and waits for it or is about to.
            guest.migration.replace((!ticket.is_over()).then_some(ticket.id));
            task::spawn("return of a VMM", async move {
                if let Err(unsent) = ticket.returns.send(guest).await {
                    // Over meanwhile: it attaches again, and is judged anew.
                    unsent.0.driver.hang_up();
                }
            });
        } else if matches!(guest.standing.get(), Standing::Relinquished | Standing::Loaded) {
            task::spawn("recovery of an unknown guest", recover::unknown(self.clone(), guest));
        }
        Ok(())
    }

    /// Notes that a guest can never be whole, and that its VMM could not be ended: it is no guest that runs.
    pub fn note_lost(&self, name: &Label, vmm: VmmIdentity) {
        self.lost.borrow_mut().insert((name.clone(), vmm));
        if let Some(guest) = self.guest(name).filter(|guest| guest.process.identity() == vmm) {
            guest.lost.set(true);
        }
    }

    /// The migration under way that a VMM which attaches belongs to, if one does; an error for a
    /// stranger, who claims to or is in its place.
    fn recognise(&self, guest: &Guest) -> Result<Option<Rc<Ticket>>, &'static str> {
        let claimed = guest.bond.borrow().as_ref().map(|bond| bond.migration);
        let concerned = |ticket: &Rc<Ticket>| {
            ticket.is_live() && (ticket.guest == guest.shape.name || claimed == Some(ticket.id))
        };
        let mut tickets = self.migrations();
        tickets.retain(concerned);
        // A guest may move again before the other host of its last move has heard of the end.
        if let Some(ticket) = tickets.iter().rev().find(|ticket| ticket.stranger(guest).is_none()) {
            return Ok(Some(ticket.clone()));
        }
        // Of a source that is done nothing is waited for but the end of its old VMM, which has no claim to the name.
        let done = |ticket: &Ticket| ticket.is_over() && ticket.progress.borrow().role == Role::Source;
        let claims =
            |ticket: &&Rc<Ticket>| claimed == Some(ticket.id) || !done(ticket) && Process::lives(ticket.vmm);
        match tickets.iter().rev().find(claims).and_then(|ticket| ticket.stranger(guest)) {
            Some(why) => Err(why),
            None => Ok(None),
        }
    }

    /// Takes note of an offer, until what is returned is dropped; `None` if a migration of this identity
    /// is under way here, or was lately, with whichever peer.
    pub fn take_offer(self: &Rc<Self>, id: MigrationId) -> Option<Offered> {
        let known = self.migration(&id).is_some() || self.journal.knows(&id);
        let fresh = !known && self.offered.borrow_mut().insert(id);
        fresh.then(|| Offered { host: self.clone(), id })
    }

    /// A peer by its name.
    pub fn peer(&self, name: &Label) -> Option<&PeerConfig> {
        self.config.peers.iter().find(|peer| peer.name == *name)
    }

    /// Connects to a peer, and says where lanes of this host come from; `None` if there is no such peer.
    pub async fn connect(&self, peer: &Label) -> Result<Option<Link>, LinkError> {
        let Some(peer) = self.peer(peer) else { return Ok(None) };
        let link = Link::connect(peer.control, &self.config.host, self.config.limits.silence).await?;
        let addresses = self.config.ports.iter().map(|port| port.address).take(MAX_PORTS).collect();
        link.send(&Control::LanesFrom(addresses)).await?;
        Ok(Some(link))
    }

    /// What is known about pauses of this kind of VMM.
    pub fn predictor(&self, vmm: &Label) -> Rc<RefCell<Predictor>> {
        self.predictors.borrow_mut().entry(vmm.clone()).or_default().clone()
    }

    /// Where lanes may connect.
    pub fn offered_ports(&self) -> Vec<Port> {
        preflight::offered_ports(self)
    }

    /// The address of a port, as text.
    pub fn port_address(&self, name: &Label) -> String {
        let port = self.config.ports.iter().find(|port| port.name == *name);
        port.map(|port| port.address.to_string()).unwrap_or_default()
    }

    /// The bridges of networks that are there.
    pub async fn bridges_there(&self) -> BTreeSet<String> {
        let bridges: Vec<_> = self.config.networks.iter().map(|network| network.bridge.clone()).collect();
        let is_there = |bridge: &String| std::path::Path::new("/sys/class/net").join(bridge).exists();
        task::aside(move || bridges.into_iter().filter(is_there).collect()).await
    }

    /// Why guests on this network cannot run here, if they cannot; `bridges` are there.
    pub fn network_missing(&self, network: &Label, bridges: &BTreeSet<String>) -> Option<String> {
        let Some(found) = self.config.networks.iter().find(|found| found.name == *network) else {
            return Some(format!(
                "network {network} is not configured here; add it as [[network]] with its bridge"
            ));
        };
        let missing = || format!("bridge {} of network {network} is not there; bring it up", found.bridge);
        (!bridges.contains(&found.bridge)).then(missing)
    }

    /// Addresses to announce, by the bridge of their network.
    pub fn bridges_of(&self, nics: &[Nic]) -> BTreeMap<String, Vec<[u8; 6]>> {
        let mut bridges: BTreeMap<String, Vec<[u8; 6]>> = BTreeMap::new();
        for nic in nics {
            match self.config.networks.iter().find(|network| network.name == nic.network) {
                Some(network) => bridges.entry(network.bridge.clone()).or_default().push(nic.mac),
                None => {
                    warn!(network = %nic.network, "cannot announce a guest on a network that is not configured")
                }
            }
        }
        bridges
    }

    /// Remembers a migration.
    pub fn add(self: &Rc<Self>, ticket: Rc<Ticket>) {
        let mut migrations = self.migrations.borrow_mut();
        // One that is over may still be worked on: its VMM is to be discarded, or the other host to hear of the end.
        let ended = |ticket: &Rc<Ticket>| ticket.is_over() && !ticket.is_live();
        let over = migrations.iter().filter(|ticket| ended(ticket)).count();
        if over >= REMEMBERED
            && let Some(oldest) = migrations.iter().position(ended)
        {
            migrations.remove(oldest);
        }
        migrations.push(ticket.clone());
        drop(migrations);
        metrics::migrations_active(self.active());
        let host = self.clone();
        let mut progress = ticket.progress.subscribe();
        task::spawn("count of migrations", async move {
            let _ = progress.wait_for(|progress| progress.outcome.is_some()).await;
            metrics::migrations_active(host.active());
        });
    }

    /// Migrations, the oldest first.
    pub fn migrations(&self) -> Vec<Rc<Ticket>> {
        self.migrations.borrow().clone()
    }

    /// The migration under way or ended with this identity.
    pub fn migration(&self, id: &MigrationId) -> Option<Rc<Ticket>> {
        self.migrations.borrow().iter().rev().find(|ticket| ticket.id == *id).cloned()
    }

    /// The same, if it is one with this peer.
    pub fn migration_with(&self, peer: &Label, id: &MigrationId) -> Option<Rc<Ticket>> {
        let is = |ticket: &&Rc<Ticket>| ticket.id == *id && ticket.peer == *peer;
        self.migrations.borrow().iter().rev().find(is).cloned()
    }

    /// How many migrations are under way.
    pub fn active(&self) -> usize {
        self.migrations.borrow().iter().filter(|ticket| !ticket.is_over()).count()
    }
}

/// An offer that is being looked at.
pub struct Offered {
    host: Rc<Host>,
    id: MigrationId,
}

impl Drop for Offered {
    fn drop(&mut self) {
        self.host.offered.borrow_mut().remove(&self.id);
    }
}

/// Bytes that nobody guesses, from the kernel.
pub fn random_id() -> MigrationId {
    let mut id = [0; 16];
    getrandom::fill(&mut id).expect("the kernel gives random bytes");
    id
}
