//! Debian's package archive, as apt reaches it on this machine.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};

use crate::programs::run;

/// A package archive of Debian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DebianArchive {
    /// The URI of the archive.
    uri: String,
    /// The keys whose signatures are trusted, if apt's configuration names them.
    signed_by: Option<String>,
}

impl DebianArchive {
    /// Returns all archives that this machine knows, starting with the one that apt asks first.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub(super) fn all() -> Result<Vec<Self>> {
        let mut archives = known()?;
        if archives.is_empty() && rustix::process::geteuid().is_root() {
            // A fresh machine has not asked yet whose archives they are.
            run("apt-get", &["update", "-q"], Path::new("/"))?;
            archives = known()?;
        }
        ensure!(
            !archives.is_empty(),
            "apt is configured for no archive of Debian's, or has not asked it yet (`apt-get update`)"
        );
        Ok(archives)
    }

    /// Returns the line of a sources.list for another release.
    pub(super) fn source(&self, suite: &str) -> String {
        let signed_by =
            self.signed_by.as_ref().map(|keys| format!("[signed-by={keys}] ")).unwrap_or_default();
        format!("deb {signed_by}{} {suite} main", self.uri)
    }
}

fn known() -> Result<Vec<DebianArchive>> {
    // Whatever the format of its configuration is, and wherever that lies.
    let targets = run(
        "apt-get",
        &[
            "indextargets",
            "--format",
            "$(REPO_URI) $(SOURCESENTRY)",
            "Created-By: Packages",
            "Origin: Debian",
            "Label: Debian",
            "Component: main",
        ],
        Path::new("/"),
    )?;
    Ok(read(&targets, |file| fs::read_to_string(file).unwrap_or_default()))
}

/// Reads the archives of `targets`, one on each line: a URI, and the file and the place that configures it.
fn read(targets: &str, file: impl Fn(&str) -> String) -> Vec<DebianArchive> {
    let mut archives: Vec<DebianArchive> = Vec::new();
    for (uri, entry) in targets.lines().filter_map(|line| line.trim().split_once(' ')) {
        let file = file(entry.rsplit_once(':').map_or(entry, |(file, _)| file));
        let archive = DebianArchive { uri: uri.to_owned(), signed_by: signed_by(&file, uri) };
        if archives.iter().all(|known| known.uri != archive.uri) {
            archives.push(archive);
        }
    }
    archives
}

/// Finds the files of keys that `text`, in either format, names for the archive at `uri`. If it names none, or contains
/// the keys themselves, mmdebstrap takes Debian's own.
fn signed_by(text: &str, uri: &str) -> Option<String> {
    let is_there = |word: &str| word.trim_end_matches('/') == uri.trim_end_matches('/');
    let about = |part: &&str| part.split_whitespace().any(is_there);
    let mut lines = text.lines().filter(|line| line.trim_start().starts_with("deb ")).peekable();
    let keys = if lines.peek().is_some() {
        let line = lines.find(about)?;
        line.split(['[', ']', ' ']).find_map(|word| word.strip_prefix("signed-by="))?.to_owned()
    } else {
        let stanza = text.split("\n\n").find(about)?;
        let field = |line: &str| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("signed-by").then(|| value.trim().to_owned())
        };
        stanza.lines().find_map(field)?.split_whitespace().collect::<Vec<_>>().join(",")
    };
    keys.starts_with('/').then_some(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives_are_read_in_either_format() {
        let files = |file: &str| {
            match file {
            "/etc/apt/debian.sources" => "Types: deb\nURIs: http://one.example/debian http://two.example/debian\n\
                                          Suites: bookworm\nSigned-By: /keys/a.gpg\n\n\
                                          Types: deb\nURIs: http://three.example/debian/\nSigned-By:\n -----BEGIN"
                .to_owned(),
            _ => "# ours\ndeb [arch=amd64 signed-by=/keys/b.gpg] http://four.example/debian bookworm main\n\
                  deb http://five.example/debian bookworm main\n"
                .to_owned(),
        }
        };
        let targets = "http://one.example/debian/ /etc/apt/debian.sources:1\n\
                       http://two.example/debian/ /etc/apt/debian.sources:1\n\
                       http://one.example/debian/ /etc/apt/debian.sources:1\n\
                       http://three.example/debian/ /etc/apt/debian.sources:2\n\
                       http://four.example/debian/ /etc/apt/sources.list:2\n\
                       http://five.example/debian/ /etc/apt/sources.list:3\n";
        let sources: Vec<String> =
            read(targets, files).iter().map(|archive| archive.source("trixie")).collect();
        assert_eq!(
            sources,
            [
                "deb [signed-by=/keys/a.gpg] http://one.example/debian/ trixie main",
                "deb [signed-by=/keys/a.gpg] http://two.example/debian/ trixie main",
                "deb http://three.example/debian/ trixie main",
                "deb [signed-by=/keys/b.gpg] http://four.example/debian/ trixie main",
                "deb http://five.example/debian/ trixie main",
            ]
        );
    }
}
