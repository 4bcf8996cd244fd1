//! What the package does to a host, and what it leaves there.

use std::collections::BTreeSet;

use memlane_lab::HostId;
use memlane_lab::systemd::SystemdHost;

use crate::hosts::Pair;

/// The daemon may have this much of its host at the most, by systemd's count of 10.
const EXPOSURE: f64 = 2.5;
/// What dpkg, apt, systemd and the C library note for themselves, and where the package lay.
const NOT_OURS: [&str; 9] = [
    "/var/lib/dpkg",
    "/var/lib/apt",
    "/var/cache",
    "/var/log",
    "/var/lib/systemd",
    "/etc/passwd",
    "/etc/group",
    "/etc/shadow",
    "/etc/gshadow",
];

#[test]
fn nothing_starts_before_there_is_a_configuration() {
    let Some(pair) = Pair::start("nothing_starts_before_there_is_a_configuration") else { return };
    let host = pair.host(HostId::A);
    let before = files(host);
    host.run("cd /root && apt-get install -qy ./memlane_1_amd64.deb").unwrap();
    for unit in ["memlaned.service", "memlane-guest.socket"] {
        assert_eq!(host.run(&format!("systemctl show -P ActiveState {unit}")).unwrap(), "inactive\n");
        assert_eq!(host.run(&format!("systemctl is-enabled {unit}")).unwrap(), "enabled\n");
    }
    assert_eq!(host.run("systemctl --failed --plain --no-legend").unwrap(), "");
    // It says by itself what to do.
    let (code, said) = host.try_run("memlanectl doctor").unwrap();
    assert!(code == 10 && said.contains("memlanectl setup --write"), "{code}: {said}");
    let verified =
        host.run("systemd-analyze verify memlaned.service memlane-guest.socket memlane-guest@1.service");
    assert_eq!(verified.unwrap(), "");
    let exposure = host.run("systemd-analyze security --no-pager memlaned.service").unwrap();
    let score = exposure.lines().find_map(|line| line.split_once("memlaned.service: ")).unwrap().1;
    let score: f64 = score.split(' ').next().unwrap().parse().unwrap();
    assert!(score <= EXPOSURE, "{exposure}");
    assert!(host.run("id memlane").unwrap().contains("memlane"));
    host.run("test -s /usr/share/bash-completion/completions/memlanectl").unwrap();

    // What was not configured leaves nothing.
    host.run("apt-get purge -qy memlane").unwrap();
    assert_eq!(files(host).difference(&before).collect::<Vec<_>>(), [""; 0]);
    assert_ne!(host.try_run("id memlane").unwrap().0, 0);
}

#[test]
fn what_an_operator_wrote_stays() {
    let Some(pair) = Pair::start_installed("what_an_operator_wrote_stays") else { return };
    let host = pair.host(HostId::A);
    host.run("apt-get remove -qy memlane").unwrap();
    assert_ne!(host.try_run("systemctl is-active memlaned").unwrap().0, 0);
    // The journal says who may run which guest, so only `purge` takes it.
    host.run("test -s /var/lib/memlane/handover.id && test -s /etc/memlane/memlaned.toml").unwrap();
    host.run("apt-get purge -qy memlane").unwrap();
    let left = host.run("find /etc/memlane -type f | sort").unwrap();
    let written = ["keys/ca.pem", "keys/host.key", "keys/host.pem", "memlaned.toml"];
    assert_eq!(left, written.map(|file| format!("/etc/memlane/{file}\n")).concat());
    assert_eq!(
        host.run("ls -d /var/lib/memlane /run/memlane* /dev/shm/memlane* 2>&1 | grep -v 'No such' || :")
            .unwrap(),
        ""
    );
    // Nobody else gets the number of the user that owns the keys.
    host.run("id memlane").unwrap();
}

/// All files of a host that stay when it is started anew, and are no notes of others.
fn files(host: &SystemdHost) -> BTreeSet<String> {
    let found = host.run("find / -xdev -not -path '/root/*' -not -path '/tmp/*' -not -path '/var/tmp/*' -not -path '/run/*'").unwrap();
    let ours = |file: &&str| NOT_OURS.iter().all(|other| !file.starts_with(other));
    found.lines().filter(ours).map(str::to_owned).collect()
}
