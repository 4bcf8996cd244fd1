//! The daemon as a service: it is watched over, takes new keys, and its log can be asked for a guest.

use memlane_lab::{HostId, wait_for};

use crate::hosts::{LONG, Pair};

#[test]
fn a_guest_of_qemu_moves_between_services() {
    let Some(pair) = Pair::start_installed("a_guest_of_qemu_moves_between_services") else { return };
    let guest = pair.prepare_linux();
    let session = pair.launch(&guest);
    let before = session.hear(LONG).unwrap();
    // A unit of its own, of a user of its own.
    let units =
        pair.host(HostId::A).run("systemctl list-units --plain --no-legend 'memlane-guest@*'").unwrap();
    assert_eq!(units.lines().count(), 1, "{units}");
    let migration = pair.assert_moves(HostId::A, "web1");
    pair.assert_moves(HostId::B, "web1");
    let after = session.hear(LONG).unwrap();
    assert!(after.failures == 0 && after.boot_id == before.boot_id, "{after:?}");

    // The journals of both hosts know the migration by one name.
    let id = migration["id"].as_str().unwrap();
    for (host, word) in [(HostId::A, "Source"), (HostId::B, "Destination")] {
        let line = format!("journalctl -o json MEMLANE_MIGRATION={id} MEMLANE_GUEST=web1");
        let found = pair.host(host).run(&line).unwrap();
        assert!(found.contains(&format!("\"MEMLANE_ROLE\":\"{word}\"")), "{found}");
    }
    let others = pair.host(HostId::A).run("journalctl -q -o cat MEMLANE_GUEST=web2").unwrap();
    assert_eq!(others, "");
}

#[test]
fn a_daemon_that_is_killed_or_hangs_is_started_again() {
    let Some(pair) = Pair::start_installed("a_daemon_that_is_killed_or_hangs_is_started_again") else {
        return;
    };
    let host = pair.host(HostId::A);
    let guest = pair.prepare_linux();
    let session = pair.launch(&guest);
    let main_pid = || host.run("systemctl show -P MainPID memlaned").unwrap();
    let restarted = |before: &str| {
        let changed = || (!["0\n", before].contains(&main_pid().as_str())).then_some(());
        wait_for("another daemon", LONG, changed).unwrap();
        pair.wait_for_guest(HostId::A, "web1");
    };
    let first = main_pid();
    host.run(&format!("kill -9 {first}")).unwrap();
    restarted(&first);
    // A daemon that stands still is killed by its watchdog. Shorter than as it ships, to wait less.
    host.run("mkdir -p /run/systemd/system/memlaned.service.d").unwrap();
    host.write("/run/systemd/system/memlaned.service.d/short.conf", "[Service]\nWatchdogSec=2s\n").unwrap();
    host.run("systemctl daemon-reload && systemctl restart memlaned").unwrap();
    pair.wait_for_guest(HostId::A, "web1");
    let second = main_pid();
    host.run(&format!("kill -STOP {second}")).unwrap();
    restarted(&second);
    let log = host.run("journalctl -u memlaned -o cat").unwrap();
    assert!(log.contains("Watchdog timeout"), "{log}");
    pair.assert_moves(HostId::A, "web1");
    assert_eq!(session.hear(LONG).unwrap().failures, 0);
}

#[test]
fn new_keys_are_taken_on_reload_and_from_credentials() {
    let Some(pair) = Pair::start_installed("new_keys_are_taken_on_reload_and_from_credentials") else {
        return;
    };
    let host = pair.host(HostId::A);
    let pid = host.run("systemctl show -P MainPID memlaned").unwrap();
    pair.renew_keys();
    for id in [HostId::A, HostId::B] {
        pair.host(id).run("systemctl reload memlaned").unwrap();
    }
    let reloaded = || {
        let log = host.run("journalctl -u memlaned -o cat").unwrap();
        log.contains("the keys were read again").then_some(())
    };
    wait_for("new keys", LONG, reloaded).unwrap();
    assert_eq!(host.run("systemctl show -P MainPID memlaned").unwrap(), pid);

    // Root's files, which systemd hands over.
    host.run("chown -R root: /etc/memlane/keys").unwrap();
    let drop_in = "/etc/systemd/system/memlaned.service.d/credentials.conf";
    host.run(&format!(
        "install -m 644 -D /usr/share/doc/memlane/examples/memlaned-credentials.conf {drop_in} && \
         systemctl daemon-reload && systemctl restart memlaned"
    ))
    .unwrap();
    let (code, status) = pair.ctl(HostId::A, "status");
    assert_eq!(code, 0, "{status}");
    // The peer takes them.
    let guest = pair.prepare_linux();
    let _session = pair.launch(&guest);
    pair.assert_moves(HostId::A, "web1");
}
