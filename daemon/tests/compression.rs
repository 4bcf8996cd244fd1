//! Lanes that their ports hold up compress what becomes smaller, and the guest arrives as it was.

mod common;

use common::{Stage, words};
use memlane_lab::{HostId, LabOptions, Rate};
use serde_json::Value;

/// Memory of which LZ4 makes a third, beside some that it makes nothing of, and writes all over it.
const GUEST: &str =
    "--ram 64MiB --working-set 32MiB --rate 500 --vcpus 1 --fill zero=10,random=20,mixed=60,compressible=10";
/// Of random pages, and writes that leave them so.
const RANDOM: &str = "--ram 32MiB --working-set 8MiB --rate 100 --vcpus 1 --fill random=100";

/// Two ports that a lane's thread has little to do for.
fn two_slow_ports(test: &str) -> Option<Stage> {
    let rate = Rate::from_bits_per_second(100_000_000);
    Stage::new(test, LabOptions { ports: 2, port_rate: Some(rate), ..LabOptions::default() })
}

/// Moves a guest, compares its memory with the model, and returns what its source says of it.
fn moves(stage: &mut Stage, name: &str, guest: &str, more: &[&str]) -> Value {
    let _here = stage.rig.start_vmm(HostId::A, name, &words(guest)).unwrap();
    let mut there = stage.rig.start_vmm(HostId::B, name, &words(&format!("{guest} --incoming"))).unwrap();
    let answer = stage.migrate(name, &[&["--downtime-limit", "20s"], more].concat());
    assert_eq!(answer.code, 0, "{}", answer.text);
    common::assert_runs(&mut there);
    answer.last().unwrap().clone()
}

#[test]
fn what_is_compressed_arrives_as_it_was() {
    let Some(mut stage) = two_slow_ports("what_is_compressed_arrives_as_it_was") else { return };
    let ended = moves(&mut stage, "web1", GUEST, &["--verify"]);
    assert_eq!(ended["digest_verified"], true, "{ended}");
    let bytes = |key: &str| ended[key].as_u64().unwrap();
    let (from, to) = (bytes("uncompressed_bytes"), bytes("compressed_bytes"));
    assert!(from > 0 && 2 * to < from, "{ended}");
    assert!(bytes("bytes_sent") < bytes("pages_sent") * 4096, "{ended}");
    let there = stage.wait_until(HostId::B, "web1", "the end", |migration| migration.outcome.is_some());
    assert!(there.compressed_bytes > 0 && 2 * there.compressed_bytes < there.uncompressed_bytes, "{there:?}");
    let counted = |id| {
        let metrics = stage.rig.metrics(id).unwrap();
        let lines = metrics.lines().filter(|line| line.starts_with("memlane_compressed_bytes_total{"));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum::<u64>()
    };
    assert_eq!(counted(HostId::A), to, "the source counts what it compressed");
    assert_eq!(counted(HostId::B), 0, "and nobody else does");
}

#[test]
fn nothing_is_compressed_in_vain_or_against_the_order() {
    let test = "nothing_is_compressed_in_vain_or_against_the_order";
    let Some(mut stage) = two_slow_ports(test) else { return };
    for (name, guest, more) in [("web1", RANDOM, "auto"), ("web2", GUEST, "off")] {
        let ended = moves(&mut stage, name, guest, &["--compression", more]);
        assert_eq!(ended["compressed_bytes"], 0, "{name}: {ended}");
    }
}
