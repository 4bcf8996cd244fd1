//! Valid messages of every kind, from which a fuzzer begins.

mod files;
mod guest;
mod host;
mod monitor;
mod peer;
mod tls;

use std::collections::BTreeMap;

/// The name of every seed begins with this.
pub(crate) const PREFIX: &str = "seed-";

/// The seeds of one target, by the names of their files.
pub(crate) type Seeds = BTreeMap<String, Vec<u8>>;

/// Returns the seeds of all targets.
pub(crate) fn all() -> BTreeMap<&'static str, Seeds> {
    BTreeMap::from([
        ("hello", peer::hello()),
        ("control", peer::control()),
        ("frame", peer::frame()),
        ("attach", guest::attach()),
        ("starter", guest::starter()),
        ("state", guest::state()),
        ("qmp", monitor::qmp()),
        ("guest_file", files::guest_file()),
        ("config", files::config()),
        ("journal", host::journal()),
        ("api", host::api()),
        ("tls", tls::tls()),
    ])
}

/// Gives the files of seeds their names.
fn named<'a, B: Into<Vec<u8>>>(seeds: impl IntoIterator<Item = (&'a str, B)>) -> Seeds {
    let seeds = seeds.into_iter().map(|(name, bytes)| (format!("{PREFIX}{name}"), bytes.into()));
    seeds.collect()
}
