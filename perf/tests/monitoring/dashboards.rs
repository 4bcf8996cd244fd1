//! The dashboards, and what each panel must say.

use std::path::Path;

use serde_json::Value;

use crate::metrics::assert_known;

/// The folder of the dashboards and alerts.
pub(crate) const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/dashboards");
/// The names of the dashboards' files.
pub(crate) const NAMES: [&str; 2] = ["host.json", "migration.json"];

/// A query of a panel.
pub(crate) struct Query {
    /// The dashboard's name and the panel's title.
    pub panel: String,
    /// The query with its variables replaced, as Grafana sends it.
    pub expression: String,
}

/// Returns all queries of all panels, for all hosts, with rates over this time.
pub(crate) fn queries(rate_interval: &str) -> Vec<Query> {
    let mut queries = Vec::new();
    for name in NAMES {
        for panel in panels(&read(name)) {
            let title = text(&panel, "title");
            for target in panel["targets"].as_array().expect("a panel has queries") {
                let expression = [("$job", ".*"), ("$instance", ".*"), ("$__rate_interval", rate_interval)]
                    .iter()
                    .fold(text(target, "expr").to_owned(), |query, (name, value)| query.replace(name, value));
                assert!(
                    !expression.contains('$'),
                    "{title} of {name} has a variable of its own: {expression}"
                );
                queries.push(Query { panel: format!("{name}: {title}"), expression });
            }
        }
    }
    queries
}

#[test]
fn every_query_is_of_metrics_that_there_are() {
    let queries = queries("1m");
    assert!(queries.len() > 40, "{} queries", queries.len());
    queries.iter().for_each(|query| assert_known(&query.expression));
    for name in NAMES {
        let dashboard = read(name);
        let variables = dashboard["templating"]["list"].as_array().expect("variables");
        let named: Vec<&str> = variables.iter().map(|variable| text(variable, "name")).collect();
        assert_eq!(named, ["datasource", "job", "instance"], "{name}");
        variables[1..].iter().for_each(|variable| assert_known(text(&variable["query"], "query")));
    }
}

#[test]
fn every_panel_says_what_it_shows_and_what_to_do() {
    for name in NAMES {
        for panel in panels(&read(name)) {
            let title = text(&panel, "title");
            assert!(!text(&panel["fieldConfig"]["defaults"], "unit").is_empty(), "{title} of {name}");
            assert!(text(&panel, "description").len() > 30, "{title} of {name} has no description");
            for target in panel["targets"].as_array().expect("a panel has queries") {
                // Hosts and ports are told apart where the query tells them apart.
                let (legend, query) = (text(target, "legendFormat"), text(target, "expr"));
                let by_port = query.contains("instance, port") || query.starts_with("memlane_port");
                assert!(legend.contains("{{instance}}"), "{title} of {name}: {legend}");
                assert_eq!(legend.contains("{{port}}"), by_port, "{title} of {name}: {legend}");
            }
        }
    }
}

fn read(name: &str) -> Value {
    let text = std::fs::read_to_string(Path::new(FOLDER).join(name)).expect("a dashboard");
    serde_json::from_str(&text).expect("JSON")
}

/// Returns the panels that show something: rows are headings.
fn panels(dashboard: &Value) -> Vec<Value> {
    let panels = dashboard["panels"].as_array().expect("panels").iter();
    panels.filter(|panel| panel["type"] != "row").cloned().collect()
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_else(|| panic!("{key} of {value} is no text"))
}
