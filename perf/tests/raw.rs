//! The raw measurement moves and checks what it was given. Root is needed.

use memlane_lab::{Lab, LabOptions, Requirement, skip};
use memlane_perf::baseline::memory::MemoryState;
use memlane_perf::baseline::raw::{RawOptions, measure};

#[test]
fn moves_uneven_shares_into_either_kind_of_memory() {
    if skip("moves_uneven_shares_into_either_kind_of_memory", Requirement::LAB) {
        return;
    }
    let lab = Lab::new(LabOptions { ports: 3, ..LabOptions::default() }).expect("a lab");
    for destination in [MemoryState::Prepared, MemoryState::Fresh] {
        let options = RawOptions { bytes: (20 << 20) + 5, connections_per_port: 2, destination };
        // It compares source and destination itself.
        let report = measure(&lab, &options).expect("a measurement");
        assert_eq!((report.ports, report.bytes), (3, options.bytes));
        assert!(report.seconds > 0.0 && report.cpu_seconds_per_gb > 0.0);
        let rpc = &report.rpc;
        assert!(0.0 < rpc.rpc_p50_us && rpc.rpc_p50_us <= rpc.rpc_p99_us && rpc.rpc_p99_us <= rpc.rpc_max_us);
        let json = serde_json::to_value(&report).expect("JSON");
        assert!(json["rpc_p50_us"].is_f64() && json["rpc_p99_us"].is_f64(), "{json}");
    }
}

#[test]
fn refuses_what_cannot_be_measured() {
    if skip("refuses_what_cannot_be_measured", Requirement::LAB) {
        return;
    }
    let options = RawOptions { bytes: 1 << 20, connections_per_port: 2, destination: MemoryState::Fresh };
    let lab = Lab::new(LabOptions { ports: 1, ..LabOptions::default() }).expect("a lab");
    let error = measure(&lab, &options).expect_err("too few bytes");
    assert!(error.to_string().contains("too few for 2 connections"), "{error}");

    let lab = Lab::new(LabOptions { ports: 0, ..LabOptions::default() }).expect("a lab");
    let error = measure(&lab, &options).expect_err("no port");
    assert!(error.to_string().contains("needs a port"), "{error}");
}
