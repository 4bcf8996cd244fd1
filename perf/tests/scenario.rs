//! A scenario is measured, and its report has the shape that programs look for. Root is needed.

use memlane_lab::{Programs, Rate, Requirement, Size, skip};
use memlane_perf::scenario::{Bench, Scenario, ShapedScenario};

#[test]
fn a_scenario_makes_a_report() {
    if skip("a_scenario_makes_a_report", Requirement::LAB) {
        return;
    }
    let bench = Bench { programs: Programs::build(false).expect("programs"), hosts: None, repetitions: 1 };
    let rate = "1gbit".parse::<Rate>().expect("a rate");
    let shaped = ShapedScenario { ram: Size::from_mib(32), ports: 2, port_rate: rate };
    let report = shaped.measure(&bench).expect("a measurement");
    let json = report.json();
    assert_eq!((&json["scenario"], &json["settings"]["ports"]), (&"shaped".into(), &2.into()));
    for name in ["of_line", "vs_raw"] {
        let ratio = json["ratios"][name].as_f64().expect("a number");
        assert!(ratio > 0.0 && json["spread"][name]["min"] == ratio, "{json}");
    }
    for figures in [&json["memlane"]["fresh"], &json["baselines"]["raw"]["fresh"]] {
        for name in ["total_seconds", "gbit_per_second", "cpu_seconds_per_gb"] {
            assert!(figures[name]["median"].is_f64(), "no {name} in {json}");
        }
    }
    assert_eq!(json["runs"].as_array().map(Vec::len), Some(2));
    let text = report.to_string();
    assert!(text.contains("memlane fresh") && text.contains("of_line"), "{text}");
}
