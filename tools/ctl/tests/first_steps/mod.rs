//! What a new user runs first: `doctor`, `setup`, and `attach --libvirt`. What they find on this host is its own affair;
//! what they say about it has a form.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use memlaned::config::Config;
use serde_json::Value;

use crate::fake::Daemon;

/// All names of checks that a host may be told of, whatever it lacks.
const CHECKS: [&str; 35] = [
    "configuration",
    "kernel",
    "kvm",
    "userfaultfd",
    "write-protection",
    "pagemap-scan",
    "io-uring",
    "memlock",
    "port",
    "port-interfaces",
    "mtu",
    "congestion-control",
    "tcp-buffers",
    "network",
    "peer",
    "keys",
    "key-owner",
    "certificate",
    "qemu",
    "shim",
    "starter",
    "libvirt",
    "libvirt-apparmor",
    "libvirt-user",
    "libvirt-monitors",
    "libvirt-memory",
    "shared-memory",
    "huge-pages",
    "journal",
    "journal-sync",
    "users",
    "unit",
    "guest-socket",
    "daemon",
    "clock",
];

/// Runs the program with programs of `directory` before those of the system. Returns exit code, stdout and stderr.
fn run(directory: &Path, line: &[&str]) -> (i32, String, String) {
    let path = format!("{}:{}", directory.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new(env!("CARGO_BIN_EXE_memlanectl"));
    command.env_remove("LIBVIRT_DEFAULT_URI").env_remove("VIRSH_DEFAULT_CONNECT_URI");
    let output = command.env("PATH", path).args(line).stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn program(directory: &Path, name: &str, script: &str) {
    let file = directory.join(name);
    fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn doctor_finds_what_there_is_without_a_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let absent = directory.path().join("memlaned.toml").display().to_string();
    let socket = directory.path().join("api.sock").display().to_string();
    let doctor = ["doctor", "--config", &absent, "--socket", &socket];
    let (code, out, err) = run(directory.path(), &[&doctor[..], &["--json"]].concat());
    assert_eq!(err, "");
    let report: Value = serde_json::from_str(&out).unwrap();
    let findings = report["findings"].as_array().unwrap();
    let mut found = BTreeSet::new();
    for finding in findings {
        let (check, status) = (finding["check"].as_str().unwrap(), finding["status"].as_str().unwrap());
        assert!(CHECKS.contains(&check), "{finding}");
        assert!(["ok", "advice", "missing"].contains(&status), "{finding}");
        assert!(!finding["found"].as_str().unwrap().is_empty(), "{finding}");
        assert_eq!(finding["remedy"].is_null(), status == "ok", "{finding}");
        assert_eq!(finding.as_object().unwrap().len(), 4, "{finding}");
        found.insert(check);
    }
    for check in
        ["configuration", "kernel", "kvm", "userfaultfd", "peer", "keys", "journal", "users", "daemon"]
    {
        assert!(found.contains(check), "{check}: {out}");
    }
    // There is neither a configuration nor a daemon.
    let status = |check| &findings.iter().find(|finding| finding["check"] == check).unwrap()["status"];
    assert_eq!((code, status("configuration"), status("daemon")), (10, &"missing".into(), &"missing".into()));
    let (code, out, _) = run(directory.path(), &doctor);
    assert_eq!(code, 10);
    assert!(out.contains("  MISSING  configuration ") && out.contains("→ memlanectl setup"), "{out}");
    assert!(out.trim_end().ends_with(" missing"), "{out}");
}

#[test]
fn doctor_asks_the_daemon_and_reads_its_configuration() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("memlaned.toml");
    fs::write(&file, "host = \"host-a\"\ninsecure = true\n[guests]\nqemu = []\n").unwrap();
    let (file, socket) = (file.display().to_string(), daemon.socket().display().to_string());
    let (_, out, _) = run(directory.path(), &["doctor", "--json", "--config", &file, "--socket", &socket]);
    let report: Value = serde_json::from_str(&out).unwrap();
    let of =
        |check: &str| report["findings"].as_array().unwrap().iter().find(|finding| finding["check"] == check);
    assert_eq!(of("configuration").unwrap()["status"], "ok");
    assert_eq!((&of("keys").unwrap()["status"], of("key-owner")), (&"advice".into(), None));
    assert_eq!((&of("qemu").unwrap()["status"], of("shim")), (&"ok".into(), None));
    assert!(of("daemon").unwrap()["found"].as_str().unwrap().contains("memlaned"), "{out}");
    assert_ne!(of("daemon").unwrap()["status"], "missing");
}

#[test]
fn setup_writes_a_configuration_that_the_daemon_takes() {
    let directory = tempfile::tempdir().unwrap();
    program(directory.path(), "memlaned", "[ \"$1\" = --check-config ] && echo \"$3 is fine\"");
    let file = directory.path().join("etc/memlaned.toml");
    let name = file.display().to_string();
    let setup = [
        "setup",
        "--config",
        &name,
        "--host",
        "host-a",
        "--peer",
        "host-b=192.0.2.12",
        "--socket",
        "/nonexistent",
    ];
    let (code, out, err) = run(directory.path(), &setup);
    assert!(code == 0 && !file.exists(), "{err}");
    assert!(Config::parse(&file, &out).is_ok(), "{out}");
    assert!(err.contains("MISSING  ") && !err.contains("  ok  "), "{err}");

    let (code, out, err) = run(directory.path(), &[&setup[..], &["--write"]].concat());
    assert_eq!(code, 0, "{err}");
    for part in [&format!("wrote {name}\n"), "is fine\n", "keys issue host-a", "enable --now"] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let config = Config::load(&file).unwrap();
    assert_eq!((config.host.as_str(), config.peers[0].name.as_str()), ("host-a", "host-b"));

    let before = fs::read(&file).unwrap();
    let (code, out, err) = run(directory.path(), &[&setup[..], &["--write"]].concat());
    assert_eq!((code, out.as_str()), (3, ""));
    assert!(err.contains("is there already, and is left as it is"), "{err}");
    assert_eq!(fs::read(&file).unwrap(), before);
}

#[test]
fn setup_tells_programs_what_it_made() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("memlaned.toml").display().to_string();
    let setup = ["setup", "--json", "--config", &file, "--host", "host-a"];
    let (code, out, err) = run(directory.path(), &setup);
    let made: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, err.as_str(), made["written"].is_null()), (0, "", true));
    assert!(made["configuration"].as_str().unwrap().contains("host = \"host-a\""));
    assert!(!made["findings"].as_array().unwrap().is_empty());
    for (wrong, told) in [
        (["--port", "a=no-such-card"], "no such interface"),
        (["--peer", "host-b=host-b.example"], "numeric address"),
        (["--peer", "host-b"], "NAME=VALUE"),
        (["--peer", "host-a=192.0.2.12"], "this is our own"),
        (["--config", "/proc/memlaned.toml"], ""),
    ] {
        let write = if told.is_empty() { &["--write"][..] } else { &[] };
        let line = [&["setup", "--host", "host-a"][..], &wrong, write].concat();
        let (code, _, err) = run(directory.path(), &line);
        assert!(code == if told.is_empty() { 1 } else { 2 } && err.contains(told), "{wrong:?}: {code} {err}");
    }
}

#[test]
fn the_monitor_of_a_domain_is_found() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let socket = daemon.socket().display().to_string();
    let attach =
        |more: &[&str]| run(directory.path(), &[&["attach", "--socket", &socket][..], more].concat());
    let xml = "<domain type=\"kvm\" id=\"1\"><name>web2</name><devices><emulator>/usr/bin/memlane-qemu</emulator>\
               </devices></domain>";
    let script = "[ \"$*\" = '--quiet --connect qemu:///system dumpxml --domain web2' ] || \
                  { echo \"error: failed to get domain '$6'\" >&2; exit 1; }";
    program(directory.path(), "virsh", &format!("{script}\necho '{xml}'"));
    let (code, out, err) = attach(&["--libvirt", "web2"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(
        out.starts_with("web2 is attached\n") && out.contains("  monitor  /run/memlane-qemu/web2.sock\n"),
        "{out}"
    );
    let (code, out, _) = attach(&["--libvirt", "web2", "--name", "web5", "--incoming"]);
    assert_eq!(code, 0);
    assert!(out.starts_with("web5 waits to arrive from another host\n"), "{out}");

    let (code, _, err) = attach(&["--libvirt", "web9"]);
    assert!(code == 3 && err.contains("failed to get domain 'web9'"), "{code} {err}");
    program(
        directory.path(),
        "virsh",
        &format!("echo '{}'", xml.replace("memlane-qemu", "qemu-system-x86_64")),
    );
    let (code, out, err) = attach(&["--libvirt", "web2", "--json"]);
    assert_eq!(code, 3);
    assert!(err.contains("<qemu:arg value='-qmp'/>") && err.contains("mode='shared'"), "{err}");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["error"]["code"], "cannot_attach");
    for wrong in [&["--libvirt=-x"][..], &["--libvirt", "web2", "--qmp", "/x"], &[]] {
        assert_eq!(attach(wrong).0, 2, "{wrong:?}");
    }
}
