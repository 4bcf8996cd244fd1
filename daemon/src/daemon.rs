//! Starting and ending the daemon.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use memlane_guest::attach_socket;
use memlane_kvm::ram::install_sigbus_handler;
use memlane_net::journal::{Journal, JournalError};
use memlane_net::{port, task};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::api::server;
use crate::backend::HostBackend;
use crate::config::Config;
use crate::host::Host;
use crate::{control, metrics, systemd};

/// Longest wait for migrations to be called off when the daemon ends.
const FAREWELL: Duration = Duration::from_secs(5);

/// Why the daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The journal is missing, damaged, or not ours.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The API's socket.
    #[error(transparent)]
    Api(#[from] server::ServerError),
    /// The attach socket.
    #[error("cannot open the attach socket {}: {source}", path.display())]
    Attach {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A TCP address.
    #[error("cannot listen on {address} ({what}): {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What for.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// Signals cannot be handled.
    #[error("cannot handle signals: {0}")]
    Signals(io::Error),
}

/// Runs the daemon until it is told to end (SIGTERM, SIGINT).
pub async fn run(config: Config) -> Result<(), DaemonError> {
    metrics::install();
    config.ports.iter().for_each(|port| metrics::port(port.name.as_str()));
    install_sigbus_handler().map_err(DaemonError::Signals)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Signals)?;
    let (journal, unfinished) = Journal::open(&config.journal, metrics::journal_synced).await?;
    let host = Host::new(config, journal);
    host.qemu.load().await;
    // Before anybody can ask about them.
    host.migrate.recover(unfinished);
    listen(&host).await?;
    host.qemu.resume();
    task::spawn("metrics upkeep", metrics::upkeep());
    task::spawn("service watchdog", systemd::watchdog());
    let (name, peers, ports) = (&host.config.host, host.config.peers.len(), host.config.ports.len());
    info!(host = %name, peers, ports, version = env!("CARGO_PKG_VERSION"), "ready");
    warn!("traffic between daemons, guests' memory included, is not encrypted (insecure = true)");
    systemd::ready(&format!("{name}: {ports} ports, {peers} peers"));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    systemd::stopping();
    call_off(&host).await;
    for socket in [&host.config.api_socket, &host.config.attach_socket] {
        let _ = std::fs::remove_file(socket);
    }
    info!("ended; guests run on");
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
    // Last, so that whoever finds these sockets finds everything.
    let path = config.attach_socket.clone();
    let attach = attach_socket::bind(&path).map_err(|source| DaemonError::Attach { path, source })?;
    let api = server::bind(&config.api_socket)?;
    let backend = Rc::new(HostBackend(host.clone()));
    if let Some(address) = config.metrics {
        let listener = tokio::net::TcpListener::bind(address).await.map_err(failed(address, "metrics"))?;
        task::spawn("metrics server", server::serve_metrics(listener, backend.clone()));
    }
    task::spawn("control port", control::serve(control, host.clone()));
    task::spawn("API server", server::serve(api, backend));
    task::spawn("attach socket", attach_socket::serve(attach, host.attaching()));
    Ok(())
}

/// Cancels what can be cancelled, so that guests do not stand still any longer than they must.
async fn call_off(host: &Host) {
    let migrations = host.context().migrations.all();
    migrations.iter().filter(|handle| handle.cancellable.get()).for_each(|handle| {
        handle.cancelled.send_replace(true);
    });
    let ended = async {
        for handle in &migrations {
            let _ = handle.progress.subscribe().wait_for(|progress| progress.outcome.is_some()).await;
        }
    };
    if tokio::time::timeout(FAREWELL, ended).await.is_err() {
        warn!("a migration has not ended; it is taken up when the daemon starts again");
    }
}
