//! Commands that follow or change a migration.

use std::io::IsTerminal;
use std::time::Duration;

use memlane_api::client::{Client, ClientError, Events};
use memlane_api::types::{ErrorCode, Migration, Order, Resolution, Resolve};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::exit::{Error, Exit};
use crate::progress::ProgressOutput;
use crate::{show, summary};

/// The time between two questions about a migration whose changes the daemon does not report.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// Begins a migration and follows it to its end. Ctrl-C asks to cancel it.
pub(crate) async fn migrate(
    client: &Client,
    order: &Order,
    detach: bool,
    as_json: bool,
) -> Result<Exit, Error> {
    let mut interrupts = interrupts()?;
    let mut interrupted = false;
    let mut begun = std::pin::pin!(client.migrate(order));
    let migration = loop {
        tokio::select! {
            migration = &mut begun => break migration?,
            _ = interrupts.recv(), if !interrupted => {
                // The daemon finishes what it was asked for, so there is something to cancel.
                interrupted = true;
                show::note("memlanectl: will cancel as soon as the preflight is done");
            }
        }
    };
    if detach && !interrupted {
        let Migration { id, guest, host, .. } = &migration;
        match as_json {
            true => show::json(&migration),
            false => show::line(&format!("{guest} → {host}: begun, migration {id}")),
        }
        return Ok(Exit::Completed);
    }
    let mut progress = ProgressOutput::of_output(as_json);
    let on_interrupt = OnInterrupt::Cancel { now: interrupted };
    let ended = follow_all(client, &migration.id, &mut progress, &mut interrupts, on_interrupt).await;
    progress.finish();
    let ended = ended?;
    match as_json {
        true => show::json(&ended),
        false => show::line(&summary::of(&ended)),
    }
    Ok(exit_of(&ended))
}

/// Follows a migration to its end.
pub(crate) async fn watch(client: &Client, which: Option<&str>, as_json: bool) -> Result<Exit, Error> {
    let migration = find(client, which).await?;
    let mut progress = if as_json { ProgressOutput::Events } else { ProgressOutput::of_output(false) };
    let ended =
        follow_all(client, &migration.id, &mut progress, &mut interrupts()?, OnInterrupt::Leave).await;
    progress.finish();
    let ended = ended?;
    if !as_json {
        show::line(&summary::of(&ended));
    }
    Ok(exit_of(&ended))
}

/// Asks a migration to end; the guest stays at its source.
pub(crate) async fn cancel(client: &Client, which: &str, as_json: bool) -> Result<Exit, Error> {
    let migration = find(client, Some(which)).await?;
    let migration = client.cancel(&migration.id).await?;
    let Migration { id, guest, .. } = &migration;
    match as_json {
        true => show::json(&migration),
        false => show::line(&format!("{guest}: asked to cancel; memlanectl watch {id} shows the outcome")),
    }
    Ok(Exit::Completed)
}

/// Gives up the missing memory of a guest.
pub(crate) async fn abandon(client: &Client, which: &str, as_json: bool) -> Result<Exit, Error> {
    let migration = find(client, Some(which)).await?;
    let migration = client.abandon(&migration.id).await?;
    let Migration { id, guest, .. } = &migration;
    match as_json {
        true => show::json(&migration),
        false => show::line(&format!(
            "{guest}: its missing memory is given up; memlanectl watch {id} shows the outcome"
        )),
    }
    Ok(Exit::Completed)
}

/// Decides about a guest in doubt, after the user has confirmed it.
pub(crate) async fn resolve(
    client: &Client,
    which: &str,
    resolve: Resolve,
    sure: bool,
    as_json: bool,
) -> Result<Exit, Error> {
    let migration = find(client, Some(which)).await?;
    if !sure {
        confirm(&migration, resolve)?;
    }
    let migration = client.resolve(&migration.id, &resolve).await?;
    let Migration { id, guest, .. } = &migration;
    match as_json {
        true => show::json(&migration),
        false => show::line(&format!("{guest}: decided; memlanectl watch {id} shows the outcome")),
    }
    Ok(Exit::Completed)
}

/// Makes the user type `yes` on a terminal. Without a terminal the command is not confirmed.
fn confirm(migration: &Migration, resolve: Resolve) -> Result<(), Error> {
    let usage = |message: &str| Err(Error::Command(ErrorCode::Invalid, message.to_owned()));
    if !std::io::stdin().is_terminal() {
        return usage(
            "this command must be confirmed, and there is no terminal to ask on; give --yes if it is meant",
        );
    }
    let guest = &migration.guest;
    let what = match (resolve.action, resolve.other_host_is_off) {
        (Resolution::RunHere, _) => format!(
            "{guest} will run here. If the other host runs it too, or ever does, its disks are destroyed"
        ),
        (Resolution::Discard, true) => format!("the copy of {guest} on this host is given up for good"),
        (Resolution::Discard, false) => {
            format!(
                "the copy of {guest} on this host is given up for good, even if the other host has no copy"
            )
        }
    };
    eprint!("{what}. Type yes to go on: ");
    let mut answer = String::new();
    match std::io::stdin().read_line(&mut answer) {
        Ok(_) if answer.trim() == "yes" => Ok(()),
        _ => usage("not confirmed; nothing was decided"),
    }
}

/// The effect of Ctrl-C.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OnInterrupt {
    /// The first Ctrl-C asks to cancel, and the second one leaves. If `now`, the first one has been pressed already.
    Cancel { now: bool },
    /// The first Ctrl-C leaves.
    Leave,
}

/// Starts to listen for Ctrl-C. It is kept until it is looked for.
fn interrupts() -> Result<Signal, Error> {
    signal(SignalKind::interrupt()).map_err(|error| Error::Left(format!("cannot wait for Ctrl-C: {error}")))
}

/// Follows a migration to its end, and those that follow it if it fails and is tried again.
async fn follow_all(
    client: &Client,
    id: &str,
    progress: &mut ProgressOutput,
    interrupts: &mut Signal,
    mut on_interrupt: OnInterrupt,
) -> Result<Migration, Error> {
    let mut id = id.to_owned();
    loop {
        let ended = follow(client, &id, progress, interrupts, on_interrupt).await?;
        let mut left = if exit_of(&ended) == Exit::Failed { ended.retries_left } else { 0 };
        if left > 0 {
            let reason = ended.reason.as_deref().unwrap_or("it failed");
            progress.say(&format!("{}: {reason}; trying again, {left} more times at most", ended.guest));
        }
        let next = loop {
            if left == 0 {
                return Ok(ended);
            }
            tokio::select! {
                () = tokio::time::sleep(ASK_AGAIN) => {}
                _ = interrupts.recv() => match on_interrupt {
                    OnInterrupt::Leave => return Ok(ended),
                    OnInterrupt::Cancel { .. } => {
                        on_interrupt = OnInterrupt::Leave;
                        ask_to_cancel(client, &id, progress).await?;
                    }
                },
            }
            let migrations = client.migrations().await?;
            let next = migrations.into_iter().find(|migration| migration.retry_of.as_ref() == Some(&id));
            if let Some(next) = next {
                break next;
            }
            left = client.migration(&id).await?.retries_left;
        };
        id = next.id;
    }
}

async fn follow(
    client: &Client,
    id: &str,
    progress: &mut ProgressOutput,
    interrupts: &mut Signal,
    on_interrupt: OnInterrupt,
) -> Result<Migration, Error> {
    let mut changes = Changes::of(client, id).await?;
    let mut cancelling = false;
    if on_interrupt == (OnInterrupt::Cancel { now: true }) {
        cancelling = true;
        ask_to_cancel(client, id, progress).await?;
    }
    let mut last = None;
    loop {
        tokio::select! {
            change = changes.next(client, id) => match change? {
                Some(migration) => {
                    progress.update(&migration);
                    last = Some(migration);
                }
                None => break,
            },
            _ = interrupts.recv() => {
                if cancelling || on_interrupt == OnInterrupt::Leave {
                    return Err(Error::Left(format!(
                        "stopped watching before the end; the migration goes on, and memlanectl watch {id} shows it"
                    )));
                }
                cancelling = true;
                ask_to_cancel(client, id, progress).await?;
            }
        }
    }
    // A stream of events ends with the one that has the outcome, so there was one.
    last.ok_or_else(|| {
        Error::Command(ErrorCode::UnknownMigration, format!("the daemon reports nothing about migration {id}; memlanectl status shows the migrations under way"))
    })
}

/// The changes of a migration, one after the other.
enum Changes {
    /// The daemon reports the changes.
    Told(Events),
    /// The daemon is asked now and then, because it already reports to as many clients as it may. The value is `true`
    /// after the last change.
    Asked(bool),
}

impl Changes {
    async fn of(client: &Client, id: &str) -> Result<Self, ClientError> {
        match client.events(id).await {
            Ok(events) => Ok(Self::Told(events)),
            Err(ClientError::Api(error)) if error.code == ErrorCode::Unavailable => Ok(Self::Asked(false)),
            Err(error) => Err(error),
        }
    }

    /// Returns the next change; `None` after the one with the outcome.
    async fn next(&mut self, client: &Client, id: &str) -> Result<Option<Migration>, ClientError> {
        match self {
            Self::Told(events) => events.next().await,
            Self::Asked(true) => Ok(None),
            Self::Asked(ended) => {
                tokio::time::sleep(ASK_AGAIN).await;
                let migration = client.migration(id).await?;
                *ended = migration.outcome.is_some();
                Ok(Some(migration))
            }
        }
    }
}

async fn ask_to_cancel(client: &Client, id: &str, progress: &ProgressOutput) -> Result<(), Error> {
    match client.cancel(id).await {
        Ok(_) => progress
            .say("cancelling; the guest stays at its source. Press Ctrl-C again to leave without waiting"),
        Err(ClientError::Api(error)) => progress.say(&format!("cannot cancel: {error}")),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Finds the migration that has this identity or begins with these digits of it, or the latest one of this guest. By
/// default it finds the only one under way.
async fn find(client: &Client, which: Option<&str>) -> Result<Migration, Error> {
    let migrations = client.migrations().await?;
    let under_way: Vec<&Migration> =
        migrations.iter().filter(|migration| migration.outcome.is_none()).collect();
    let unknown = |message: String| Err(Error::Command(ErrorCode::UnknownMigration, message));
    let Some(which) = which else {
        return match under_way[..] {
            [only] => Ok(only.clone()),
            [] => unknown("no migration is under way".to_owned()),
            _ => unknown(format!("several migrations are under way; name one of them{}", listed(&under_way))),
        };
    };
    let of_guest = |migration: &&&Migration| migration.guest == which;
    let latest = under_way.iter().rev().find(of_guest).copied();
    if let Some(found) = latest.or_else(|| migrations.iter().rev().find(|migration| migration.guest == which))
    {
        return Ok(found.clone());
    }
    let begin_so: Vec<&Migration> =
        migrations.iter().filter(|migration| migration.id.starts_with(&which.to_ascii_lowercase())).collect();
    match begin_so[..] {
        [only] => Ok(only.clone()),
        [] => unknown(format!(
            "no migration has the identity {which}, and no guest of that name was moved{}",
            listed(&under_way)
        )),
        _ => unknown(format!("several migrations begin with {which}{}", listed(&begin_so))),
    }
}

fn listed(migrations: &[&Migration]) -> String {
    let lines = migrations.iter().map(|migration| {
        let Migration { id, guest, host, .. } = migration;
        format!("\n  {id}  {guest} → {host}")
    });
    lines.collect()
}

fn exit_of(migration: &Migration) -> Exit {
    migration.outcome.map_or(Exit::Other, Exit::of)
}
