//! Starts and ends the daemon.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use memlane_guest::attach_socket;
use memlane_kvm::ram::install_sigbus_handler;
use memlane_net::channel::Protection;
use memlane_net::journal::{Journal, JournalError};
use memlane_net::{port, resident, task};
use memlane_tls::CredentialsError;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::api::server;
use crate::backend::HostBackend;
use crate::config::Config;
use crate::host::Host;
use crate::{control, keys, metrics, retry, systemd};

/// When the daemon ends it waits at most this long for migrations to be cancelled.
const FAREWELL: Duration = Duration::from_secs(5);

/// The reason why the daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The journal is missing, damaged, or belongs to another host.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The keys of this host cannot be used.
    #[error(transparent)]
    Keys(#[from] CredentialsError),
    /// The API's socket cannot be opened.
    #[error(transparent)]
    Api(#[from] server::ServerError),
    /// The attach socket cannot be opened.
    #[error("cannot open the attach socket {}: {source}", path.display())]
    Attach {
        /// The path of the socket.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The daemon cannot listen on a TCP address.
    #[error("cannot listen on {address} ({what}): {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The purpose: `control`, `metrics` or the name of a port.
        what: String,
        /// The error of the system.
        source: io::Error,
    },
    /// Signals cannot be handled.
    #[error("cannot handle signals: {0}")]
    Signals(io::Error),
}

impl DaemonError {
    /// Returns the exit code of a daemon that ends so: 2 if somebody has to change something before it can start, as
    /// for a wrong configuration, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            // Any other error of reading may pass.
            Self::Keys(CredentialsError::Read { source, .. }) => match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => 2,
                _ => 1,
            },
            Self::Keys(_) => 2,
            _ => 1,
        }
    }
}

/// Runs the daemon until a signal ends it (SIGTERM, SIGINT).
///
/// # Errors
///
/// Fails if the daemon cannot start.
pub async fn run(config: Config) -> Result<(), DaemonError> {
    metrics::install();
    config.ports.iter().for_each(|port| metrics::port(port.name.as_str()));
    install_sigbus_handler().map_err(DaemonError::Signals)?;
    if let Err(error) = resident::keep_program() {
        let remedy =
            "on a host that is short of memory pauses may take longer; raise LimitMEMLOCK or ulimit -l";
        warn!(%error, "cannot keep the program in memory: {remedy}");
    }
    let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Signals)?;
    let hang_up = signal(SignalKind::hangup()).map_err(DaemonError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Signals)?;
    let protection = Protection::new(config.credentials()?);
    let (journal, unfinished) = Journal::open(&config.journal, metrics::journal_synced).await?;
    let host = Host::new(config, protection, journal);
    host.qemu.load().await;
    // Unfinished migrations are registered before the API can ask about them.
    host.migrate.recover(unfinished);
    listen(&host).await?;
    host.qemu.resume();
    retry::resume(&host).await;
    task::spawn("metrics upkeep", metrics::upkeep());
    task::spawn("service watchdog", systemd::watchdog());
    let (name, peers, ports) = (&host.config.host, host.config.peers.len(), host.config.ports.len());
    info!(host = %name, peers, ports, version = env!("CARGO_PKG_VERSION"), "ready");
    keys::report(&host);
    task::spawn("watch over the keys", keys::watch(host.clone()));
    task::spawn("reloading of keys", keys::reload_on(hang_up, host.clone()));
    systemd::ready(&format!("{name}: {ports} ports, {peers} peers"));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    systemd::stopping();
    cancel_migrations(&host).await;
    for socket in [&host.config.api_socket, &host.config.attach_socket] {
        let _ = std::fs::remove_file(socket);
    }
    info!("the daemon has ended; guests run on");
    Ok(())
}

async fn listen(host: &Rc<Host>) -> Result<(), DaemonError> {
    let config = &host.config;
    let failed = |address, what: &str| {
        let what = what.to_owned();
        move |source| DaemonError::Listen { address, what, source }
    };
    let control = port::listen(config.control).await.map_err(failed(config.control, "control"))?;
    for port in &config.ports {
        let address = SocketAddr::new(port.address, config.lane_port);
        let listener =
            port::listen(address).await.map_err(failed(address, &format!("port {}", port.name)))?;
        task::spawn("lane port", port::serve(listener, port.name.clone(), host.context().rendezvous.clone()));
    }
    // These sockets are opened last, so that a program that finds them finds a daemon that is ready.
    let path = config.attach_socket.clone();
    let attach = attach_socket::bind(&path).map_err(|source| DaemonError::Attach { path, source })?;
    let api = server::bind(&config.api_socket, config.access.socket_mode())?;
    let backend = Rc::new(HostBackend(host.clone()));
    if let Some(address) = config.metrics {
        let listener = tokio::net::TcpListener::bind(address).await.map_err(failed(address, "metrics"))?;
        task::spawn("metrics server", server::serve_metrics(listener, backend.clone()));
    }
    task::spawn("control port", control::serve(control, host.clone()));
    task::spawn("API server", server::serve(api, config.access.clone(), backend));
    task::spawn("attach socket", attach_socket::serve(attach, host.attaching()));
    Ok(())
}

/// Cancels all migrations that can be cancelled, so that guests are not paused for longer than necessary.
async fn cancel_migrations(host: &Host) {
    let migrations = host.context().migrations.all();
    migrations.iter().filter(|handle| handle.cancellable.get()).for_each(|handle| {
        handle.cancelled.send_replace(true);
    });
    let ended = async {
        for handle in &migrations {
            let _ = handle.progress.subscribe().wait_for(|progress| progress.status.outcome.is_some()).await;
        }
    };
    if tokio::time::timeout(FAREWELL, ended).await.is_err() {
        warn!("a migration has not ended in time; the daemon resumes it when it starts again");
    }
}
