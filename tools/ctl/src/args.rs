//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use memlaned::api::client::DEFAULT_SOCKET;
use memlaned::api::types::Order;
use memlaned::config::{Rate, Span};

const EXAMPLES: &str = "\
Examples:
  memlanectl guests                              which guests are attached here
  memlanectl check web1 host-b                   would it move, and how fast? (moves nothing)
  memlanectl migrate web1 host-b                 move it and watch
  memlanectl migrate web1 host-b --downtime-limit 50ms --verify
  memlanectl --json migrate web1 host-b | jq .downtime_seconds
  memlanectl watch                               watch what is under way
  memlanectl cancel web1                         the guest stays where it runs

Exit codes:
  0  done; of migrate and watch: the guest runs at the destination
  1  another error
  2  the command line or a value in it is wrong
  3  refused: nothing was begun (check and migrate), or too late (cancel)
  4  failed: the guest runs on at its source
  5  cancelled: the guest runs on at its source
  6  no daemon answers, or it went away";

/// Move running guests to other hosts.
///
/// Talks to memlaned on this host, over its Unix socket: be root or a member of the socket's group.
#[derive(Debug, Parser)]
#[command(name = "memlanectl", version, after_help = EXAMPLES, after_long_help = EXAMPLES)]
pub struct Args {
    /// The daemon's API socket
    #[arg(long, global = true, display_order = 100, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// Answer in JSON on stdout, one object or list a line
    #[arg(long, global = true, display_order = 101)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the daemon, its peers and the migrations under way
    Status,
    /// Show the network ports lent to migrations
    Ports,
    /// Show the guests attached to the daemon
    Guests,
    /// Find out whether a guest could move, and how fast; moves nothing
    Check(OrderArgs),
    /// Move a guest to another host and watch until it has ended
    ///
    /// The first Ctrl-C asks to cancel and waits for the outcome; the second one leaves.
    /// In a pipe the progress is one line for each phase and round; with --json the migration's
    /// last state is printed when it has ended.
    #[command(after_help = EXAMPLES)]
    Migrate {
        /// What to move, and how.
        #[command(flatten)]
        order: OrderArgs,
        /// Print the migration's identity and return once it has begun
        #[arg(long)]
        detach: bool,
    },
    /// Watch a migration until it has ended; Ctrl-C leaves, and it goes on
    ///
    /// With --json each event is a line.
    Watch {
        /// Identity of the migration, its first digits, or name of the guest; default: the one under way
        #[arg(value_name = "ID|GUEST")]
        migration: Option<String>,
    },
    /// Cancel a migration; the guest stays at its source
    Cancel {
        /// Identity of the migration, its first digits, or name of the guest
        #[arg(value_name = "ID|GUEST")]
        migration: String,
    },
}

/// An order.
#[derive(Debug, clap::Args)]
pub struct OrderArgs {
    /// Name of the guest
    pub guest: String,
    /// Name of the destination, a peer in the daemon's configuration
    pub host: String,
    /// Longest pause that the guest may see, such as 300ms [default: the daemon's limits.downtime]
    #[arg(long, value_name = "TIME")]
    pub downtime_limit: Option<Span>,
    /// Refuse where the ports deliver less, such as 250mbit [default: the daemon's limits.min_bandwidth]
    #[arg(long, value_name = "RATE")]
    pub min_bandwidth: Option<Rate>,
    /// Rounds of pre-copy before the order fails [default: the daemon's limits.max_rounds]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub max_rounds: Option<u32>,
    /// Compare digests of all RAM at both ends before the guest is handed over (it pauses longer)
    #[arg(long)]
    pub verify: bool,
}

impl OrderArgs {
    /// As the API has it.
    pub fn to_order(&self) -> Order {
        Order {
            guest: self.guest.clone(),
            host: self.host.clone(),
            downtime_limit_seconds: self.downtime_limit.map(|limit| limit.0.as_secs_f64()),
            min_bandwidth_bits_per_second: self.min_bandwidth.map(|rate| rate.0),
            verify: self.verify,
            max_rounds: self.max_rounds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn quantities_are_read_with_their_units() {
        let line =
            "memlanectl migrate web1 host-b --downtime-limit 1.5s --min-bandwidth 1gbit --max-rounds 9";
        let Command::Migrate { order, detach: false } = Args::parse_from(line.split(' ')).command else {
            panic!("{line}")
        };
        let order = order.to_order();
        assert_eq!(order.downtime_limit_seconds, Some(1.5));
        assert_eq!(order.min_bandwidth_bits_per_second, Some(1_000_000_000));
        assert_eq!((order.max_rounds, order.verify), (Some(9), false));
        let error = Args::try_parse_from(["memlanectl", "check", "a", "b", "--downtime-limit", "300"]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("\"300\" is no length of time") && error.contains("300ms"), "{error}");
    }
}
