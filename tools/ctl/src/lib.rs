//! The parts of `memlanectl`, which gives orders to the daemon of this host and shows what it does.
//!
//! Programs that make man pages and completions take the definition of its arguments from here.

#![forbid(unsafe_code)]

mod args;
mod child;
mod doctor;
mod exit;
mod guests;
mod help;
mod interfaces;
mod keys;
mod libvirt;
mod orders;
mod progress;
mod setup;
mod show;
mod summary;
mod units;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use memlane_api::client::Client;
use memlane_api::types::{Resolution, Resolve};
use serde::Serialize;

use args::{Args, Command};
use exit::{Error, Exit};

/// Returns the definition of the command line.
pub fn command() -> clap::Command {
    Args::command()
}

/// Carries out the command line of this process.
pub async fn run() -> ExitCode {
    let args = Args::parse();
    let exit = carry_out(&args).await.unwrap_or_else(|error| {
        if args.json {
            show::line(&error.to_json());
        }
        show::note(&format!("memlanectl: {error}"));
        error.exit()
    });
    ExitCode::from(exit as u8)
}

async fn carry_out(args: &Args) -> Result<Exit, Error> {
    let client = Client::new(&args.socket);
    match &args.command {
        Command::Doctor { config } => return Ok(doctor::run(&client, config, args.json).await),
        Command::Setup(options) => return setup::run(&client, options, args.json).await,
        Command::Status => {
            let status = client.status().await?;
            if args.json {
                show::json(&status);
            } else {
                show::line(&show::status(&status, &client.peers().await?, &client.migrations().await?));
            }
        }
        Command::Ports => list(args, client.ports().await?, show::ports),
        Command::Guests => list(args, client.guests().await?, show::guests),
        Command::Launch { file, incoming } => {
            return guests::launch(&client, file, *incoming, args.json).await;
        }
        Command::Attach(which) => return guests::attach(&client, which, args.json).await,
        Command::Detach { name } => return guests::detach(&client, name, args.json).await,
        Command::Check(order) => {
            let report = client.check(&order.to_order()).await?;
            if args.json {
                show::json(&report);
            } else {
                show::line(&show::report(&report));
            }
            return Ok(if report.ok { Exit::Completed } else { Exit::Refused });
        }
        Command::Migrate { order, detach } => {
            return orders::migrate(&client, &order.to_order(), *detach, args.json).await;
        }
        Command::Watch { migration } => return orders::watch(&client, migration.as_deref(), args.json).await,
        Command::Abandon { migration } => return orders::abandon(&client, migration, args.json).await,
        Command::Resolve { guest, run_here, other_host_is_off, yes, .. } => {
            let action = if *run_here { Resolution::RunHere } else { Resolution::Discard };
            let resolve = Resolve { action, other_host_is_off: *other_host_is_off };
            return orders::resolve(&client, guest, resolve, *yes, args.json).await;
        }
        Command::Keys(command) => keys::run(command, args.json)?,
        Command::Cancel { migration } => return orders::cancel(&client, migration, args.json).await,
    }
    Ok(Exit::Completed)
}

fn list<T: Serialize>(args: &Args, items: Vec<T>, table: impl Fn(&[T]) -> String) {
    if args.json {
        show::json(&items);
    } else {
        show::line(&table(&items));
    }
}
