//! The alert rules: Prometheus understands them, each fires when it should, and each has its paragraph in the documents.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output};

use memlane_lab::{Requirement, skip};

use crate::dashboards::FOLDER;

/// The file of the rules, and that of their tests.
pub(crate) const RULES: &str = "alerts.yml";
const TESTS: &str = "alerts_test.yml";
/// The page with a paragraph for each alert, whose heading is the alert's name.
const PAGE: &str = "docs/operating.md";

#[test]
fn prometheus_understands_the_rules() {
    if skip("prometheus_understands_the_rules", &[Requirement::Prometheus]) {
        return;
    }
    let said = promtool(&["check", "rules", RULES]);
    assert!(said.contains(&format!("{} rules found", alerts().len())), "{said}");
}

#[test]
fn every_alert_fires_when_it_should_and_only_then() {
    let tests = read(TESTS);
    for alert in alerts() {
        assert!(tests.contains(&format!("alertname=\"{alert}\"")), "{alert} has no test in {TESTS}");
    }
    if !skip("every_alert_fires_when_it_should_and_only_then", &[Requirement::Prometheus]) {
        promtool(&["test", "rules", TESTS]);
    }
}

#[test]
fn every_alert_has_its_paragraph_and_the_other_way_round() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(PAGE);
    let page = std::fs::read_to_string(page).expect("the page");
    let headings: Vec<String> = page
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .filter(|title| title.starts_with("Memlane"))
        .map(str::to_owned)
        .collect();
    assert_eq!(headings, alerts(), "the paragraphs of {PAGE} and the alerts of {RULES}, in the same order");
    let wanted: Vec<String> =
        alerts().iter().map(|alert| format!("{PAGE}#{}", alert.to_lowercase())).collect();
    assert_eq!(values("runbook:"), wanted);
}

#[test]
fn every_alert_is_of_one_of_two_severities_and_says_what_is_wrong() {
    let severities: BTreeSet<String> = values("severity:").into_iter().collect();
    assert_eq!(severities, ["page", "ticket"].map(str::to_owned).into());
    for key in ["severity:", "summary:", "description:", "runbook:"] {
        assert_eq!(values(key).len(), alerts().len(), "{key}");
    }
}

/// Returns the names of the alerts.
fn alerts() -> Vec<String> {
    values("- alert:")
}

/// Returns what follows a key wherever it stands in the rules.
fn values(key: &str) -> Vec<String> {
    let rules = read(RULES);
    rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix(key))
        .map(|value| value.trim().to_owned())
        .collect()
}

fn read(name: &str) -> String {
    std::fs::read_to_string(Path::new(FOLDER).join(name)).expect("a file of rules")
}

/// Runs promtool in the folder of the rules, and returns what it says.
fn promtool(arguments: &[&str]) -> String {
    let Output { status, stdout, stderr } =
        Command::new("promtool").args(arguments).current_dir(FOLDER).output().expect("promtool");
    let said = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(status.success(), "promtool {}: {said}", arguments.join(" "));
    said
}
