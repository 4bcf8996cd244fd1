//! The fleet: two hosts, and guests that live there for long.

use std::path::PathBuf;

use anyhow::{Context, Result};
use memlane_lab::{HostId, LabOptions, Programs, Rate, Rig, RigOptions};
use std::time::Duration;

use super::linked::LinkedGuest;
use super::linux::SoakLinux;
use super::trouble::PORTS;
use crate::common::ask::{DaemonFacts, DaemonView};

/// The log filter: the steps of the handover are logged, which tell how a step that failed went.
const LOG: &str = "info,memlane_migrate::effects=debug";
/// The rate of a port, in bits a second: a guest's memory takes a second or two.
pub(crate) const PORT_RATE: u64 = 200_000_000;

/// The guests of memlane-vmm: names, and arguments. The first one writes faster than both ports carry.
const LINKED: [(&str, &str, &str); 4] = [
    ("log1", "--tracker log", "--ram 96MiB --working-set 48MiB --rate 16000 --vcpus 1"),
    ("ring1", "--tracker ring", "--ram 64MiB --working-set 8MiB --rate 2000 --vcpus 2"),
    ("pages1", "--tracker pagemap", "--ram 128MiB --working-set 16MiB --rate 4000 --vcpus 1"),
    ("proc1", "--guest process", "--ram 64MiB --working-set 32MiB --rate 8000 --vcpus 2"),
];
const LINUX: &str = "linux1";

/// The kinds of guests that a fleet has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FleetKinds {
    /// Whether there are guests of memlane-vmm.
    pub linked: bool,
    /// Whether there is a Linux in QEMU.
    pub linux: bool,
    /// Whether there is a /dev/kvm; without one, guests of memlane-vmm are processes.
    pub kvm: bool,
}

/// Two hosts, and guests that live there for long.
pub(crate) struct Fleet {
    /// The guests. They end before the hosts do.
    pub guests: Vec<FleetGuest>,
    /// The hosts and their daemons.
    pub rig: Rig,
}

/// A guest of the fleet.
pub(crate) struct FleetGuest {
    /// The name of the guest.
    pub name: String,
    /// The host on which it runs when nothing is under way.
    pub at: HostId,
    body: GuestBody,
}

enum GuestBody {
    Linked(Box<LinkedGuest>),
    Linux(Box<SoakLinux>),
}

impl FleetKinds {
    /// Returns the number of guests.
    pub(crate) fn guests(self) -> usize {
        if self.linked { LINKED.len() + usize::from(self.linux) } else { usize::from(self.linux) }
    }
}

impl Fleet {
    /// Makes the hosts, and starts all guests.
    ///
    /// # Errors
    ///
    /// If one does not come up.
    pub(crate) fn start(programs: &Programs, kinds: FleetKinds, seed: u64) -> Result<Self> {
        let lab = LabOptions {
            ports: PORTS,
            port_rate: Some(Rate::from_bits_per_second(PORT_RATE)),
            // None yet, but it comes and goes.
            port_delay: Some(Duration::ZERO),
            switch: kinds.linux,
            ..LabOptions::default()
        };
        let options = RigOptions {
            lab,
            tables: "[limits]\nsilence = \"2s\"\npatience = \"5s\"\n".into(),
            may_start_guests: true,
            environment: vec![("MEMLANE_LOG".to_owned(), LOG.to_owned())],
            ..RigOptions::default()
        };
        let mut rig = Rig::new(programs, options).context("making two hosts")?;
        let mut guests = Vec::new();
        let mut at = HostId::A;
        let linked = if kinds.linked { &LINKED[..] } else { &[] };
        for ((name, machine, work), number) in linked.iter().zip(1..) {
            let machine = if kinds.kvm { machine } else { "--guest process" };
            let line = format!(
                "{machine} {work} --fill zero=20,random=60,compressible=20 --seed {}",
                seed.wrapping_add(number)
            );
            let guest = LinkedGuest::start(&mut rig, at, name, &line)?;
            guests.push(FleetGuest {
                name: (*name).to_owned(),
                at,
                body: GuestBody::Linked(Box::new(guest)),
            });
            at = at.other();
        }
        if kinds.linux {
            let body = GuestBody::Linux(Box::new(SoakLinux::start(&rig, LINUX)?));
            guests.push(FleetGuest { name: LINUX.to_owned(), at: HostId::A, body });
        }
        Ok(Self { guests, rig })
    }

    /// Asks both daemons for all that they know.
    ///
    /// # Errors
    ///
    /// If one does not answer.
    pub(crate) fn ask(&self) -> Result<[DaemonView; 2]> {
        let ask = |id: HostId| {
            DaemonView::ask(&self.rig, id).with_context(|| format!("the daemon at {}", self.host(id)))
        };
        Ok([ask(HostId::A)?, ask(HostId::B)?])
    }

    /// Returns the name of a host.
    pub(crate) fn host(&self, id: HostId) -> &str {
        self.rig.lab().host(id).name()
    }

    /// Checks that a guest goes on where it is, and is whole.
    ///
    /// # Errors
    ///
    /// If that is not so.
    pub(crate) fn examine(&mut self, guest: usize) -> Result<()> {
        let FleetGuest { at, body, .. } = &mut self.guests[guest];
        match body {
            GuestBody::Linked(linked) => linked.examine(*at),
            GuestBody::Linux(linux) => linux.examine(&self.rig),
        }
    }

    /// Sees to it that a guest can be moved to the other host.
    ///
    /// # Errors
    ///
    /// If a VMM does not come up.
    pub(crate) fn prepare(&mut self, guest: usize) -> Result<()> {
        let FleetGuest { at, body, .. } = &mut self.guests[guest];
        match body {
            GuestBody::Linked(linked) => linked.prepare(&mut self.rig, at.other()),
            // The daemon there starts it.
            GuestBody::Linux(_) => Ok(()),
        }
    }

    /// Says when a guest had two owners, or has no or more than one VMM that may own it, when nothing is under way.
    pub(crate) fn two_owners(&self, guest: usize) -> Option<String> {
        match &self.guests[guest].body {
            GuestBody::Linked(linked) => linked.two_owners(),
            GuestBody::Linux(linux) => linux.two_owners(&self.rig),
        }
    }

    /// Returns files that say more about all guests.
    pub(crate) fn files(&mut self) -> Vec<PathBuf> {
        let files = |guest: &mut FleetGuest| match &mut guest.body {
            GuestBody::Linked(linked) => linked.files(),
            GuestBody::Linux(linux) => linux.files(&self.rig),
        };
        self.guests.iter_mut().flat_map(files).collect()
    }
}

impl FleetGuest {
    /// Returns the name of its kind, for people and for JSON.
    pub(crate) fn kind(&self) -> &'static str {
        match self.body {
            GuestBody::Linked(_) => "linked",
            GuestBody::Linux(_) => "qemu",
        }
    }

    /// Says what is under way with the guest on a host, by its VMM and by what the daemon says there.
    pub(crate) fn unsettled(&mut self, at: HostId, daemon: &DaemonFacts) -> Option<String> {
        match &mut self.body {
            GuestBody::Linked(linked) => linked.unsettled(at, daemon),
            GuestBody::Linux(linux) => linux.unsettled(daemon),
        }
    }

    /// Returns whether the guest runs on a host: by what its VMM says, or of QEMU, by what the daemon there says.
    pub(crate) fn runs(&mut self, at: HostId, daemon: &DaemonFacts) -> bool {
        match &mut self.body {
            GuestBody::Linked(linked) => linked.runs(at),
            GuestBody::Linux(_) => daemon.standing.as_deref() == Some("running"),
        }
    }
}
