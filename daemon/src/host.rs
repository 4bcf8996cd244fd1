//! The host: all parts of the daemon, wired together.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use memlane_guest::attach_socket::Attaching;
use memlane_guest::config::QemuSettings;
use memlane_guest::shim::Shims;
use memlane_guest::{Guests, Users, qemu};
use memlane_migrate::{Context, Settings, Supervisor};
use memlane_net::channel::Protection;
use memlane_net::journal::Journal;

use crate::config::Config;
use crate::metrics::Metrics;
use crate::surroundings::Lookout;

/// All parts of the daemon.
pub(crate) struct Host {
    /// The configuration.
    pub config: Config,
    /// The protection of connections to other hosts.
    pub protection: Protection,
    /// The guests that are attached.
    pub guests: Rc<Guests>,
    /// The connections of shims in VMMs that are not linked with Memlane.
    pub shims: Rc<Shims>,
    /// The users that guests of this daemon have.
    pub guest_users: Rc<Users>,
    /// The supervisor of QEMU guests.
    pub qemu: Rc<qemu::Supervisor>,
    /// The supervisor of migrations.
    pub migrate: Rc<Supervisor>,
    /// The lookout for what metrics say of ports, peers, memory and the journal's disk.
    pub lookout: Lookout,
    /// The time when the daemon started.
    pub started: Instant,
}

impl Host {
    /// Makes a host without guests.
    pub(crate) fn new(config: Config, protection: Protection, journal: Journal) -> Rc<Self> {
        let (guests, shims) = (Rc::<Guests>::default(), Rc::<Shims>::default());
        let qemu = QemuSettings {
            guests: config.guests.clone(),
            networks: config.networks.clone(),
            attach_users: config.attach_users.clone(),
            attach_socket: config.attach_socket.clone(),
        };
        let guest_users = Users::new(config.guests.users);
        let parts = (guests.clone(), shims.clone(), guest_users.clone());
        let qemu = qemu::Supervisor::new(qemu, &config.journal, parts);
        let settings = Settings {
            host: config.host.clone(),
            ports: config.ports.clone(),
            lane_port: config.lane_port,
            peers: config.peers.clone(),
            networks: config.networks.clone(),
            limits: config.limits.clone(),
            protection: protection.clone(),
        };
        let observers = (Rc::new(Metrics) as _, Arc::new(Metrics) as _);
        let context = Context::new(settings, journal, guests.clone(), qemu.clone(), observers);
        let migrate = Supervisor::new(context);
        let (lookout, started) = (Lookout::default(), Instant::now());
        Rc::new(Self { config, protection, guests, shims, guest_users, qemu, migrate, lookout, started })
    }

    /// Returns the context that all migrations of this host share.
    pub(crate) fn context(&self) -> &Rc<Context> {
        self.migrate.context()
    }

    /// Returns the settings and registries that the attach socket needs.
    pub(crate) fn attaching(&self) -> Rc<Attaching> {
        Rc::new(Attaching {
            users: self.config.attach_users.clone(),
            guest_users: self.guest_users.clone(),
            limits: self.config.attach.clone(),
            guests: self.guests.clone(),
            shims: self.shims.clone(),
        })
    }
}
