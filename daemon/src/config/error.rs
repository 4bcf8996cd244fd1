//! What is wrong with a file that was read.

use std::io;
use std::path::PathBuf;

use memlane_guest::toml_file::FileError;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {error}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The file does not say what it should.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file does not agree to plain TCP.
    #[error(
        "{}: insecure = {found}: traffic between daemons, guests' memory included, is not encrypted yet. \
         Where only trusted hosts share the migration networks, write insecure = true; nothing else is allowed",
        file.display()
    )]
    Insecure {
        /// The file.
        file: PathBuf,
        /// What stands there.
        found: &'static str,
    },
}
