//! Orders that are tried again when their migration fails, if they say so, also by a daemon that was started anew.
//!
//! An order is written to a file in `orders/` beside the journal while it may be tried again. Nothing depends on that file
//! for the guest's safety: each try is a migration of its own, with all that belongs to one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use memlane_api::ids;
use memlane_api::types::{ApiError, Order};
use memlane_migrate::{MigrationHandle, progress};
use memlane_net::{private, task};
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::RunState;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::host::Host;
use crate::orders;

/// An order may be tried again this often.
pub(crate) const MOST: u32 = 100;
/// The first and the longest wait before a try.
const WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// After the daemon's start, the VMM of a guest has this long to attach again.
const RETURNING: Duration = Duration::from_secs(60);
/// What an earlier daemon has left is looked at in these intervals.
const LOOK: Duration = Duration::from_millis(200);
/// So many files of an earlier daemon are read.
const MOST_FILES: usize = 1024;

/// An order, as it is written down.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Kept {
    /// This is the identity of its last migration.
    migration: String,
    /// It may be tried so many times more.
    left: u32,
    order: Order,
}

/// Sees to it that an order is tried again if its migration, which has begun, fails.
pub(crate) fn keep(host: &Rc<Host>, order: Order, handle: Rc<MigrationHandle>) {
    let left = order.retry.unwrap_or(0).min(MOST);
    if left == 0 {
        return;
    }
    // Before anybody can see it end.
    handle.update(|progress| progress.retries_left = left);
    let kept = Kept { migration: ids::encode(&handle.id), left, order };
    task::spawn("order that may be tried again", follow(host.clone(), kept, handle));
}

/// Takes up the orders that an earlier daemon would have tried again.
pub(crate) async fn resume(host: &Rc<Host>) {
    let directory = directory(host);
    let read = task::aside(move || read_all(&directory)).await;
    for kept in read.unwrap_or_else(|error| {
        warn!(%error, "cannot read which orders are to be tried again");
        Vec::new()
    }) {
        info!(
            guest = kept.order.guest,
            peer = kept.order.host,
            left = kept.left,
            "an order may be tried again"
        );
        task::spawn("order of an earlier daemon", take_up(host.clone(), kept));
    }
}

/// Follows the migrations of an order, one after another.
async fn follow(host: Rc<Host>, mut kept: Kept, mut handle: Rc<MigrationHandle>) {
    loop {
        write(&host, &kept).await;
        if !ends_for_now(&handle).await {
            break;
        }
        match again(&host, &mut kept, Some(&handle)).await {
            Some(next) => handle = next,
            None => break,
        }
    }
    handle.update(|progress| progress.retries_left = 0);
    remove(&host, &kept).await;
}

/// Goes on with an order whose daemon ended.
async fn take_up(host: Rc<Host>, mut kept: Kept) {
    let before = ids::decode(&kept.migration).and_then(|id| host.context().migrations.get(&id));
    if let Some(handle) = &before {
        handle.update(|progress| progress.retries_left = kept.left);
    }
    // What was in doubt is settled first. It may have moved after all.
    let fails = match &before {
        Some(handle) => ends_for_now(handle).await,
        None => true,
    };
    if fails
        && comes_back(&host, &kept).await
        && let Some(handle) = again(&host, &mut kept, before.as_deref()).await
    {
        return follow(host, kept, handle).await;
    }
    if let Some(handle) = before {
        handle.update(|progress| progress.retries_left = 0);
    }
    remove(&host, &kept).await;
}

/// Waits until a migration has ended. Returns whether it is one that another try may mend.
async fn ends_for_now(handle: &MigrationHandle) -> bool {
    let mut progress = handle.progress.subscribe();
    let ended = progress.wait_for(|progress| progress.status.outcome.is_some()).await;
    let failed = ended.is_ok_and(|ended| ended.status.outcome == Some(progress::Outcome::Failed));
    failed && handle.may_be_retried.get()
}

/// Waits until the guest is here again. Returns whether it is.
async fn comes_back(host: &Host, kept: &Kept) -> bool {
    let here = async {
        while !runs_here(host, &kept.order.guest) {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(RETURNING, here).await.is_ok()
}

fn runs_here(host: &Host, guest: &str) -> bool {
    let guest = guest.parse::<Label>().ok().and_then(|name| host.guests.get(&name));
    guest.is_some_and(|guest| guest.run_state.get() == RunState::Running && !guest.is_moving())
}

/// Tries an order again, until a migration has begun or no try is left. `before` is the migration that failed, if this
/// daemon knows it.
async fn again(
    host: &Rc<Host>,
    kept: &mut Kept,
    before: Option<&MigrationHandle>,
) -> Option<Rc<MigrationHandle>> {
    let mut wait = WAIT.0;
    while kept.left > 0 {
        if cancelled_within(before, wait).await {
            info!(guest = kept.order.guest, "the order is not tried again: it was cancelled");
            return None;
        }
        wait = (2 * wait).min(WAIT.1);
        kept.left -= 1;
        match orders::begin(host, &kept.order).await {
            Ok(handle) => {
                info!(guest = kept.order.guest, left = kept.left, "an order is tried again");
                let failed = std::mem::replace(&mut kept.migration, ids::encode(&handle.id));
                remove_file(host, &failed).await;
                handle.update(|progress| {
                    (progress.retry_of, progress.retries_left) = (Some(failed), kept.left);
                });
                return Some(handle);
            }
            Err(error) => told(kept, before, &error),
        }
        write(host, kept).await;
    }
    None
}

/// Says that a try came to nothing.
fn told(kept: &Kept, before: Option<&MigrationHandle>, error: &ApiError) {
    warn!(guest = kept.order.guest, left = kept.left, %error, "an order was tried again, and refused");
    if let Some(before) = before {
        before.update(|progress| progress.retries_left = kept.left);
    }
}

/// Waits, and returns whether the operator has cancelled the order meanwhile.
async fn cancelled_within(before: Option<&MigrationHandle>, wait: Duration) -> bool {
    let Some(before) = before else {
        tokio::time::sleep(wait).await;
        return false;
    };
    let mut cancelled = before.cancelled.subscribe();
    tokio::time::timeout(wait, cancelled.wait_for(|cancelled| *cancelled)).await.is_ok()
}

fn directory(host: &Host) -> PathBuf {
    host.config.journal.join("orders")
}

fn file_of(directory: &Path, migration: &str) -> PathBuf {
    directory.join(format!("{migration}.json"))
}

/// Writes an order down. Where that fails, only this daemon tries it again.
async fn write(host: &Host, kept: &Kept) {
    let (directory, kept) = (directory(host), kept.clone());
    let write = move || {
        private::directory(&directory)?;
        let text = serde_json::to_vec(&kept).map_err(io::Error::other)?;
        private::put(&file_of(&directory, &kept.migration), &text)?;
        private::sync_directory(&directory)
    };
    if let Err(error) = task::aside(write).await {
        warn!(%error, "cannot write down that an order may be tried again; a daemon that is started anew will not try it");
    }
}

async fn remove(host: &Host, kept: &Kept) {
    remove_file(host, &kept.migration).await;
}

async fn remove_file(host: &Host, migration: &str) {
    let file = file_of(&directory(host), migration);
    let _ = task::aside(move || fs::remove_file(file)).await;
}

/// Reads the orders of an earlier daemon. A file that makes no sense is left out.
fn read_all(directory: &Path) -> io::Result<Vec<Kept>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries.take(MOST_FILES) {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        match fs::read(&path).map_err(serde_json::Error::io).and_then(|text| serde_json::from_slice(&text)) {
            Ok(kept) => found.push(kept),
            Err(error) => {
                warn!(file = %path.display(), %error, "cannot read an order that is to be tried again")
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_as_they_were_written_and_damage_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        assert!(read_all(&directory.path().join("none")).unwrap().is_empty());
        let order = Order { guest: "web1".into(), host: "host-b".into(), retry: Some(3), ..Order::default() };
        let kept = Kept { migration: "00".repeat(16), left: 2, order };
        let text = serde_json::to_vec(&kept).unwrap();
        fs::write(file_of(directory.path(), &kept.migration), &text).unwrap();
        fs::write(directory.path().join("damaged.json"), &text[..10]).unwrap();
        fs::write(directory.path().join("x.json.new"), &text).unwrap();
        let read = read_all(directory.path()).unwrap();
        assert_eq!((read.len(), &read[0].order, read[0].left), (1, &kept.order, 2));
    }
}
