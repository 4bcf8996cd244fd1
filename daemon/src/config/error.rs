//! Errors of the configuration.

use std::io;
use std::path::PathBuf;

use memlane_guest::toml_file::FileError;

/// The reason why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {error}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The error of the system.
        error: io::Error,
    },
    /// The contents of the file are not allowed.
    #[error(transparent)]
    File(#[from] FileError),
}
