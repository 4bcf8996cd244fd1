//! The keys of this host: what is said of them, and how they are read again.

use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use memlane_net::task;
use tokio::signal::unix::Signal;
use tracing::{error, info, warn};

use crate::host::Host;

/// Operators are warned so long before the certificate expires.
const SOON: Duration = Duration::from_secs(14 * 24 * 3600);

/// Operators are warned this often.
const EACH_DAY: Duration = Duration::from_secs(24 * 3600);

/// Says in the log how the traffic between daemons is protected.
pub(crate) fn report(host: &Host) {
    let Some(credentials) = host.protection.credentials() else {
        return warn!(
            "the traffic between daemons, which includes the memory of guests, is not encrypted, and a peer is known by \
             its address alone (insecure = true)"
        );
    };
    let certificate_days = credentials
        .expires()
        .duration_since(SystemTime::now())
        .map_or(0, |left| left.as_secs() / EACH_DAY.as_secs());
    info!(
        certificate_days,
        "the traffic between daemons is encrypted, and a peer is known by its certificate"
    );
    warn_if_it_expires(host);
}

/// Warns each day while the certificate of this host is about to expire, and when it has.
pub(crate) async fn watch(host: Rc<Host>) {
    loop {
        tokio::time::sleep(EACH_DAY).await;
        warn_if_it_expires(&host);
    }
}

fn warn_if_it_expires(host: &Host) {
    let Some(credentials) = host.protection.credentials() else { return };
    let left = credentials.expires().duration_since(SystemTime::now());
    let remedy =
        "issue a new one with `memlanectl keys issue`, put it in its place, and send SIGHUP to the daemon";
    match left {
        Ok(left) if left < SOON => {
            let days = left.as_secs() / EACH_DAY.as_secs();
            warn!(days, "the certificate of this host expires soon; {remedy}");
        }
        Ok(_) => {}
        Err(_) => error!("the certificate of this host has expired, and peers refuse it; {remedy}"),
    }
}

/// Reads the keys again whenever the signal comes. Connections that exist stay as they are, and what cannot be used is
/// not taken.
pub(crate) async fn reload_on(mut signal: Signal, host: Rc<Host>) {
    while signal.recv().await.is_some() {
        let config = host.config.clone();
        match task::aside(move || config.credentials()).await {
            Ok(Some(credentials)) => {
                host.protection.replace(credentials);
                info!("the keys were read again; new connections use them");
                if host.config.keys.as_ref().is_some_and(|files| are_handed_over(&files.certificate)) {
                    warn!(
                        "systemd has handed over the keys (LoadCredential=), and may do so only when the daemon starts: \
                         if they were renewed since then, restart the daemon when nothing moves"
                    );
                }
                report(&host);
            }
            Ok(None) => info!("there are no keys to read again (insecure = true)"),
            Err(error) => error!(%error, "the keys were not read again; those before stay in use"),
        }
    }
}

/// Returns whether a file is one that systemd has handed over.
fn are_handed_over(file: &Path) -> bool {
    std::env::var_os("CREDENTIALS_DIRECTORY").is_some_and(|directory| file.starts_with(directory))
}

/// Returns when the certificate of this host expires, in seconds since 1970 (UTC), or `None` if nothing is encrypted.
pub(crate) fn expiry(host: &Host) -> Option<f64> {
    let expires = host.protection.credentials()?.expires();
    Some(expires.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64())
}
