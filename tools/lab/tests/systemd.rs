//! Hosts that systemd has started.

use memlane_lab::debian::Tree;
use memlane_lab::systemd::SystemdHost;
use memlane_lab::{HostId, Lab, LabOptions, Requirement, skip};

#[test]
fn two_hosts_boot_and_reach_each_other() {
    if skip("two_hosts_boot_and_reach_each_other", Requirement::LAB_WITH_SYSTEMD) {
        return;
    }
    let tree = Tree::HOST.obtain().unwrap();
    let lab = Lab::new(LabOptions::default()).unwrap();
    let [a, b] = [HostId::A, HostId::B].map(|id| SystemdHost::boot(lab.host(id), &tree).unwrap());
    assert_eq!(a.run("cat /proc/1/comm").unwrap(), "systemd\n");
    assert_eq!(b.run("hostname").unwrap(), "host-b\n");
    a.run("ping -c 1 -M do -s 8972 10.77.1.2").unwrap();
    assert!(a.run("ls /sys/class/net").unwrap().contains("port0"));
    // Services have cgroups, users and file systems of their own.
    let service = "systemd-run --quiet --wait --pipe -p DynamicUser=yes -p ProtectSystem=strict -p PrivateTmp=yes \
                   sh -c 'id -u; cat /proc/self/cgroup; touch /usr/x'";
    let (code, said) = a.try_run(service).unwrap();
    assert!(code != 0 && said.contains("Read-only file system"), "{said}");
    assert!(said.contains("0::/system.slice/run-u") && !said.starts_with("0\n"), "{said}");
    // What is written is the host's alone.
    a.write("/etc/memlane/x", "x").unwrap();
    assert_eq!(a.run("cat /etc/memlane/x").unwrap(), "x");
    assert!(!tree.join("etc/memlane").exists() && b.try_run("cat /etc/memlane/x").unwrap().0 != 0);
}

#[test]
fn what_ran_on_a_host_ends_with_it() {
    if skip("what_ran_on_a_host_ends_with_it", Requirement::LAB_WITH_SYSTEMD) {
        return;
    }
    let tree = Tree::HOST.obtain().unwrap();
    let lab = Lab::new(LabOptions::default()).unwrap();
    let host = SystemdHost::boot(lab.host(HostId::A), &tree).unwrap();
    host.run("systemd-run --quiet sleep 4711").unwrap();
    let sleeps = || {
        let mut lines =
            std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path().join("cmdline"));
        lines.any(|file| std::fs::read(file).is_ok_and(|line| line.starts_with(b"/usr/bin/sleep\x004711")))
    };
    memlane_lab::wait_for("a service", std::time::Duration::from_secs(60), || sleeps().then_some(()))
        .unwrap();
    drop(host);
    drop(lab);
    assert!(!sleeps());
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains("systemd/root"), "{mounts}");
}
