//! Users, units and the daemon itself.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use memlane_api::client::{Client, ClientError};
use memlane_api::types::Status as DaemonStatus;
use tokio::time::timeout;

use super::accounts::{Accounts, DAEMON};
use super::{Finding, Host};
use crate::child;

const SERVICE: &str = "memlaned.service";
const SOCKET: &str = "memlane-guest.socket";
/// systemd may take this long to answer, and so may the daemon.
const PATIENCE: Duration = Duration::from_secs(5);

/// What systemd says of Memlane's units.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Systemd {
    service: Unit,
    socket: Unit,
    /// How much memory the daemon may lock, in bytes; `u64::MAX` is no limit.
    pub(super) memlock: Option<u64>,
    /// The groups that the daemon is in besides those of its user.
    pub(super) groups: Vec<String>,
    /// Whether systemd hands the host's keys to the daemon.
    pub(super) hands_over_keys: bool,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Unit {
    is_installed: bool,
    is_active: bool,
    is_enabled: bool,
}

impl Systemd {
    /// Asks systemd. Returns `None` where it does not run.
    pub(super) fn read() -> Option<Self> {
        if !Path::new("/run/systemd/system").is_dir() {
            return None;
        }
        let ask = |arguments: &[&str]| {
            let ended = child::run(Command::new("systemctl").args(arguments), PATIENCE);
            ended.map_or_else(|_| String::new(), |ended| ended.stdout)
        };
        let show = |unit| {
            ask(&[
                "show",
                "--property=LoadState,ActiveState,UnitFileState,LimitMEMLOCK,SupplementaryGroups",
                unit,
            ])
        };
        Some(Self::of(&show(SERVICE), &show(SOCKET), &ask(&["cat", SERVICE])))
    }

    /// Understands what `systemctl show` prints of the two units, and `systemctl cat` of the daemon's. systemd 252 does
    /// not show credentials.
    fn of(service: &str, socket: &str, files: &str) -> Self {
        let memlock = match value(service, "LimitMEMLOCK") {
            "infinity" => Some(u64::MAX),
            number => number.parse().ok(),
        };
        let service_unit = Unit::of(service);
        Self {
            // For a unit that is not there, systemd shows its own defaults.
            memlock: memlock.filter(|_| service_unit.is_installed),
            service: service_unit,
            socket: Unit::of(socket),
            groups: value(service, "SupplementaryGroups").split_whitespace().map(str::to_owned).collect(),
            hands_over_keys: files
                .lines()
                .any(|line| line.starts_with("LoadCredential") && line.contains("=host.key:")),
        }
    }
}

impl Unit {
    fn of(shown: &str) -> Self {
        Self {
            is_installed: value(shown, "LoadState") == "loaded",
            is_active: value(shown, "ActiveState") == "active",
            is_enabled: value(shown, "UnitFileState").starts_with("enabled"),
        }
    }
}

fn value<'a>(shown: &'a str, property: &str) -> &'a str {
    let found = shown.lines().find_map(|line| line.strip_prefix(property)?.strip_prefix('='));
    found.unwrap_or_default()
}

/// Looks at users and units, and asks the daemon.
pub(super) async fn look(host: &Host<'_>, client: &Client) -> Vec<Finding> {
    let mut findings = vec![users(&host.accounts, &host.daemon_groups(), host.systemd.is_some())];
    let starts_guests = !host.config.guests.qemu.is_empty();
    findings.extend(units(host.systemd.as_ref(), starts_guests));
    let answer = timeout(PATIENCE, client.status()).await;
    let answer = answer.unwrap_or_else(|_| Err(ClientError::Silent { socket: client.socket().to_owned() }));
    findings.push(daemon(answer, host));
    findings.push(clock(&synchronized()));
    findings
}

/// Judges the users. Without systemd nobody knows which groups the daemon is started in.
fn users(accounts: &Accounts, daemon_groups: &[u32], has_systemd: bool) -> Finding {
    const CHECK: &str = "users";
    const MONITORS: &str = "memlane-qemu";
    let mend = "systemd-sysusers; the package brings /usr/lib/sysusers.d/memlane.conf";
    if accounts.user(DAEMON).is_none() {
        return Finding::missing(CHECK, format!("there is no user {DAEMON}, as which the daemon runs"), mend);
    }
    let absent: Vec<&str> = [DAEMON, MONITORS, "memlane-viewers"]
        .into_iter()
        .filter(|name| accounts.group(name).is_none())
        .collect();
    if !absent.is_empty() {
        return Finding::missing(CHECK, format!("these groups are not there: {}", absent.join(", ")), mend);
    }
    if accounts.group(MONITORS).is_some_and(|group| daemon_groups.contains(&group)) {
        return Finding::ok(
            CHECK,
            format!("user {DAEMON}, which is in {MONITORS}; groups {DAEMON} and memlane-viewers"),
        );
    }
    let join = format!("usermod -aG {MONITORS} {DAEMON}, and start memlaned again");
    match has_systemd {
        true => Finding::missing(
            CHECK,
            format!("the daemon is not in the group {MONITORS}, and cannot reach monitors of that group"),
            join,
        ),
        false => Finding::advice(
            CHECK,
            format!(
                "the user {DAEMON} is not in {MONITORS}: the daemon reaches monitors if it is started with that group"
            ),
            join,
        ),
    }
}

/// Judges the units. The socket is there to start QEMUs.
fn units(systemd: Option<&Systemd>, starts_guests: bool) -> Vec<Finding> {
    let Some(systemd) = systemd else {
        let remedy = "start memlaned yourself, as root or with memlane-starter's help: docs/operating.md";
        return vec![Finding::advice("unit", "systemd does not run here", remedy)];
    };
    let mut findings = vec![unit("unit", SERVICE, &systemd.service)];
    if starts_guests {
        findings.push(unit("guest-socket", SOCKET, &systemd.socket));
    }
    findings
}

fn unit(check: &'static str, name: &str, unit: &Unit) -> Finding {
    let enable = format!("systemctl enable --now {name}");
    match (unit.is_installed, unit.is_active, unit.is_enabled) {
        (false, ..) => {
            let remedy = "install the package memlane, and systemctl daemon-reload";
            Finding::missing(check, format!("systemd knows no {name}"), remedy)
        }
        (_, false, _) => Finding::missing(
            check,
            format!("{name} is not active"),
            format!("{enable}; if it fails: journalctl -u {name}"),
        ),
        (_, _, false) => Finding::advice(
            check,
            format!("{name} is active, and will not be after the host has restarted"),
            enable,
        ),
        _ => Finding::ok(check, format!("{name} is active")),
    }
}

/// Judges what the daemon answers.
fn daemon(answer: Result<DaemonStatus, ClientError>, host: &Host<'_>) -> Finding {
    const CHECK: &str = "daemon";
    let own = env!("CARGO_PKG_VERSION");
    match answer {
        Ok(status) if status.version != own => Finding::advice(
            CHECK,
            format!("memlaned {} runs, and this is memlanectl {own}", status.version),
            "systemctl restart memlaned, when nothing moves",
        ),
        Ok(status) if status.host != host.config.host.as_str() => Finding::advice(
            CHECK,
            format!(
                "memlaned runs as {}, and {} says {}",
                status.host,
                host.file.display(),
                host.config.host
            ),
            "systemctl restart memlaned, when nothing moves; or name its configuration by --config",
        ),
        Ok(status) => Finding::ok(CHECK, format!("memlaned {} runs as {}", status.version, status.host)),
        Err(error @ (ClientError::Denied { .. } | ClientError::Api(_))) => {
            Finding::advice(CHECK, error.to_string(), "sudo memlanectl doctor")
        }
        Err(error) => {
            Finding::missing(CHECK, error.to_string(), "systemctl enable --now memlane-guest.socket memlaned")
        }
    }
}

/// Asks systemd whether the clock is held to that of others.
fn synchronized() -> String {
    let show = ["show", "--property=NTPSynchronized"];
    child::run(Command::new("timedatectl").args(show), PATIENCE)
        .map_or_else(|_| String::new(), |ended| ended.stdout)
}

fn clock(shown: &str) -> Finding {
    const CHECK: &str = "clock";
    const MEND: &str = "apt install systemd-timesyncd && timedatectl set-ntp true";
    match value(shown, "NTPSynchronized") {
        "yes" => Finding::ok(CHECK, "the clock is synchronized"),
        "no" => Finding::advice(
            CHECK,
            "the clock is not synchronized: certificates and logs of hosts need one time",
            MEND,
        ),
        _ => Finding::advice(CHECK, "timedatectl does not say whether the clock is synchronized", MEND),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::super::Status;
    use super::super::accounts::tests::whole;
    use super::*;
    use memlaned::config::Config;

    const SHOWN: &str = "LimitMEMLOCK=infinity\nSupplementaryGroups=memlane-qemu\nLoadState=loaded\n\
                         ActiveState=active\nUnitFileState=enabled\n";

    #[test]
    fn what_systemctl_shows_is_understood() {
        let systemd = Systemd::of(SHOWN, SHOWN, "# LoadCredential=host.key:/x");
        let up = Unit { is_installed: true, is_active: true, is_enabled: true };
        assert_eq!((&systemd.service, &systemd.socket), (&up, &up));
        assert_eq!(
            (systemd.memlock, systemd.groups.as_slice()),
            (Some(u64::MAX), &["memlane-qemu".to_owned()][..])
        );
        assert!(!systemd.hands_over_keys);
        let files = "[Service]\nLoadCredential=host.pem:/etc/memlane/keys/host.pem\n\
                     LoadCredential=host.key:/etc/memlane/keys/host.key\n";
        let other = Systemd::of("LimitMEMLOCK=8388608\nLoadState=loaded", "", files);
        assert!(other.hands_over_keys && other.memlock == Some(8 << 20) && !other.socket.is_installed);
        assert_eq!(Systemd::of("LimitMEMLOCK=8388608\nLoadState=not-found", "", "").memlock, None);
    }

    #[test]
    fn units_are_active_or_not() {
        let whole = Systemd::of(SHOWN, SHOWN, "# LoadCredential=host.key:/x");
        assert!(units(Some(&whole), true).iter().all(|finding| finding.status == Status::Ok));
        assert_eq!(units(Some(&whole), false).len(), 1);
        let statuses = |shown: &str| units(Some(&Systemd::of(shown, shown, "")), true)[0].clone();
        let stopped = statuses("LoadState=loaded\nActiveState=inactive\nUnitFileState=enabled");
        assert!(stopped.status == Status::Missing && stopped.remedy.unwrap().contains("enable --now"));
        assert_eq!(
            statuses("LoadState=loaded\nActiveState=active\nUnitFileState=disabled").status,
            Status::Advice
        );
        assert!(statuses("LoadState=not-found").remedy.unwrap().contains("install the package"));
        assert_eq!(units(None, true)[0].status, Status::Advice);
    }

    #[test]
    fn users_are_there_or_not() {
        let judge = |accounts: &Accounts, groups: &[u32]| users(accounts, groups, true);
        assert_eq!(judge(&whole(), &[991, 992]).status, Status::Ok);
        assert!(judge(&whole(), &[991]).remedy.unwrap().contains("usermod -aG memlane-qemu memlane"));
        assert_eq!(users(&whole(), &[991], false).status, Status::Advice);
        assert!(judge(&Accounts::default(), &[]).found.contains("no user memlane"));
        let no_groups = Accounts::of("memlane:x:990:991::/:", "memlane:x:991:");
        let judged = judge(&no_groups, &[991]);
        assert!(judged.status == Status::Missing && judged.found.contains("memlane-qemu, memlane-viewers"));
    }

    #[test]
    fn the_daemon_answers_or_not() {
        let config = Config::parse("test".as_ref(), "host = \"host-a\"").unwrap();
        let host = Host {
            config: &config,
            file: "test".as_ref(),
            accounts: whole(),
            systemd: None,
            interfaces: Ok(Vec::new()),
        };
        let answer = |version: &str, name: &str| {
            Ok(DaemonStatus { version: version.into(), host: name.into(), ..DaemonStatus::default() })
        };
        let own = env!("CARGO_PKG_VERSION");
        assert_eq!(daemon(answer(own, "host-a"), &host).status, Status::Ok);
        assert_eq!(daemon(answer("0.0.9", "host-a"), &host).status, Status::Advice);
        assert_eq!(daemon(answer(own, "host-b"), &host).status, Status::Advice);
        let (socket, denied) = ("/s".into(), io::Error::from(io::ErrorKind::PermissionDenied));
        assert_eq!(daemon(Err(ClientError::Denied { socket, error: denied }), &host).status, Status::Advice);
        let (socket, error) = ("/s".into(), io::Error::from(io::ErrorKind::NotFound));
        assert_eq!(daemon(Err(ClientError::NotRunning { socket, error }), &host).status, Status::Missing);
    }

    #[test]
    fn the_clock_is_held_or_not() {
        assert_eq!(clock("NTPSynchronized=yes\n").status, Status::Ok);
        assert_eq!(clock("NTPSynchronized=no\n").status, Status::Advice);
        assert_eq!(clock("").status, Status::Advice);
    }
}
