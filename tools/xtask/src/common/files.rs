//! Files that are kept, so that people can understand what failed.

use std::fs;
use std::path::Path;

use anyhow::Result;

/// Copies a file, or a folder of files, if it exists. What is neither is left out.
///
/// # Errors
///
/// If it cannot be copied.
pub(crate) fn copy_if_there(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            copy_if_there(&entry.path(), &to.join(entry.file_name()))?;
        }
    } else if from.is_file() {
        fs::copy(from, to)?;
    }
    Ok(())
}
