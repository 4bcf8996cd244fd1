//! libvirt: what keeps the daemon from the QEMUs that it starts.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::accounts::Accounts;
use super::{Finding, Host, Owner};
use crate::child;

/// The user that Debian's libvirt runs QEMU as.
pub(crate) const QEMU_USER: &str = "libvirt-qemu";
/// The group that the daemon's unit is in, to reach monitors.
const MONITOR_GROUP: &str = "memlane-qemu";
/// Domains that are started without memlane-qemu have the daemon's monitors here.
const MONITORS: &str = "/run/memlane-libvirt";
const LOCAL_ABSTRACTION: &str = "/etc/apparmor.d/local/abstractions/libvirt-qemu";
/// The package brings this file.
const ABSTRACTION: &str = "/etc/apparmor.d/abstractions/memlane-qemu";
const PATIENCE: Duration = Duration::from_secs(10);

/// What QEMU must be allowed by AppArmor, as words that stand in a rule, for those who write the rules themselves.
const RULES: [&str; 4] =
    ["/usr/lib/memlane/libmemlane_shim.so", "/run/memlane/attach.sock", "/pagemap", "/maps"];

/// Looks at libvirt.
pub(super) fn look(host: &Host<'_>) -> Vec<Finding> {
    let version = child::run(Command::new("virsh").arg("--version"), PATIENCE);
    let version = version.ok().filter(|ended| ended.success).map(|ended| ended.stdout.trim().to_owned());
    let Some(version) = version else {
        return vec![without_virsh(Path::new("/etc/libvirt/qemu.conf").exists())];
    };
    let text = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let conf = fs::read_to_string("/etc/libvirt/qemu.conf");
    let enforced = text("/sys/module/apparmor/parameters/enabled").trim() == "Y"
        && Path::new("/etc/apparmor.d/libvirt").is_dir();
    let monitors = Owner::of(Path::new(MONITORS));
    let mut findings = vec![
        Finding::ok("libvirt", format!("virsh {version}")),
        apparmor(
            enforced,
            conf.as_deref().unwrap_or_default(),
            &text(LOCAL_ABSTRACTION),
            Path::new(ABSTRACTION).exists(),
            monitors.is_some(),
        ),
        attach_users(&host.config.attach_users, &host.accounts),
        directory(monitors, &host.accounts),
    ];
    if monitors.is_some() {
        findings.push(match conf {
            Ok(conf) => memory(&conf),
            Err(error) => {
                let found = format!("not looked at: /etc/libvirt/qemu.conf cannot be read ({error})");
                Finding::advice("libvirt-memory", found, "sudo memlanectl doctor")
            }
        });
    }
    findings
}

fn without_virsh(has_driver: bool) -> Finding {
    const CHECK: &str = "libvirt";
    match has_driver {
        true => Finding::advice(
            CHECK,
            "it is here, but no virsh, which knows its domains",
            "apt install libvirt-clients",
        ),
        false => Finding::ok(CHECK, "not installed; it is not needed"),
    }
}

/// Judges what AppArmor permits the QEMUs of libvirt: `local` is the text of the local abstraction, `is_installed`
/// whether the package's own is there, and `own_monitors` whether domains have monitors in [`MONITORS`].
fn apparmor(enforced: bool, conf: &str, local: &str, is_installed: bool, own_monitors: bool) -> Finding {
    const CHECK: &str = "libvirt-apparmor";
    if !enforced {
        return Finding::ok(CHECK, "AppArmor does not confine the QEMUs of libvirt");
    }
    if setting(conf, "security_driver").is_some_and(|driver| driver.contains("none")) {
        return Finding::ok(CHECK, "security_driver in /etc/libvirt/qemu.conf is none");
    }
    let rules: Vec<&str> = local.lines().map(str::trim).filter(|line| is_rule(line)).collect();
    let includes = rules.iter().any(|rule| {
        rule.trim_start_matches('#').starts_with("include") && rule.contains("abstractions/memlane-qemu")
    });
    let names = |what: &str| rules.iter().any(|rule| !rule.starts_with("#include") && rule.contains(what));
    if own_monitors && !names(&format!("{MONITORS}/")) {
        return Finding::missing(
            CHECK,
            format!("{LOCAL_ABSTRACTION} does not let QEMU make monitors in {MONITORS}"),
            format!(
                "echo '{MONITORS}/** rwk,' >> {LOCAL_ABSTRACTION}; guests have it from their next start on"
            ),
        );
    }
    if includes && is_installed || RULES.iter().all(|rule| names(rule)) {
        return Finding::ok(
            CHECK,
            format!("{LOCAL_ABSTRACTION} lets QEMU load the shim and reach the daemon"),
        );
    }
    let install = match is_installed {
        true => String::new(),
        false => format!("install systemd/memlane-qemu.apparmor as {ABSTRACTION} (the package does); "),
    };
    Finding::missing(
        CHECK,
        format!("{LOCAL_ABSTRACTION} does not let QEMU load the shim and reach the daemon"),
        format!(
            "{install}echo 'include if exists <abstractions/memlane-qemu>' >> {LOCAL_ABSTRACTION}; guests have it from \
             their next start on"
        ),
    )
}

/// Whether a line of a profile says something. `#include` does, and is no comment.
fn is_rule(line: &str) -> bool {
    !line.is_empty() && (!line.starts_with('#') || line.starts_with("#include"))
}

/// Finds what `/etc/libvirt/qemu.conf` sets. Of several lines about one key, libvirt takes the first.
fn setting<'a>(conf: &'a str, key: &str) -> Option<&'a str> {
    let set = |line: &'a str| Some(line.trim().strip_prefix(key)?.trim_start().strip_prefix('=')?.trim());
    conf.lines().find_map(set)
}

fn attach_users(users: &[u32], accounts: &Accounts) -> Finding {
    const CHECK: &str = "libvirt-user";
    match accounts.user(QEMU_USER) {
        None => Finding::advice(
            CHECK,
            format!(
                "there is no user {QEMU_USER}; the user in /etc/libvirt/qemu.conf must be one of attach_users"
            ),
            "add that user to attach_users in the daemon's configuration",
        ),
        Some(user) if users.contains(&user) => {
            Finding::ok(CHECK, format!("attach_users has {QEMU_USER}, as which libvirt runs QEMU"))
        }
        Some(_) => Finding::missing(
            CHECK,
            format!(
                "attach_users does not have {QEMU_USER}, as which libvirt runs QEMU: its guests are refused"
            ),
            format!("attach_users = [\"root\", \"{QEMU_USER}\"] in the daemon's configuration"),
        ),
    }
}

/// Judges the directory of the monitors of domains that are started without memlane-qemu.
fn directory(owner: Option<Owner>, accounts: &Accounts) -> Finding {
    const CHECK: &str = "libvirt-monitors";
    let make = format!(
        "echo 'd {MONITORS} 2770 {QEMU_USER} {MONITOR_GROUP} -' > /etc/tmpfiles.d/memlane-libvirt.conf && \
         systemd-tmpfiles --create memlane-libvirt.conf"
    );
    let Some(owner) = owner else {
        let found =
            format!("there is no {MONITORS}: domains are to be started by memlane-qemu, which needs none");
        return Finding::ok(CHECK, found);
    };
    let is_qemus = accounts.user(QEMU_USER) == Some(owner.user) && owner.mode & 0o700 == 0o700;
    let is_daemons = accounts.group(MONITOR_GROUP) == Some(owner.group) && owner.mode & 0o2010 == 0o2010;
    let found = format!(
        "{MONITORS} is {}:{} {:04o}",
        accounts.user_name(owner.user),
        accounts.group_name(owner.group),
        owner.mode
    );
    match (is_qemus, is_daemons) {
        (true, true) => Finding::ok(CHECK, found),
        (false, _) => Finding::missing(CHECK, format!("{found}: QEMU cannot make its monitor there"), make),
        (_, false) => {
            Finding::missing(CHECK, format!("{found}: the daemon cannot reach monitors there"), make)
        }
    }
}

/// Judges where libvirt puts the RAM of domains that are started without memlane-qemu.
fn memory(conf: &str) -> Finding {
    const CHECK: &str = "libvirt-memory";
    let place = setting(conf, "memory_backing_dir").map(|place| place.trim_matches('"'));
    match place {
        Some(place) if place.starts_with("/dev/shm") || place.starts_with("/dev/hugepages") => {
            Finding::ok(CHECK, format!("memory_backing_dir is {place}"))
        }
        place => Finding::missing(
            CHECK,
            format!("memory_backing_dir is {}: RAM of guests is on a disk", place.unwrap_or("not set")),
            "echo 'memory_backing_dir = \"/dev/shm/libvirt\"' >> /etc/libvirt/qemu.conf && systemctl restart libvirtd",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::super::accounts::tests::whole;
    use super::*;

    const WRITTEN: &str = "  /run/memlane-libvirt/** rwk,\n  /usr/lib/memlane/libmemlane_shim.so mr,\n  \
                           /run/memlane/attach.sock rw,\n  owner @{PROC}/*/pagemap r,\n  owner @{PROC}/*/maps r,\n";

    #[test]
    fn apparmor_permits_what_the_shim_needs_or_not() {
        let judge = |local, is_installed, own_monitors| apparmor(true, "", local, is_installed, own_monitors);
        for include in [
            "include if exists <abstractions/memlane-qemu>",
            "#include <abstractions/memlane-qemu>",
            "include <abstractions/memlane-qemu>",
        ] {
            assert_eq!(judge(include, true, false).status, Status::Ok, "{include}");
        }
        assert_eq!(judge(WRITTEN, false, true).status, Status::Ok);
        let commented_out = WRITTEN.replace("  /", "  # /");
        for local in ["", "# include <abstractions/memlane-qemu>", &commented_out] {
            assert_eq!(judge(local, true, false).status, Status::Missing, "{local}");
        }
        let absent = judge("#include <abstractions/memlane-qemu>", false, false);
        assert!(absent.remedy.unwrap().starts_with("install systemd/memlane-qemu.apparmor"));
        let monitors = judge("#include <abstractions/memlane-qemu>", true, true);
        assert!(
            monitors.status == Status::Missing
                && monitors.remedy.unwrap().contains("memlane-libvirt/** rwk,")
        );
        assert_eq!(apparmor(false, "", "", false, false).status, Status::Ok);
        let none = "#security_driver = \"selinux\"\nsecurity_driver = \"none\"\n";
        assert_eq!(apparmor(true, none, "", false, false).status, Status::Ok);
        assert_eq!(apparmor(true, "#security_driver = \"none\"", "", true, false).status, Status::Missing);
    }

    #[test]
    fn libvirt_is_there_or_not_needed() {
        assert_eq!(without_virsh(false).status, Status::Ok);
        assert_eq!(without_virsh(true).status, Status::Advice);
    }

    #[test]
    fn qemus_user_may_attach_or_not() {
        assert_eq!(attach_users(&[0, 64055], &whole()).status, Status::Ok);
        let refused = attach_users(&[0], &whole());
        assert!(refused.status == Status::Missing && refused.remedy.unwrap().contains("\"libvirt-qemu\"]"));
        assert_eq!(attach_users(&[0], &Accounts::default()).status, Status::Advice);
    }

    #[test]
    fn the_directory_of_monitors_is_for_both_sides_or_not() {
        let judge = |user, group, mode| directory(Some(Owner { user, group, mode }), &whole());
        assert_eq!(judge(64055, 992, 0o2770).status, Status::Ok);
        assert!(judge(0, 992, 0o2770).found.contains("QEMU cannot make"));
        assert!(judge(64055, 105, 0o2770).found.contains("the daemon cannot reach"));
        // The sockets in it would be of QEMU's own group.
        assert_eq!(judge(64055, 992, 0o770).status, Status::Missing);
        assert_eq!(directory(None, &whole()).status, Status::Ok);
    }

    #[test]
    fn ram_is_in_memory_or_not() {
        assert_eq!(memory("memory_backing_dir = \"/dev/shm/libvirt\"\n").status, Status::Ok);
        assert_eq!(memory("#memory_backing_dir = \"/dev/shm/libvirt\"\n").status, Status::Missing);
        assert_eq!(memory("memory_backing_dir=\"/var/lib/libvirt/qemu/ram\"").status, Status::Missing);
    }
}
