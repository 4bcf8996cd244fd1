//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use memlane_api::client::DEFAULT_SOCKET;
use memlane_api::types::Order;
use memlane_api::units::{Rate, Span};
use memlane_protocol::compression::Mode;
use memlane_protocol::convergence::{Converge, Postcopy};

const EXAMPLES: &str = "\
Examples:
  memlanectl guests                              which guests are attached here
  memlanectl check web1 host-b                   would it move, and how fast? (moves nothing)
  memlanectl migrate web1 host-b                 move it and watch
  memlanectl migrate web1 host-b --downtime-limit 50ms --verify
  memlanectl migrate web1 host-b --converge auto  a guest that writes faster than the ports carry
  memlanectl --json migrate web1 host-b | jq .downtime_seconds
  memlanectl watch                               watch what is under way
  memlanectl cancel web1                         the guest stays where it runs
  memlanectl abandon web1                        it runs here in post-copy, and the other host is gone for good
  memlanectl resolve web1 --run-here --other-host-is-off   it is in doubt, and the other host is off and stays off
  memlanectl launch web1.toml                    start a QEMU guest; launch --help shows such a file
  memlanectl attach --name web1                  a QEMU that others started, by memlane-qemu
  memlanectl attach --qmp /run/web1.qmp --name web1

Exit codes:
  0  done; for migrate and watch: the guest runs at the destination
  1  another error
  2  the command line or a value in it is wrong
  3  refused: nothing was begun, or it is too late (cancel)
  4  failed: the guest runs on at its source
  5  cancelled: the guest runs on at its source
  6  no daemon answers, or it went away
  7  lost: the guest was handed over, and its VMM ended, or the rest of its memory will never come
  8  forbidden: you may not do this here, or not use the daemon at all
  9  powered off: the guest shut itself down meanwhile, and runs nowhere";

const GUEST_FILE: &str = r#"A guest file:
  name = "web1"
  memory = "2GiB"
  prealloc = false                          # true takes all RAM from the host at the start
  qemu = "/usr/bin/qemu-system-x86_64"      # one that guests.qemu of the daemon's configuration allows
  user = 2100000012                         # as whom QEMU runs, one of guests.users: its disks are to be his
  arguments = ["-machine", "q35", "-accel", "kvm", "-smp", "2", "-drive", "file=/srv/web1,if=virtio"]

  [[nic]]                                   # up to 16, or none
  mac = "52:54:00:4d:4c:01"
  tap = "tap-web1"
  network = "lan"                           # a [[network]] of the daemon's configuration
  vhost = false                             # true lets vhost-net carry its packets

prealloc, qemu and vhost may be left out where they are as above; without user the daemon chooses
one that is free. The daemon adds the name, RAM, monitor, sandbox and NICs, so -m, -name, -mem-path,
-machine memory-backend=, -incoming, -daemonize, -runas and -S are refused among the arguments. Paths are paths on the daemon's host. The tap must exist, belong
to the daemon's user and be joined to its bridge:
  ip tuntap add tap-web1 mode tap user memlane
  ip link set tap-web1 master br0 up

A host that the guest moves to starts its QEMU from the same file if may_start_guests of this
host is set in its configuration; otherwise give it the file: memlanectl launch web1.toml --incoming"#;

const ATTACH: &str = "\
The QEMU must have been started by memlane-qemu, or with
  all its RAM in files: -object memory-backend-file,id=ram0,share=on,size=2G,mem-path=/dev/shm
                        -machine memory-backend=ram0
  a QMP socket that no other program is connected to: -qmp unix:/run/web1.qmp,server=on,wait=off
  and, in its environment: LD_PRELOAD=/usr/lib/memlane/libmemlane_shim.so
                           MEMLANE_ATTACH_SOCKET=/run/memlane/attach.sock
by a user that attach_users in the daemon's configuration names. If something is missing,
the answer says what. A QEMU that waits (--incoming) needs the arguments of the QEMU that the guest
comes from, ids included.";

/// The directory of the authority.
const AUTHORITY: &str = "/etc/memlane/ca";

const KEYS: &str = "\
Examples:
  memlanectl keys init                   once, on a machine that only administrators use
  memlanectl keys issue host-a           for each host; then put the files into /etc/memlane/keys there
  memlanectl keys show                   what this host has, and until when it is valid";

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
    Attach {
        /// Socket of the QEMU's monitor (QMP); default: the one that memlane-qemu has made, /run/memlane-qemu/NAME.sock
        #[arg(long, value_name = "SOCK")]
        qmp: Option<PathBuf>,
        /// Name for the guest, here and at the hosts that it moves to
        #[arg(long)]
        name: String,
        /// The QEMU was started with -incoming defer and waits for the guest
        #[arg(long)]
        incoming: bool,
    },
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
