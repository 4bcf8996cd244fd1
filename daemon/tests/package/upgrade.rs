//! Upgrades, with guests that run and move.

use memlane_lab::{HostId, wait_for};

use crate::hosts::{LONG, Pair};

/// The whole of dpkg's way through an upgrade, with the same version.
const UPGRADE: &str = "apt-get install -qy --reinstall /root/memlane.deb";

#[test]
fn an_upgrade_harms_no_guest() {
    let Some(pair) = Pair::start_installed("an_upgrade_harms_no_guest") else { return };
    let guest = pair.prepare_linux();
    let session = pair.launch(&guest);
    let boot = session.hear(LONG).unwrap().boot_id;
    for upgraded in [HostId::A, HostId::B] {
        // Slow enough for an upgrade to fall into the midst of it.
        pair.set_rate(Some(20_000_000));
        let order = "memlanectl --json migrate web1 host-b --detach --retry 5 --downtime-limit 60s";
        let began = pair.host(HostId::A).run(order).unwrap();
        let status = || pair.host(HostId::A).run("memlanectl status").unwrap();
        let copying = || status().contains("copying").then_some(());
        if let Err(error) = wait_for("the move to begin", LONG, copying) {
            panic!("{error:#}: {began}{}", status());
        }
        let pid = pair.host(upgraded).run("systemctl show -P MainPID memlaned").unwrap();
        pair.host(upgraded).run(UPGRADE).unwrap();
        assert_ne!(pair.host(upgraded).run("systemctl show -P MainPID memlaned").unwrap(), pid);
        pair.set_rate(None);
        let now = session.hear(LONG).unwrap();
        assert!(now.failures == 0 && now.boot_id == boot, "{now:?}");
        // The order was carried out, or ended with the guest where it was.
        let settled = || {
            let at = [HostId::A, HostId::B].map(|id| {
                let (_, text) = pair.host(id).try_run("memlanectl --json guests").unwrap_or_default();
                text.contains("\"running\"")
            });
            match at {
                [true, false] => Some(HostId::A),
                [false, true] => Some(HostId::B),
                _ => None,
            }
        };
        let at = wait_for("the guest to be somewhere", LONG, settled).unwrap();
        if at == HostId::B {
            pair.assert_moves(HostId::B, "web1");
        }
    }
    let now = session.hear(LONG).unwrap();
    assert!(now.failures == 0 && now.boot_id == boot, "{now:?}");
}
