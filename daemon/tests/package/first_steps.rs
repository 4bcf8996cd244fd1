//! The first steps of the manual, exactly as they are written there.

use std::fs;
use std::path::Path;

use memlane_lab::HostId;
use memlane_lab::linux::{Initramfs, Kernel};

use crate::hosts::Pair;

/// Where a command is given.
#[derive(Clone, Copy)]
enum On {
    A,
    B,
    Both,
    /// There is no ssh between these hosts: the test copies what the command would.
    Copied,
}

/// Each command of the section, in its order, and where the text says that it is given.
const STEPS: [(On, &str); 22] = [
    (On::Both, "apt install ./memlane_*.deb qemu-system-x86"),
    (On::A, "memlanectl setup --peer host-b=192.0.2.12 --write"),
    (On::B, "memlanectl setup --peer host-a=192.0.2.11 --write"),
    (On::A, "memlanectl keys init --dir /root/ca"),
    (On::A, "memlanectl keys issue host-a --dir /root/ca"),
    (On::A, "memlanectl keys issue host-b --dir /root/ca"),
    (On::A, "install -d -o memlane -g memlane -m 700 /etc/memlane/keys"),
    (On::A, "install -o memlane -g memlane -m 600 -t /etc/memlane/keys /root/ca/host-a/*"),
    (On::Copied, "scp -r /root/ca/host-b root@192.0.2.12:/root/keys"),
    (On::B, "install -d -o memlane -g memlane -m 700 /etc/memlane/keys"),
    (On::B, "install -o memlane -g memlane -m 600 -t /etc/memlane/keys /root/keys/*"),
    (On::B, "rm -r /root/keys"),
    (On::Both, "memlaned --check-config"),
    (On::Both, "systemctl enable --now memlane-guest.socket memlaned"),
    (On::Both, "memlanectl doctor"),
    (On::Both, "memlanectl status"),
    (On::A, "memlanectl launch web1.toml"),
    (On::B, "memlanectl launch web1.toml --incoming"),
    (On::A, "memlanectl check web1 host-b"),
    (On::A, "memlanectl migrate web1 host-b --verify"),
    (On::B, "memlanectl guests"),
    (On::Both, "memlanectl doctor"),
];

#[test]
fn the_first_steps_of_the_manual_lead_to_a_moved_guest() {
    let Some(pair) = Pair::start("the_first_steps_of_the_manual_lead_to_a_moved_guest") else { return };
    let manual = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operating.md");
    let section = section(&fs::read_to_string(manual).unwrap(), "## First steps");
    let commands = blocks(&section, "sh").join("\n");
    let written: Vec<&str> =
        commands.lines().map(|line| line.split("  #").next().unwrap_or(line).trim()).collect();
    // The section begins with the command that is given at any time; it is tried at the end.
    let (first, rest) = written.split_first().unwrap();
    assert_eq!(*first, "memlanectl doctor");
    assert_eq!(rest, STEPS[..STEPS.len() - 1].iter().map(|(_, line)| *line).collect::<Vec<_>>());

    let guest = blocks(&section, "toml").join("\n");
    // No stock kernel boots under the KVM of some machines that run this test.
    let guest = guest.replace("\"-accel\", \"kvm\"", "\"-accel\", \"tcg\"").replace("kvm64", "Nehalem");
    let kernel = Kernel::obtain().unwrap();
    let initramfs = pair.lab.host(HostId::A).directory().join("initramfs");
    let initramfs = Initramfs::build(&initramfs, &kernel).unwrap();
    for id in [HostId::A, HostId::B] {
        let host = pair.host(id);
        host.copy(kernel.image(), "/vmlinuz").unwrap();
        host.copy(initramfs.file(), "/initrd.img").unwrap();
        host.write("/root/web1.toml", &guest).unwrap();
    }
    let mut said = Vec::new();
    for (on, line) in STEPS {
        let line = line.replace("192.0.2.11", "10.77.0.1").replace("192.0.2.12", "10.77.0.2");
        let ids = match on {
            On::A => &[HostId::A][..],
            On::B => &[HostId::B],
            On::Both => &[HostId::A, HostId::B],
            On::Copied => {
                copy_keys(&pair);
                continue;
            }
        };
        for id in ids {
            let host = pair.host(*id);
            // As somebody who agrees.
            let (code, text) = host.try_run(&format!("cd /root && yes | {line}")).unwrap();
            assert!(code == 0 || line == "memlanectl doctor", "`{line}` on {}: {text}", host.name());
            said.push((line.clone(), text));
            if line.starts_with("apt install") {
                pair.take_udevs_place(host);
            }
        }
    }
    // On both hosts.
    for (line, text) in said.iter().rev().take(2) {
        assert!(line == "memlanectl doctor" && !text.contains("MISSING"), "{line}: {text}");
    }
    let (_, guests) = pair.ctl(HostId::B, "guests");
    assert_eq!(guests[0]["name"], "web1", "{guests}");
}

fn copy_keys(pair: &Pair) {
    let (a, b) = (pair.host(HostId::A), pair.host(HostId::B));
    b.run("mkdir -m 700 /root/keys").unwrap();
    for file in ["host.pem", "host.key", "ca.pem"] {
        b.copy(&a.path(&format!("/root/ca/host-b/{file}")), &format!("/root/keys/{file}")).unwrap();
    }
}

/// The part of a document below a heading.
fn section(text: &str, heading: &str) -> String {
    let (_, rest) = text.split_once(&format!("\n{heading}\n")).expect("the heading is there");
    rest.split("\n## ").next().unwrap_or(rest).to_owned()
}

/// The blocks of a language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let begin = format!("```{language}\n");
    let parts = text.split(&begin).skip(1);
    parts.map(|part| part.split("```").next().unwrap_or(part).trim().to_owned()).collect()
}
