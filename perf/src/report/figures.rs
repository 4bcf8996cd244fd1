//! [`NamedFigures`]: measured values, by name.

use std::fmt;

use serde::{Serialize, Serializer};

use super::Spread;

/// Measured values, by name and in the order in which they are shown. A name ends with its unit.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedFigures<T = f64>(Vec<(&'static str, T)>);

impl<T: Copy> NamedFigures<T> {
    /// Adds a figure, or replaces the one of that name.
    pub fn set(&mut self, name: &'static str, value: T) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name, value)),
        }
    }

    /// Adds a figure as [`NamedFigures::set`] does, if there is a value.
    pub fn set_some(&mut self, name: &'static str, value: Option<T>) {
        if let Some(value) = value {
            self.set(name, value);
        }
    }

    /// Returns the figure of a name.
    pub fn value(&self, name: &str) -> Option<T> {
        self.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    /// Returns all figures.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, T)> {
        self.0.iter().copied()
    }
}

impl NamedFigures<Spread> {
    /// Collects the same figures of several runs. A figure may be missing in some of them.
    pub(crate) fn over<'a>(runs: impl Iterator<Item = &'a NamedFigures> + Clone) -> Self {
        let mut spreads = Self::default();
        for (name, _) in runs.clone().flat_map(NamedFigures::iter) {
            if spreads.value(name).is_none() {
                let values = runs.clone().filter_map(|figures| figures.value(name)).collect();
                spreads.set(name, Spread::of(values));
            }
        }
        spreads
    }
}

impl<T> Default for NamedFigures<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T, const N: usize> From<[(&'static str, T); N]> for NamedFigures<T> {
    fn from(figures: [(&'static str, T); N]) -> Self {
        Self(figures.into())
    }
}

impl<T: Serialize> Serialize for NamedFigures<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

/// A name without its underscores, for people.
pub(crate) struct Words<'a>(pub(crate) &'a str);

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0.replace('_', " "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_keep_their_order_and_may_be_missing_in_some_runs() {
        let mut first = NamedFigures::from([("total_seconds", 3.0), ("downtime_ms", 7.0)]);
        let mut second = NamedFigures::from([("total_seconds", 1.0)]);
        first.set("total_seconds", 5.0);
        second.set_some("downtime_ms", None);
        second.set_some("rounds", Some(2.0));
        let spreads = NamedFigures::over([first, second].iter());
        let names: Vec<&str> = spreads.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["total_seconds", "downtime_ms", "rounds"]);
        let median = |name| spreads.value(name).map(|spread| spread.median);
        assert_eq!(
            (median("total_seconds"), median("downtime_ms"), median("none")),
            (Some(3.0), Some(7.0), None)
        );
        let json = serde_json::to_string(&NamedFigures::from([("b", 1.0), ("a", 2.0)])).expect("JSON");
        assert_eq!(json, r#"{"b":1.0,"a":2.0}"#);
        assert_eq!(Words("cpu_seconds_per_gb").to_string(), "cpu seconds per gb");
    }
}
