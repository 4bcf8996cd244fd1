//! A guest is moved by Memlane and by QEMU itself, and arrives whole. Root and QEMU are needed.

use memlane_lab::{Programs, Requirement, Size, skip};
use memlane_perf::qemu::{QemuOptions, measure};

#[test]
fn every_way_of_moving_is_measured() {
    if skip("every_way_of_moving_is_measured", Requirement::LAB_WITH_LINUX) {
        return;
    }
    let programs = Programs::build(false).expect("programs");
    let options = QemuOptions {
        ram: Size::from_mib(256),
        touched: Some(Size::from_mib(32)),
        dirty_rate: 100,
        vcpus: 1,
        ports: 2,
        port_rate: None,
        prealloc: false,
        anonymous: false,
        repetitions: 1,
    };
    let too_full = QemuOptions { touched: Some(Size::from_mib(250)), ..options.clone() };
    let error = measure(&programs, &too_full).expect_err("no memory is left for a kernel");
    assert!(error.to_string().contains("--touched"), "{error}");

    let report = measure(&programs, &options).expect("a measurement");
    let ways = [&report.memlane, &report.baselines["plain"], &report.baselines["multifd4"]];
    for figures in ways {
        let [run] = figures.runs[..] else { panic!("one run: {figures:?}") };
        assert!(0.0 < run.downtime_seconds && run.downtime_seconds < run.total_seconds, "{run:?}");
        // What was touched cannot be compressed, nor be left out.
        assert!(run.ram_bytes > 32 << 20, "{run:?}");
        assert!(run.cpu_seconds > 0.0 && run.cpu_seconds_per_gb > 0.0, "{run:?}");
    }
    assert!(report.ratios["vs_qemu"] <= report.ratios["vs_plain"], "{:?}", report.ratios);
}
