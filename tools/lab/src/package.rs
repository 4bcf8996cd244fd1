//! Memlane's Debian package, as `cargo xtask package --debug` makes it for tests.

use std::fs;
use std::path::PathBuf;

use crate::programs::target_directory;

/// Returns the package that was made last, if one is there.
pub fn package() -> Option<PathBuf> {
    let directory = target_directory().join("package/debug").canonicalize().ok()?;
    let packages = fs::read_dir(directory).ok()?.flatten().map(|entry| entry.path()).filter(|file| {
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("memlane_") && name.ends_with("_amd64.deb")
    });
    packages.max_by_key(|file| file.metadata().and_then(|found| found.modified()).ok())
}
