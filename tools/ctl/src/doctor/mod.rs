//! `memlanectl doctor`: looks at this host, and says what is missing for moving guests, and what mends it.
//!
//! Each subject has a file of its own. A reader there collects what the system says, and functions that touch nothing
//! judge it. No daemon is needed; one that runs is asked as well.

mod accounts;
mod disk;
mod kernel;
mod keys;
pub(crate) mod libvirt;
mod memory;
mod network;
mod qemu;
mod units;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use memlane_api::client::Client;
use memlaned::config::{Config, ConfigError};
use serde::Serialize;

use crate::exit::Exit;
use crate::interfaces::{self, Interface};
use crate::show;
use accounts::{Accounts, DAEMON};
use units::Systemd;

/// What one check found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Finding {
    /// The name of the check, which programs may rely on.
    pub(crate) check: &'static str,
    /// How it is.
    pub(crate) status: Status,
    /// What was looked at, and what was found.
    pub(crate) found: String,
    /// The command that mends it, or what else to do.
    pub(crate) remedy: Option<String>,
}

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    /// It is as it should be.
    Ok,
    /// Guests move as it is, and it could be better.
    Advice,
    /// Guests, or those of one kind, cannot move.
    Missing,
}

/// All that was found, for programs.
#[derive(Serialize)]
struct Report<'a> {
    findings: &'a [Finding],
}

/// What several checks look at.
struct Host<'a> {
    /// The configuration, or the defaults where there is none that can be used.
    config: &'a Config,
    /// The file that it is in.
    file: &'a Path,
    accounts: Accounts,
    systemd: Option<Systemd>,
    interfaces: Result<Vec<Interface>, String>,
}

/// The owner and the mode of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    user: u32,
    group: u32,
    mode: u32,
}

/// Looks at this host and says what was found.
pub(crate) async fn run(client: &Client, file: &Path, as_json: bool) -> Exit {
    let loaded = Config::load(file);
    let configuration = configuration(file, loaded.as_ref().map(|_| ()));
    let config = loaded.unwrap_or_else(|_| defaults());
    let mut findings = vec![configuration];
    findings.extend(examine(client, &config, file).await);
    match as_json {
        true => show::json(&Report { findings: &findings }),
        false => show::line(&text(&findings, Shown::All)),
    }
    exit_of(&findings)
}

/// Looks at this host, for a daemon with this configuration.
pub(crate) async fn examine(client: &Client, config: &Config, file: &Path) -> Vec<Finding> {
    let host = Host {
        config,
        file,
        accounts: Accounts::read(),
        systemd: Systemd::read(),
        interfaces: interfaces::read(),
    };
    let mut findings = kernel::look(&host);
    findings.extend(network::look(&host));
    findings.extend(keys::look(&host));
    findings.extend(qemu::look(&host));
    findings.extend(libvirt::look(&host));
    findings.extend(memory::look(&host));
    findings.extend(disk::look(&host));
    findings.extend(units::look(&host, client).await);
    findings
}

/// Returns the configuration of a daemon that is told nothing.
pub(crate) fn defaults() -> Config {
    let parse = |text: &str| Config::parse(Path::new("defaults"), text);
    parse("")
        .or_else(|_| parse("host = \"unnamed\""))
        .expect("a configuration that names only the host is one")
}

/// Which findings are shown to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    /// All of them.
    All,
    /// Those that ask for something to be done.
    Unfinished,
}

/// Lays findings out for people.
pub(crate) fn text(findings: &[Finding], shown: Shown) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in findings.iter().filter(|finding| shown == Shown::All || finding.status != Status::Ok) {
        let Finding { check, status, found, remedy } = finding;
        let mark = match status {
            Status::Ok => "ok     ",
            Status::Advice => "advice ",
            Status::Missing => "MISSING",
        };
        text.push_str(&format!("  {mark}  {check:<width$}  {found}\n"));
        if let Some(remedy) = remedy {
            text.push_str(&format!("  {:7}  {:width$}  → {remedy}\n", "", ""));
        }
    }
    let count = |status| findings.iter().filter(|finding| finding.status == status).count();
    let (missing, advice, fine) = (count(Status::Missing), count(Status::Advice), count(Status::Ok));
    text.push_str(&format!("{fine} ok, {advice} advice, {missing} missing"));
    text
}

impl Host<'_> {
    /// The groups that the daemon is in: those of its user, and those that its unit adds.
    fn daemon_groups(&self) -> Vec<u32> {
        let of_unit = self.systemd.iter().flat_map(|systemd| &systemd.groups);
        let of_unit = of_unit.filter_map(|group| self.accounts.group(group));
        self.accounts.groups_of(DAEMON).into_iter().chain(of_unit).collect()
    }
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, status: Status::Ok, found: found.into(), remedy: None }
    }

    fn advice(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, status: Status::Advice, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn missing(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, status: Status::Missing, found: found.into(), remedy: Some(remedy.into()) }
    }
}

impl Owner {
    fn of(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        Some(Self { user: found.uid(), group: found.gid(), mode: found.mode() & 0o7777 })
    }

    /// Whether a process of this user, in these groups, may read and write the file.
    fn lets_in(self, user: Option<u32>, groups: &[u32]) -> bool {
        let bits = match () {
            () if user == Some(self.user) => self.mode >> 6,
            () if groups.contains(&self.group) => self.mode >> 3,
            () => self.mode,
        };
        bits & 0o6 == 0o6
    }
}

fn configuration(file: &Path, loaded: Result<(), &ConfigError>) -> Finding {
    const CHECK: &str = "configuration";
    let name = file.display();
    match loaded {
        Ok(()) => Finding::ok(CHECK, format!("{name} can be used")),
        Err(ConfigError::Read { error, .. }) if error.kind() == std::io::ErrorKind::NotFound => {
            let remedy = "memlanectl setup shows a first one, and memlanectl setup --write puts it there";
            Finding::missing(CHECK, format!("there is no {name}; what follows looks at the defaults"), remedy)
        }
        Err(error @ ConfigError::Read { error: why, .. })
            if why.kind() == std::io::ErrorKind::PermissionDenied =>
        {
            Finding::advice(
                CHECK,
                format!("{error}; what follows looks at the defaults"),
                "sudo memlanectl doctor",
            )
        }
        Err(error) => {
            let remedy = format!("mend it, and check it by memlaned --check-config --config {name}");
            Finding::missing(CHECK, format!("{error}; what follows looks at the defaults"), remedy)
        }
    }
}

fn exit_of(findings: &[Finding]) -> Exit {
    match findings.iter().any(|finding| finding.status == Status::Missing) {
        true => Exit::Incomplete,
        false => Exit::Completed,
    }
}

/// Finds the directory itself, or the nearest one above it that is there.
fn nearest(directory: &Path) -> PathBuf {
    let there = directory.ancestors().find(|ancestor| ancestor.is_dir());
    there.unwrap_or(Path::new("/")).to_owned()
}

/// Whether this process is root, who may look everywhere.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_see_one_line_for_each_finding_and_one_for_its_remedy() {
        let findings = [
            Finding::ok("kernel", "Linux 6.18"),
            Finding::advice("mtu", "they differ", "ip link set eth1 mtu 9000"),
            Finding::missing("userfaultfd", "root's alone", "udevadm trigger"),
        ];
        let lines = [
            "  ok       kernel       Linux 6.18",
            "  advice   mtu          they differ",
            "                        → ip link set eth1 mtu 9000",
            "  MISSING  userfaultfd  root's alone",
            "                        → udevadm trigger",
            "1 ok, 1 advice, 1 missing",
        ];
        assert_eq!(text(&findings, Shown::All), lines.join("\n"));
        let unfinished = text(&findings, Shown::Unfinished);
        assert!(
            !unfinished.contains("kernel") && unfinished.contains("mtu") && unfinished.contains("1 ok"),
            "{unfinished}"
        );
        assert_eq!(exit_of(&findings), Exit::Incomplete);
        assert_eq!(exit_of(&findings[..2]), Exit::Completed);
    }

    #[test]
    fn programs_see_stable_words() {
        let findings = [Finding::ok("kernel", "new"), Finding::missing("kvm", "none", "modprobe kvm")];
        let json = serde_json::to_value(Report { findings: &findings }).unwrap();
        let expected = serde_json::json!({"findings": [
            {"check": "kernel", "status": "ok", "found": "new", "remedy": null},
            {"check": "kvm", "status": "missing", "found": "none", "remedy": "modprobe kvm"},
        ]});
        assert_eq!(json, expected);
        assert_eq!(serde_json::to_value(Status::Advice).unwrap(), "advice");
    }

    #[test]
    fn a_configuration_is_there_or_what_is_wrong_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("memlaned.toml");
        let judged = || {
            let loaded = Config::load(&file);
            configuration(&file, loaded.as_ref().map(|_| ()))
        };
        let absent = judged();
        assert_eq!(absent.status, Status::Missing);
        assert!(absent.remedy.unwrap().contains("memlanectl setup --write"));
        fs::write(&file, "host = 7").unwrap();
        let wrong = judged();
        assert!(wrong.status == Status::Missing && wrong.found.contains(":1: host = 7"), "{wrong:?}");
        fs::write(&file, "host = \"host-a\"").unwrap();
        assert_eq!(judged().status, Status::Ok);
        assert!(defaults().ports.is_empty());
    }

    #[test]
    fn who_may_open_a_file_is_who_its_mode_lets_in() {
        let owner = Owner { user: 1, group: 2, mode: 0o660 };
        assert!(owner.lets_in(Some(1), &[]) && owner.lets_in(Some(7), &[2]));
        assert!(!owner.lets_in(Some(7), &[3]) && !owner.lets_in(None, &[]));
        assert!(Owner { mode: 0o666, ..owner }.lets_in(None, &[]));
        // The kernel looks at the first class that fits, and no further.
        assert!(!Owner { mode: 0o606, ..owner }.lets_in(Some(7), &[2]));
    }
}
