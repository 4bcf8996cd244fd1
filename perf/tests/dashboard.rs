//! The dashboard shows metrics that the daemon has, as what they are.

use std::collections::BTreeMap;

use memlaned::metrics;
use serde_json::Value;

const DASHBOARD: &str = include_str!("../dashboard/memlane.json");

/// All queries of the dashboard, of its variables too.
fn queries(dashboard: &Value) -> Vec<&str> {
    let targets =
        dashboard["panels"].as_array().into_iter().flatten().filter_map(|panel| panel["targets"].as_array());
    let variables = dashboard["templating"]["list"].as_array().into_iter().flatten();
    let variables = variables.filter_map(|variable| variable["definition"].as_str());
    targets.flatten().filter_map(|target| target["expr"].as_str()).chain(variables).collect()
}

/// Names in a query, each with what stands before it.
fn names(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query.match_indices("memlane_").map(|(start, _)| {
        let end = query[start..].find(|c: char| !c.is_ascii_lowercase() && c != '_');
        (&query[..start], &query[start..end.map_or(query.len(), |end| start + end)])
    })
}

#[test]
fn every_query_is_of_metrics_that_there_are() {
    let metrics: BTreeMap<&str, &str> = metrics::kinds().collect();
    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("JSON");
    let queries = queries(&dashboard);
    assert!(queries.len() > 20, "{queries:?}");
    for query in queries {
        assert!(query.contains("memlane_"), "{query}");
        for (before, name) in names(query) {
            let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            let metric = of_histogram.unwrap_or(name);
            let kind =
                metrics.get(metric).unwrap_or_else(|| panic!("{name} of {query} is none of {metrics:?}"));
            let counted = before.ends_with("rate(") || before.ends_with("increase(");
            assert_eq!(of_histogram.is_some(), *kind == "histogram", "{name} in {query}");
            assert_eq!(counted, *kind != "gauge", "counters only grow: {name} in {query}");
        }
    }
}
