//! The kernel: its version, its devices, and what it permits.

use std::fs;
use std::path::Path;

use io_uring::{IoUring, Probe, opcode};
use memlane_kvm::dirty::pagemap::try_scan;
use memlane_kvm::userfault::{Userfault, UserfaultError, WRITE_PROTECT_ASYNC};
use rustix::process::{Resource, getrlimit};

use super::accounts::{Accounts, DAEMON};
use super::{Finding, Host, Owner};

/// `PAGEMAP_SCAN` and asynchronous write protection came with this version.
const OLDEST: (u32, u32) = (6, 7);
const KVM: &str = "/dev/kvm";
const USERFAULTFD: &str = "/dev/userfaultfd";

/// Looks at the kernel.
pub(super) fn look(host: &Host<'_>) -> Vec<Finding> {
    let uname = rustix::system::uname();
    let text = |file: &str| fs::read_to_string(file).ok();
    let daemon_groups = host.daemon_groups();
    vec![
        version(&uname.release().to_string_lossy(), &uname.machine().to_string_lossy()),
        kvm(
            Owner::of(Path::new(KVM)),
            &text("/proc/cpuinfo").unwrap_or_default(),
            &host.config.guests.groups,
            &host.accounts,
        ),
        userfaultfd(Owner::of(Path::new(USERFAULTFD)), &host.accounts, &daemon_groups),
        write_protection(Userfault::open(WRITE_PROTECT_ASYNC).err().as_ref()),
        pagemap_scan(try_scan().err().map(|error| error.to_string())),
        io_uring(
            text("/proc/sys/kernel/io_uring_disabled").as_deref(),
            text("/proc/sys/kernel/io_uring_group").as_deref(),
            &daemon_groups,
            has_zero_copy(),
        ),
        memlock(
            host.systemd.as_ref().and_then(|systemd| systemd.memlock),
            getrlimit(Resource::Memlock).current,
        ),
    ]
}

fn version(release: &str, machine: &str) -> Finding {
    const CHECK: &str = "kernel";
    let found = format!("Linux {release}, {machine}");
    if machine != "x86_64" {
        return Finding::missing(CHECK, found, "Memlane needs a host with x86-64 processors");
    }
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= OLDEST {
        return Finding::ok(CHECK, found);
    }
    let remedy = "install Linux 6.7 or newer; on Debian 12 with backports: apt install -t bookworm-backports \
                  linux-image-amd64";
    Finding::missing(CHECK, found, remedy)
}

/// Judges who may open `/dev/kvm`: QEMUs that the daemon starts are in `guest_groups`.
fn kvm(device: Option<Owner>, cpuinfo: &str, guest_groups: &[u32], accounts: &Accounts) -> Finding {
    const CHECK: &str = "kvm";
    let Some(owner) = device else {
        let can = |flag: &str| cpuinfo.split_whitespace().any(|word| word == flag);
        let remedy = match (can("vmx"), can("svm")) {
            (true, _) => "modprobe kvm_intel",
            (_, true) => "modprobe kvm_amd",
            _ => {
                "switch virtualization on in the firmware, or nested virtualization in the hypervisor below this host"
            }
        };
        return Finding::missing(CHECK, format!("there is no {KVM}"), remedy);
    };
    let found = format!("{KVM} is {}", described(owner, accounts));
    if owner.lets_in(None, guest_groups) {
        return Finding::ok(CHECK, format!("{found}: QEMUs that the daemon starts may open it"));
    }
    let remedy = match accounts.group("kvm") {
        None => "groupadd --system kvm && udevadm trigger --name-match=kvm".to_owned(),
        Some(kvm) if kvm != owner.group || owner.mode & 0o060 != 0o060 => {
            format!("udevadm trigger --name-match=kvm; without udev: chgrp kvm {KVM} && chmod 660 {KVM}")
        }
        Some(_) => "name its group in groups of [guests] in the daemon's configuration".to_owned(),
    };
    Finding::missing(CHECK, format!("{found}: QEMUs that the daemon starts may not open it"), remedy)
}

fn userfaultfd(device: Option<Owner>, accounts: &Accounts, daemon_groups: &[u32]) -> Finding {
    const CHECK: &str = "userfaultfd";
    let Some(owner) = device else {
        let remedy = "run a kernel that was built with CONFIG_USERFAULTFD, as distributions' are";
        return Finding::missing(CHECK, format!("there is no {USERFAULTFD}"), remedy);
    };
    let found = format!("{USERFAULTFD} is {}", described(owner, accounts));
    let mend = format!(
        "udevadm control --reload && udevadm trigger --name-match=userfaultfd; without udev: \
         chgrp {DAEMON} {USERFAULTFD} && chmod 660 {USERFAULTFD}"
    );
    if !owner.lets_in(accounts.user(DAEMON), daemon_groups) {
        return Finding::missing(CHECK, format!("{found}: the daemon may not open it"), mend);
    }
    if owner.mode & 0o006 != 0 {
        let why = "everyone may have faults of the kernel wait, which helps who attacks it";
        return Finding::advice(CHECK, format!("{found}: {why}"), mend);
    }
    Finding::ok(CHECK, format!("{found}: the daemon may open it"))
}

fn write_protection(refused: Option<&UserfaultError>) -> Finding {
    const CHECK: &str = "write-protection";
    match refused {
        None => Finding::ok(CHECK, "userfaultfd protects pages without messages (UFFD_FEATURE_WP_ASYNC)"),
        Some(UserfaultError::Permission) => Finding::advice(
            CHECK,
            "not tried: this user may not open a userfaultfd",
            "sudo memlanectl doctor",
        ),
        Some(error) => Finding::missing(CHECK, error.to_string(), "boot Linux 6.7 or newer"),
    }
}

fn pagemap_scan(refused: Option<String>) -> Finding {
    const CHECK: &str = "pagemap-scan";
    match refused {
        None => Finding::ok(CHECK, "/proc/self/pagemap takes PAGEMAP_SCAN"),
        Some(error) => {
            Finding::missing(CHECK, error, "boot Linux 6.7 or newer, with CONFIG_PROC_PAGE_MONITOR")
        }
    }
}

/// Judges io_uring: `disabled` and `group` are sysctls, and `zero_copy` is whether it can send without copying.
fn io_uring(
    disabled: Option<&str>,
    group: Option<&str>,
    daemon_groups: &[u32],
    zero_copy: Result<bool, String>,
) -> Finding {
    const CHECK: &str = "io-uring";
    const FILE: &str = "/etc/sysctl.d/60-memlane.conf";
    let permit = format!("echo 'kernel.io_uring_disabled = 0' >> {FILE} && sysctl --system");
    let in_group = group
        .and_then(|group| group.trim().parse().ok())
        .is_some_and(|group: u32| daemon_groups.contains(&group));
    match disabled.map(str::trim) {
        Some("2") => {
            return Finding::missing(CHECK, "kernel.io_uring_disabled is 2: nobody may use it", permit);
        }
        Some("1") if !in_group => {
            let found = "kernel.io_uring_disabled is 1, and the daemon is not in kernel.io_uring_group";
            let remedy =
                format!("echo \"kernel.io_uring_group = $(id -g {DAEMON})\" >> {FILE} && sysctl --system");
            return Finding::missing(CHECK, found, remedy);
        }
        _ => {}
    }
    match zero_copy {
        Ok(true) => Finding::ok(CHECK, "permitted, and sends without copying (SEND_ZC)"),
        Ok(false) => {
            Finding::advice(CHECK, "permitted, but cannot send without copying", "boot Linux 6.7 or newer")
        }
        // The daemon's user is permitted what this one may not be.
        Err(error) if disabled.map(str::trim) == Some("1") => {
            let found = format!("permitted for the daemon; not tried, as this user may not use it ({error})");
            Finding::advice(CHECK, found, "sudo memlanectl doctor")
        }
        Err(error) => {
            let remedy = "permit io_uring_setup where a seccomp filter forbids it, as container engines' do";
            Finding::missing(CHECK, format!("cannot be used: {error}"), remedy)
        }
    }
}

/// Asks the kernel whether io_uring sends without copying.
fn has_zero_copy() -> Result<bool, String> {
    let ring = IoUring::new(2).map_err(|error| error.to_string())?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(|error| error.to_string())?;
    Ok(probe.is_supported(opcode::SendZc::CODE) && probe.is_supported(opcode::SendMsgZc::CODE))
}

/// Judges how much memory the daemon may lock: `of_unit` is the limit of its unit, `None` without systemd, and `own` the
/// limit of this process. `u64::MAX` and `None` are no limit.
fn memlock(of_unit: Option<u64>, own: Option<u64>) -> Finding {
    const CHECK: &str = "memlock";
    const ENOUGH: u64 = 1 << 30;
    let say = |limit: u64| if limit == u64::MAX { "no limit".to_owned() } else { format!("{limit} bytes") };
    match of_unit {
        Some(limit) if limit >= ENOUGH => Finding::ok(CHECK, format!("memlaned.service: {}", say(limit))),
        Some(limit) => Finding::advice(
            CHECK,
            format!(
                "memlaned.service may lock {}; sends without copying, and the program itself, need more",
                say(limit)
            ),
            "systemctl edit memlaned   # [Service]  LimitMEMLOCK=infinity",
        ),
        None => match own.unwrap_or(u64::MAX) {
            limit if limit >= ENOUGH => Finding::ok(CHECK, format!("this user: {}", say(limit))),
            limit => Finding::advice(
                CHECK,
                format!("this user may lock {}, and there is no unit with another limit", say(limit)),
                "ulimit -l unlimited   # in the shell that starts memlaned",
            ),
        },
    }
}

fn described(owner: Owner, accounts: &Accounts) -> String {
    let (user, group) = (accounts.user_name(owner.user), accounts.group_name(owner.group));
    format!("{user}:{group} {:04o}", owner.mode)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::super::Status;
    use super::super::accounts::tests::whole;
    use super::*;

    fn owner(group: u32, mode: u32) -> Option<Owner> {
        Some(Owner { user: 0, group, mode })
    }

    #[test]
    fn the_kernel_is_new_enough_or_not() {
        for release in ["6.7.0", "6.18.44-cloud-amd64", "7.0-rc1", "10.0"] {
            assert_eq!(version(release, "x86_64").status, Status::Ok, "{release}");
        }
        for release in ["6.6.99", "6.1.0-28-amd64", "5.15", "", "x"] {
            assert_eq!(version(release, "x86_64").status, Status::Missing, "{release}");
        }
        assert_eq!(version("6.18.0", "aarch64").status, Status::Missing);
    }

    /// The tests need such a kernel themselves.
    #[test]
    fn this_kernel_answers() {
        assert_eq!(pagemap_scan(try_scan().err().map(|error| error.to_string())).status, Status::Ok);
        assert_eq!(has_zero_copy(), Ok(true));
    }

    #[test]
    fn kvm_is_there_for_the_group_of_guests_or_not() {
        assert_eq!(kvm(owner(105, 0o660), "", &[105], &whole()).status, Status::Ok);
        assert_eq!(kvm(owner(0, 0o666), "", &[], &whole()).status, Status::Ok);
        let closed = kvm(owner(0, 0o600), "", &[105], &whole());
        assert!(closed.status == Status::Missing && closed.found.contains("root:root 0600"), "{closed:?}");
        assert!(closed.remedy.unwrap().contains("chgrp kvm /dev/kvm"));
        let other = kvm(owner(105, 0o660), "", &[], &whole());
        assert!(other.remedy.unwrap().contains("groups of [guests]"));
        let no_group = kvm(owner(0, 0o600), "", &[], &Accounts::default());
        assert!(no_group.remedy.unwrap().starts_with("groupadd --system kvm"));
        for (flags, remedy) in [("flags : vmx", "kvm_intel"), ("flags : svm", "kvm_amd"), ("", "firmware")] {
            let absent = kvm(None, flags, &[], &whole());
            assert!(absent.status == Status::Missing && absent.remedy.unwrap().contains(remedy), "{flags}");
        }
    }

    #[test]
    fn the_daemon_may_open_userfaultfd_or_not() {
        assert_eq!(userfaultfd(owner(991, 0o660), &whole(), &[991]).status, Status::Ok);
        assert_eq!(userfaultfd(owner(991, 0o666), &whole(), &[991]).status, Status::Advice);
        let closed = userfaultfd(owner(0, 0o600), &whole(), &[991]);
        assert!(closed.status == Status::Missing && closed.remedy.unwrap().contains("udevadm trigger"));
        assert_eq!(userfaultfd(owner(0, 0o600), &Accounts::default(), &[]).status, Status::Missing);
        assert!(userfaultfd(None, &whole(), &[991]).remedy.unwrap().contains("CONFIG_USERFAULTFD"));
    }

    #[test]
    fn features_are_there_or_untried_or_not() {
        assert_eq!(write_protection(None).status, Status::Ok);
        assert_eq!(write_protection(Some(&UserfaultError::Permission)).status, Status::Advice);
        let old = UserfaultError::Features { features: 1, source: io::Error::from_raw_os_error(22) };
        assert_eq!(write_protection(Some(&old)).status, Status::Missing);
        assert_eq!(pagemap_scan(None).status, Status::Ok);
        assert_eq!(pagemap_scan(Some("no".into())).status, Status::Missing);
    }

    #[test]
    fn io_uring_is_permitted_or_not() {
        let status = |disabled, group, zero_copy| io_uring(disabled, group, &[991], zero_copy).status;
        assert_eq!(status(Some("0\n"), Some("-1\n"), Ok(true)), Status::Ok);
        assert_eq!(status(None, None, Ok(true)), Status::Ok);
        assert_eq!(status(Some("1\n"), Some("991\n"), Ok(true)), Status::Ok);
        assert_eq!(status(Some("1\n"), Some("-1\n"), Ok(true)), Status::Missing);
        assert_eq!(status(Some("1\n"), Some("991\n"), Err("EPERM".into())), Status::Advice);
        assert_eq!(status(Some("2\n"), Some("991\n"), Ok(true)), Status::Missing);
        assert_eq!(status(Some("0\n"), None, Ok(false)), Status::Advice);
        assert_eq!(status(Some("0\n"), None, Err("EPERM".into())), Status::Missing);
    }

    #[test]
    fn enough_memory_may_be_locked_or_not() {
        assert_eq!(memlock(Some(u64::MAX), Some(1)).status, Status::Ok);
        let unit = memlock(Some(8 << 20), None);
        assert!(unit.status == Status::Advice && unit.remedy.unwrap().contains("LimitMEMLOCK=infinity"));
        assert_eq!(memlock(None, None).status, Status::Ok);
        assert_eq!(memlock(None, Some(8 << 20)).status, Status::Advice);
    }
}
