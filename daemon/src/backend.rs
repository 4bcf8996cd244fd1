//! The backend of the API: answers its calls from the state of the host.

use std::path::Path;
use std::rc::Rc;

use async_trait::async_trait;
use memlane_api::ids;
use memlane_api::types::{
    ApiError, Attach, CheckReport, ErrorCode, GuestInfo, Launch, Migration, Order, PeerInfo, PortInfo,
    Resolve, Status,
};
use memlane_guest::qemu::QemuError;
use memlane_guest::qemu::definition::{Definition, DefinitionError};
use memlane_migrate::progress::{Phase, Role};
use memlane_migrate::{MigrationHandle, preflight};
use memlane_net::config::PortConfig;
use memlane_net::task;
use memlane_protocol::wire::hello;
use memlane_protocol::wire::{BadLabel, Label};
use tokio::sync::watch;
use tracing::info;

use crate::api::{Backend, Caller};
use crate::host::Host;
use crate::surroundings::is_up;
use crate::{keys, metrics, orders, retry, views};

/// The backend that answers for the host.
pub(crate) struct HostBackend(pub Rc<Host>);

#[async_trait(?Send)]
impl Backend for HostBackend {
    async fn status(&self) -> Status {
        let host = &self.0;
        let kvm = task::aside(|| Path::new("/dev/kvm").exists()).await;
        Status {
            host: host.config.host.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol_versions: [hello::VERSIONS.0, hello::VERSIONS.1],
            uptime_seconds: host.started.elapsed().as_secs_f64(),
            guests: host.guests.count(),
            migrations: host.context().migrations.active(),
            insecure: host.protection.credentials().is_none(),
            certificate_expires_seconds: keys::expiry(host),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            kvm,
        }
    }

    async fn ports(&self) -> Vec<PortInfo> {
        let ports = self.0.config.ports.clone();
        // To read the state of an interface may wait for a program that configures one.
        let seen = task::aside(move || ports.iter().map(port_state).collect::<Vec<_>>()).await;
        self.0.config.ports.iter().zip(seen).map(|(port, seen)| port_info(&self.0, port, seen)).collect()
    }

    fn peers(&self) -> Vec<PeerInfo> {
        let peers = self.0.config.peers.iter();
        peers
            .map(|peer| PeerInfo { name: peer.name.to_string(), control: peer.control.to_string() })
            .collect()
    }

    fn guests(&self) -> Vec<GuestInfo> {
        self.0.guests.all().iter().map(|guest| views::guest(guest, &self.0.qemu)).collect()
    }

    async fn launch(&self, caller: Caller, launch: Launch) -> Result<GuestInfo, ApiError> {
        let Launch { definition, incoming } = launch;
        let invalid = |error: DefinitionError| ApiError::new(ErrorCode::Invalid, error.to_string());
        let definition = Definition::parse(Path::new("guest file"), &definition).map_err(invalid)?;
        let name = definition.name.clone();
        info!(guest = %name, incoming, %caller, "ordered to launch a guest");
        let launched = self.0.qemu.launch(definition, incoming).await;
        let guest = launched.map_err(|error| qemu_error(ErrorCode::CannotLaunch, "launch", &name, error))?;
        Ok(views::guest(&guest, &self.0.qemu))
    }

    async fn attach(&self, caller: Caller, attach: Attach) -> Result<GuestInfo, ApiError> {
        let Attach { name, qmp, incoming } = attach;
        let invalid = |error: BadLabel| ApiError::new(ErrorCode::Invalid, error.to_string());
        let name: Label = name.parse().map_err(invalid)?;
        info!(guest = %name, incoming, %caller, "ordered to attach a guest");
        let attached = self.0.qemu.attach(name.clone(), qmp.into(), incoming).await;
        let guest = attached.map_err(|error| qemu_error(ErrorCode::CannotAttach, "attach", &name, error))?;
        Ok(views::guest(&guest, &self.0.qemu))
    }

    async fn detach(&self, caller: Caller, name: &str) -> Result<GuestInfo, ApiError> {
        let guest = orders::guest(&self.0, name)?;
        info!(guest = name, %caller, "ordered to detach a guest");
        // The guest is described before the daemon forgets it.
        let info = views::guest(&guest, &self.0.qemu);
        let name = &guest.shape.name;
        self.0
            .qemu
            .detach(name)
            .map_err(|error| qemu_error(ErrorCode::CannotDetach, "detach", name, error))?;
        Ok(info)
    }

    fn migrations(&self) -> Vec<Migration> {
        self.0.context().migrations.all().iter().map(|handle| describe(handle)).collect()
    }

    fn migration(&self, id: &str) -> Result<Migration, ApiError> {
        Ok(describe(&*self.find(id)?))
    }

    async fn check(&self, order: Order) -> Result<CheckReport, ApiError> {
        let (guest, peer) = orders::parties(&self.0, &order)?;
        let findings = self.0.migrate.check(&guest, &peer, orders::min_bandwidth(&self.0, &order)).await;
        Ok(views::check(order.guest, order.host, findings))
    }

    async fn migrate(&self, caller: Caller, order: Order) -> Result<Migration, ApiError> {
        info!(guest = order.guest, peer = order.host, %caller, "ordered to move a guest");
        let handle = orders::begin(&self.0, &order).await?;
        retry::keep(&self.0, order, handle.clone());
        Ok(describe(&handle))
    }

    fn cancel(&self, caller: Caller, id: &str) -> Result<Migration, ApiError> {
        let handle = self.find(id)?;
        info!(guest = %handle.guest, migration = id, %caller, "ordered to cancel a migration");
        let tried_again = handle.is_over() && handle.progress.borrow().retries_left > 0;
        if !handle.cancellable.get() && !tried_again {
            let progress = handle.progress.borrow();
            let why = match (progress.role, progress.status.outcome) {
                (_, Some(outcome)) => format!("it has ended: {outcome}"),
                (Role::Destination, None) => "it must be cancelled at the source".to_owned(),
                (Role::Source, None) => "the guest has been handed over already".to_owned(),
            };
            let text = format!("migration {id} of guest {} cannot be cancelled: {why}", handle.guest);
            return Err(ApiError::new(ErrorCode::TooLate, text));
        }
        handle.cancelled.send_replace(true);
        Ok(describe(&handle))
    }

    fn abandon(&self, caller: Caller, id: &str) -> Result<Migration, ApiError> {
        let handle = self.find(id)?;
        info!(guest = %handle.guest, migration = id, %caller, "ordered to abandon the missing memory of a guest");
        if !handle.abandonable.get() {
            let why = match handle.progress.borrow().status.outcome {
                Some(outcome) => format!("it has ended: {outcome}"),
                None => "the guest does not run in post-copy".to_owned(),
            };
            let text = format!("nothing of migration {id} of guest {} can be abandoned: {why}", handle.guest);
            return Err(ApiError::new(ErrorCode::TooLate, text));
        }
        handle.abandoned.send_replace(true);
        Ok(describe(&handle))
    }

    fn resolve(&self, caller: Caller, id: &str, resolve: Resolve) -> Result<Migration, ApiError> {
        let handle = self.find(id)?;
        let Resolve { action, other_host_is_off } = resolve;
        if !handle.resolvable.get() || handle.resolutions.try_send(action.into()).is_err() {
            let progress = handle.progress.borrow();
            let why = match (progress.status.outcome, progress.status.phase, &progress.status.waits_for) {
                (Some(outcome), ..) => format!("it has ended: {outcome}"),
                (None, Phase::Fetching, _) => {
                    "the guest runs and fetches its memory; `memlanectl abandon` gives that up".to_owned()
                }
                (None, _, Some(what)) => format!("its migration waits for {what}"),
                (None, ..) => "both hosts are working on its migration".to_owned(),
            };
            let text = format!("guest {} of migration {id} is not in doubt: {why}", handle.guest);
            return Err(ApiError::new(ErrorCode::NotInDoubt, text));
        }
        handle.resolvable.set(false);
        tracing::warn!(
            guest = %handle.guest, peer = %handle.peer, migration = id, ?action, other_host_is_off, %caller,
            "an operator decides about a guest in doubt"
        );
        Ok(describe(&handle))
    }

    fn watch(&self, id: &str) -> Result<watch::Receiver<Migration>, ApiError> {
        Ok(follow(&*self.find(id)?))
    }

    async fn metrics(&self) -> String {
        let migrations = self.0.context().migrations.all();
        let migrations: Vec<_> = migrations.iter().map(|handle| handle.progress.borrow().clone()).collect();
        let ports = self.0.config.ports.iter().map(|port| port.name.as_str());
        let guests: Vec<u64> = self.0.guests.all().iter().map(|guest| guest.shape.ram_bytes()).collect();
        metrics::encryption(keys::expiry(&self.0));
        metrics::now(&guests, &migrations, ports);
        self.0.lookout.look(&self.0).await;
        task::aside(metrics::render).await
    }
}

impl HostBackend {
    fn find(&self, id: &str) -> Result<Rc<MigrationHandle>, ApiError> {
        let found = ids::decode(id).and_then(|id| self.0.context().migrations.get(&id));
        let unknown = || format!("no migration {id} is known here; see `memlanectl status`");
        found.ok_or_else(|| ApiError::new(ErrorCode::UnknownMigration, unknown()))
    }
}

/// Asks the kernel whether a port can be used, and for its speed in bits per second.
fn port_state(port: &PortConfig) -> (bool, Option<u64>) {
    (is_up(port), preflight::speed(port))
}

fn port_info(host: &Host, port: &PortConfig, (up, speed): (bool, Option<u64>)) -> PortInfo {
    let (bytes_sent, bytes_received) = host.context().traffic.of(&port.name);
    PortInfo {
        name: port.name.to_string(),
        interface: port.interface.clone(),
        address: port.address.to_string(),
        speed_bits_per_second: speed,
        up,
        lanes: port.lanes,
        bytes_sent,
        bytes_received,
    }
}

fn qemu_error(code: ErrorCode, doing: &str, name: &Label, error: QemuError) -> ApiError {
    let code = if matches!(error, QemuError::Moving(_)) { ErrorCode::AlreadyMoving } else { code };
    ApiError::new(code, format!("cannot {doing} guest {name}: {error}"))
}

/// Describes a migration as it is now.
fn describe(handle: &MigrationHandle) -> Migration {
    views::migration(&handle.progress.borrow())
}

/// Follows a migration for as long as the receiver lives.
fn follow(handle: &MigrationHandle) -> watch::Receiver<Migration> {
    let mut progress = handle.progress.subscribe();
    let (sender, receiver) = watch::channel(views::migration(&progress.borrow_and_update()));
    task::spawn("view of a migration", async move {
        loop {
            tokio::select! {
                changed = progress.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
            }
            sender.send_replace(views::migration(&progress.borrow_and_update()));
        }
    });
    receiver
}
