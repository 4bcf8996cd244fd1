//! The command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, Subcommand};
use memlane_api::client::DEFAULT_SOCKET;
use memlane_api::types::Order;
use memlane_api::units::{Rate, Span};
use memlane_protocol::compression::Mode;
use memlane_protocol::convergence::{Converge, Postcopy};
use memlane_protocol::wire::{BadLabel, Label};

use crate::help::{ATTACH, DOCTOR, EXAMPLES, GUEST_FILE, KEYS, SETUP};

/// The daemon reads this file unless it is told of another.
const CONFIGURATION: &str = "/etc/memlane/memlaned.toml";

/// The directory of the authority.
const AUTHORITY: &str = "/etc/memlane/ca";

/// Move running guests to other hosts.
///
/// Talks to memlaned on this host, over its Unix socket: be root or a member of the socket's group.
#[derive(Debug, Parser)]
#[command(name = "memlanectl", version, after_help = EXAMPLES, after_long_help = EXAMPLES)]
pub(crate) struct Args {
    /// The daemon's API socket
    #[arg(long, global = true, display_order = 100, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// Answer in JSON on stdout, one object or list a line
    #[arg(long, global = true, display_order = 101)]
    pub json: bool,
    /// The command that is carried out.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of the program.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Look at this host, and say what is missing for moving guests and what mends it
    ///
    /// Needs no daemon; one that runs is asked as well.
    #[command(after_help = DOCTOR)]
    Doctor {
        /// The daemon's configuration
        #[arg(long, value_name = "FILE", default_value = CONFIGURATION)]
        config: PathBuf,
    },
    /// Look at this host, and make a first configuration from what was found
    #[command(after_help = SETUP)]
    Setup(SetupArgs),
    /// Show the daemon, its peers and the migrations under way
    Status,
    /// Show the network ports lent to migrations
    Ports,
    /// Show the guests attached to the daemon
    Guests,
    /// Start a QEMU guest from a guest file
    ///
    /// When this returns, the guest runs, or with --incoming its QEMU waits for it to arrive from
    /// another host. The guest outlives the daemon, which finds it again after a restart.
    #[command(after_long_help = GUEST_FILE)]
    Launch {
        /// The guest file, read here and given to the daemon
        file: PathBuf,
        /// Wait for the guest to arrive from another host
        #[arg(long)]
        incoming: bool,
    },
    /// Attach a QEMU guest that another program started
    #[command(after_long_help = ATTACH)]
    Attach(AttachArgs),
    /// Detach a QEMU guest that was launched or attached
    ///
    /// The guest runs on without the daemon, and memlanectl attach attaches it again.
    /// A guest that is being moved cannot be detached.
    Detach {
        /// Name of the guest
        name: String,
    },
    /// Find out whether a guest could move, and how fast; moves nothing
    Check(OrderArgs),
    /// Move a guest to another host and watch until it has ended
    ///
    /// The first Ctrl-C asks to cancel and waits for the outcome; the second one stops waiting.
    /// In a pipe the progress is one line for each phase and round; with --json the migration's
    /// last state is printed when it has ended.
    #[command(after_help = EXAMPLES)]
    Migrate {
        /// The guest to move, and how.
        #[command(flatten)]
        order: OrderArgs,
        /// Print the migration's identity and return once it has begun
        #[arg(long)]
        detach: bool,
    },
    /// Watch a migration until it has ended; after Ctrl-C the migration goes on
    ///
    /// With --json each event is a line.
    Watch {
        /// Identity of the migration, its first digits, or name of the guest; default: the one under way
        #[arg(value_name = "ID|GUEST")]
        migration: Option<String>,
    },
    /// Give up the missing memory of a guest that runs at its destination in post-copy
    ///
    /// Use this only if the other host is gone for good; as long as it may come back, wait. At the
    /// destination the guest runs on, and every access to missing memory fails: the guest sees a
    /// memory error, or its VMM ends. At the source, whose copy is out of date, the migration ends.
    Abandon {
        /// Identity of the migration, its first digits, or name of the guest
        #[arg(value_name = "ID|GUEST")]
        migration: String,
    },
    /// Decide about a guest in doubt, if the other host will never answer
    ///
    /// A guest is in doubt while this host cannot know whether the other host runs it: memlanectl
    /// status says so, and what the migration waits for. As long as the other host may come back, wait.
    /// With --run-here the guest goes on from where it was paused. If it ran at the other host since
    /// then, that work is lost, and its disks may be ahead of its memory. With --discard its VMM here ends.
    #[command(group = clap::ArgGroup::new("action").required(true))]
    Resolve {
        /// Name of the guest, or identity of the migration or its first digits
        #[arg(value_name = "GUEST")]
        guest: String,
        /// Run the guest here
        #[arg(long, group = "action", requires = "other_host_is_off")]
        run_here: bool,
        /// Give up the copy of the guest on this host
        #[arg(long, group = "action")]
        discard: bool,
        /// I promise that the other host, or its VMM of this guest, is off and stays off
        #[arg(long)]
        other_host_is_off: bool,
        /// Do not ask for confirmation
        #[arg(long)]
        yes: bool,
    },
    /// Make and show the keys by which hosts know each other
    ///
    /// Works on files, and needs no daemon.
    #[command(subcommand, after_help = KEYS)]
    Keys(KeysCommand),
    /// Cancel a migration; the guest stays at its source
    Cancel {
        /// Identity of the migration, its first digits, or name of the guest
        #[arg(value_name = "ID|GUEST")]
        migration: String,
    },
}

/// The commands about keys.
#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a private authority, which signs the certificates of all hosts
    Init {
        /// Directory to make it in
        #[arg(long, value_name = "DIR", default_value = AUTHORITY)]
        dir: PathBuf,
        /// Name that its certificate bears
        #[arg(long, default_value = "Memlane authority")]
        name: String,
    },
    /// Make the key and the certificate of a host
    Issue {
        /// Name of the host, as `host` in its configuration and `[[peer]]` in those of others have it
        host: String,
        /// Directory of the authority
        #[arg(long, value_name = "DIR", default_value = AUTHORITY)]
        dir: PathBuf,
        /// Directory to make the files in [default: HOST, in the authority's directory]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Days from now until the certificate expires
        #[arg(long, value_name = "NUMBER", default_value_t = 365, value_parser = clap::value_parser!(u64).range(1..=36_500))]
        days: u64,
    },
    /// Show what certificates say, and until when they are valid
    Show {
        /// A file of certificates, or the directory of a host or an authority
        #[arg(default_value = "/etc/memlane/keys")]
        path: PathBuf,
    },
}

/// What a first configuration is made of.
#[derive(Debug, clap::Args)]
pub(crate) struct SetupArgs {
    /// Put the configuration in its place instead of showing it
    #[arg(long)]
    pub write: bool,
    /// Name of this host, as others are to know it [default: the machine's host name]
    #[arg(long, value_name = "NAME")]
    pub host: Option<Label>,
    /// Another host and its address, such as host-b=192.0.2.12; may be repeated
    #[arg(long = "peer", value_name = "NAME=ADDRESS")]
    pub peers: Vec<Pair>,
    /// An interface to lend to migrations, such as a=eth1; may be repeated
    #[arg(long = "port", value_name = "NAME=INTERFACE")]
    pub ports: Vec<Pair>,
    /// Where to put the configuration
    #[arg(long, value_name = "FILE", default_value = CONFIGURATION)]
    pub config: PathBuf,
}

/// Two words of the command line, joined by an equals sign.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    /// The name before the sign.
    pub name: Label,
    /// The word after it.
    pub value: String,
}

impl FromStr for Pair {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) =
            text.split_once('=').ok_or("write NAME=VALUE, such as a=eth1 or host-b=192.0.2.12")?;
        if value.is_empty() {
            return Err("nothing follows the equals sign".to_owned());
        }
        Ok(Self { name: name.parse().map_err(|error: BadLabel| error.to_string())?, value: value.to_owned() })
    }
}

/// A QEMU that another program started.
#[derive(Debug, clap::Args)]
pub(crate) struct AttachArgs {
    /// Socket of the QEMU's monitor (QMP); default: the one that memlane-qemu has made, /run/memlane-qemu/NAME.sock
    #[arg(long, value_name = "SOCK", conflicts_with = "libvirt")]
    pub qmp: Option<PathBuf>,
    /// A domain of libvirt, whose monitor is found in its XML (virsh dumpxml)
    #[arg(long, value_name = "DOMAIN")]
    pub libvirt: Option<String>,
    /// Name for the guest, here and at the hosts that it moves to; with --libvirt that of the domain is the default
    #[arg(long, required_unless_present = "libvirt")]
    pub name: Option<String>,
    /// The QEMU was started with -incoming defer and waits for the guest
    #[arg(long)]
    pub incoming: bool,
}

/// An order.
#[derive(Debug, clap::Args)]
pub(crate) struct OrderArgs {
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
    /// When rounds do not shrink: slow the guest's writes (stun), run it there while the rest is fetched
    /// (postcopy), the one and then the other (auto), or give up (none) [default: the daemon's
    /// limits.converge]
    #[arg(long, value_name = "stun|postcopy|auto|none")]
    pub converge: Option<Converge>,
    /// Slow the guest's writes by stun by at most this many percent, 0 to 99 [default: the daemon's limits.max_stun]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=99))]
    pub max_stun: Option<u8>,
    /// Run the guest there without all of its memory in any case: at once (now), or after one round
    /// (hybrid). Until the rest has come, the guest is lost if either host dies
    #[arg(long, value_name = "now|hybrid", conflicts_with = "verify")]
    pub postcopy: Option<Postcopy>,
    /// Compress pages (LZ4) while a port is too slow for them and a processor is free (auto), or never
    /// (off) [default: the daemon's limits.compression]
    #[arg(long, value_name = "auto|off")]
    pub compression: Option<Mode>,
    /// Try for so long to reach the other host again if the network is lost while the guest is copied, 0s
    /// to 10min [default: the daemon's limits.patience]
    #[arg(long, value_name = "TIME")]
    pub patience: Option<Span>,
    /// If the migration fails and the guest runs on here, try again so many times, 0 to 100
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(0..=100))]
    pub retry: Option<u32>,
}

impl OrderArgs {
    /// Returns the order in the form that the API takes.
    pub(crate) fn to_order(&self) -> Order {
        Order {
            guest: self.guest.clone(),
            host: self.host.clone(),
            downtime_limit_seconds: self.downtime_limit.map(|limit| limit.0.as_secs_f64()),
            min_bandwidth_bits_per_second: self.min_bandwidth.map(|rate| rate.0),
            verify: self.verify,
            max_rounds: self.max_rounds,
            converge: self.converge.map(Into::into),
            max_stun_percent: self.max_stun,
            postcopy: self.postcopy.map(Into::into),
            compression: self.compression.map(Into::into),
            patience_seconds: self.patience.map(|patience| patience.0.as_secs_f64()),
            retry: self.retry,
        }
    }
}

#[cfg(test)]
#[path = "../../xtask/src/documents/reader.rs"]
mod documents;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use clap::CommandFactory;
    use clap::error::ErrorKind;
    use memlane_guest::qemu::definition::Definition;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_guest_file_in_the_help_is_one() {
        let indented =
            GUEST_FILE.lines().skip(1).take_while(|line| line.is_empty() || line.starts_with("  "));
        let text: String = indented.map(|line| format!("{line}\n")).collect();
        let definition = Definition::parse("help".as_ref(), &text).unwrap();
        assert_eq!((definition.name.as_str(), definition.nics.len()), ("web1", 1));
        // What the help calls the defaults are the defaults.
        let kept =
            |line: &&str| !["prealloc", "qemu", "vhost"].iter().any(|key| line.trim().starts_with(key));
        let shorter: String = text.lines().filter(kept).map(|line| format!("{line}\n")).collect();
        let default = Definition::parse("help".as_ref(), &shorter).unwrap();
        assert_eq!(Definition { text, ..default }, definition);
    }

    #[test]
    fn the_commands_in_the_documents_are_understood() {
        let commands = documents::commands("memlanectl");
        let wrong = commands.iter().filter_map(|command| {
            let error = Args::try_parse_from(&command.words).err()?;
            let fine = match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => true,
                ErrorKind::MissingRequiredArgument => !command.whole,
                _ => false,
            };
            (!fine).then(|| format!("{}: {}\n{error}", command.place, command.words.join(" ")))
        });
        assert_eq!(wrong.collect::<Vec<_>>().join("\n"), "");
        assert!(commands.len() > 20, "{commands:?}");
    }

    #[test]
    fn the_page_about_orders_knows_all_options_and_exit_codes() {
        let page = documents::pages().into_iter().find(|page| page.name == "docs/orders.md").unwrap();
        let command = Args::command();
        let migrate = command.find_subcommand("migrate").unwrap();
        let options: BTreeSet<&str> =
            migrate.get_arguments().filter_map(|argument| argument.get_long()).collect();
        let spans = page.spans().into_iter().filter_map(|(_, span)| span.strip_prefix("--"));
        let named: BTreeSet<&str> = spans.filter_map(|span| span.split(' ').next()).collect();
        // That one is of all commands.
        assert_eq!(named.iter().copied().filter(|name| *name != "json").collect::<BTreeSet<_>>(), options);
        let numbers = |text: &str, before: &str| -> Vec<u8> {
            let lines =
                text.lines().filter_map(|line| line.strip_prefix(before)?.split(' ').next()?.parse().ok());
            lines.collect()
        };
        let (_, codes) = EXAMPLES.split_once("Exit codes:").unwrap();
        assert_eq!(numbers(&page.text, "| "), numbers(codes, "  "));
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
