//! Which metrics a query may name, and how.

use std::collections::BTreeMap;

use memlaned::metrics;

/// Asserts that a query names metrics of the daemon, counters only as they grow, and histograms only by their parts.
pub(crate) fn assert_known(query: &str) {
    let metrics: BTreeMap<&str, &str> = metrics::kinds().collect();
    assert!(query.contains("memlane_"), "{query}");
    for (before, name) in names(query) {
        let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        let metric = of_histogram.unwrap_or(name);
        let kind = metrics.get(metric).unwrap_or_else(|| panic!("{name} of {query} is none of {metrics:?}"));
        let counted = before.ends_with("rate(") || before.ends_with("increase(");
        assert_eq!(of_histogram.is_some(), *kind == "histogram", "{name} in {query}");
        assert_eq!(counted, *kind != "gauge", "counters only grow: {name} in {query}");
    }
}

/// Names in a query, each with what stands before it.
fn names(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query.match_indices("memlane_").map(|(start, _)| {
        let end = query[start..].find(|c: char| !c.is_ascii_lowercase() && c != '_');
        (&query[..start], &query[start..end.map_or(query.len(), |end| start + end)])
    })
}
